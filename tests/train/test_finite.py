"""A step whose loss or gradient is not finite never reaches the weights."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from small_runs import small_recipe, train, write_recipe

from effbackbones.cli import main
from effbackbones.train.callbacks.finite import FiniteGuard, NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

BLOCK = "stages.1.blocks.0"
PARAMETER = "stages.2.blocks.0.mlp.fc1.weight"


class Poison(Callback):
    """Keeps a copy of the weights before each step, and from one batch on puts a bad value into one place."""

    def __init__(self, place, value, batch, only_once=False):
        self.place, self.value, self.batch, self.only_once = place, value, batch, only_once

    def on_train_start(self, trainer, pl_module):
        self.module = pl_module

    def weights(self):
        parameters = {**dict(self.module.named_parameters()), **dict(self.module.model.named_parameters())}
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = self.weights()
        if batch_idx == self.batch:
            self.poison(pl_module, batch[0])
        elif self.only_once and batch_idx == self.batch + 1:
            self.hook.remove()

    def poison(self, pl_module, images):
        def on_output(module, args, output):
            return output * self.value

        if self.place == "loss":
            self.hook = pl_module.criterion.register_forward_hook(on_output)
        elif self.place == "output":
            self.hook = pl_module.model.get_submodule(BLOCK).register_forward_hook(on_output)
        elif self.place == "gradient":
            self.hook = pl_module.model.get_parameter(PARAMETER).register_hook(lambda grad: grad * self.value)
        else:
            images[1, 2, 3, 4] = self.value


def poisoned(folder, poison, overrides=()):
    with pytest.raises(NonFiniteError) as stop:
        train(small_recipe(folder, overrides), poison)
    return str(stop.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("place", "culprit"),
    [
        ("loss", "the output of criterion"),
        ("output", f"the output of model.{BLOCK}"),
        ("gradient", f"the gradient of model.{PARAMETER}"),
        ("input", "the input batch"),
    ],
)
def test_bad_value_stops_the_run_before_the_step_and_is_named(tmp_path, place, culprit, value):
    poison = Poison(place, value, batch=2)
    message = poisoned(tmp_path / "run", poison, ["ema.decay=0.9"])
    assert message.startswith("rank 0, epoch 1, step 3: ")
    assert f"First bad value: {culprit}.\n" in message
    after = poison.weights()
    assert all(torch.equal(after[name], before) for name, before in poison.before.items())


def test_weight_that_is_not_finite_is_named(tmp_path):
    poison = Callback()
    poison.on_train_batch_start = lambda trainer, module, *args: module.model.get_parameter(PARAMETER).data.fill_(
        math.nan
    )
    assert f"First bad value: the weight model.{PARAMETER}.\n" in poisoned(tmp_path / "run", poison)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("place", ["output", "input"])
def test_bad_value_stops_the_run_under_mixed_precision(tmp_path, precision, place):
    poison = Poison(place, math.nan, batch=2)
    message = poisoned(tmp_path / "run", poison, [f"trainer.precision={precision}"])
    assert message.startswith("rank 0, epoch 1, step 3: the loss is nan")
    after = poison.weights()
    assert all(torch.equal(after[name], before) for name, before in poison.before.items())


@pytest.mark.parametrize(("place", "what"), [("output", "the loss is nan"), ("gradient", "the gradient is not")])
def test_bad_batch_before_the_last_of_an_accumulated_step_stops_that_step(tmp_path, place, what):
    poison = Poison(place, math.nan, batch=2, only_once=True)
    message = poisoned(tmp_path / "run", poison, ["trainer.accumulate=2"])
    assert message.startswith("rank 0, epoch 1, step 2: ")
    assert what in message
    assert "First bad value: the gradient of model." in message
    after = poison.weights()
    assert all(torch.equal(after[name], before) for name, before in poison.before.items())


def test_command_whose_loss_is_not_finite_ends_with_code_2_and_the_reason(tmp_path, capsys):
    recipe = small_recipe(tmp_path / "run").path
    assert main(["train", str(recipe), f"run.dir={tmp_path / 'run'}", "optim.lr=1e18"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("effb train: rank 0, epoch 1, step ")
    assert "optim.lr" in message


# Two ranks

POISONED_IN_RANK_1 = """
import sys

import torch
from lightning.pytorch import Callback

from effbackbones.cli import main
from effbackbones.train import run


class Poison(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.poisoned = batch_idx == 0 and trainer.global_rank == 1
        if self.poisoned and sys.argv[1] == "input":
            batch[0][0] = torch.nan

    def on_after_backward(self, trainer, pl_module):
        if self.poisoned and sys.argv[1] == "gradient":
            parameter = pl_module.model.stages[2].blocks[0].mlp.fc1.weight
            parameter.grad.mul_(torch.nan)

    def on_exception(self, trainer, pl_module, exception):
        print("unchanged:", all(parameter.isfinite().all() for parameter in map(local, pl_module.parameters())))


def local(parameter):
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


own = run._callbacks
run._callbacks = lambda *args: [Poison(), *own(*args)]
sys.exit(main(["train", *sys.argv[2:]]))
"""


@pytest.mark.parametrize(("strategy", "place"), [("ddp", "input"), ("fsdp", "input"), ("fsdp", "gradient")])
def test_bad_value_in_one_rank_stops_both_before_an_accumulated_step(forks, tmp_path, strategy, place):
    arguments = [str(write_recipe(tmp_path)), f"run.dir={tmp_path / 'run'}", "trainer.accumulate=2"]
    processes = forks.start_ranks(place, *arguments, code=POISONED_IN_RANK_1, strategy=strategy)
    for rank, process in enumerate(processes):
        assert process.wait() == 2, process.said
        assert f"effb train: rank {rank}, epoch 1, step 1: " in process.said
        assert "unchanged: True" in process.said
    if place == "input":
        assert "step 1: the loss is nan." in processes[1].said
    else:
        assert f"First bad value: the gradient of model.{PARAMETER}.\n" in processes[1].said


# The gradient scaler of fp16


class Linear(torch.nn.Linear):
    """A model of one weight with what the guard asks of a LightningModule."""

    def __init__(self, trainer):
        super().__init__(1, 1)
        self.trainer = trainer

    def step_losses(self, batch):
        return self(batch).sum()


class Steps:
    """Steps of a guard under a precision plugin, with a scaler or without."""

    def __init__(self, scaler, max_skipped):
        plugin = SimpleNamespace(scaler=scaler, forward_context=nullcontext)
        self.trainer = SimpleNamespace(
            precision_plugin=plugin, world_size=1, global_rank=0, global_step=0, current_epoch=0
        )
        self.model = Linear(self.trainer)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.guard = FiniteGuard(max_skipped)

    def step(self, gradient=1.0, loss=1.0):
        self.model.weight.grad = torch.full((1, 1), gradient)
        self.guard.on_train_batch_start(self.trainer, self.model, torch.ones(1, 1), 0)
        self.guard.on_before_backward(self.trainer, self.model, torch.tensor(loss))
        self.guard.on_before_optimizer_step(self.trainer, self.model, self.optimizer)


def test_overflowing_gradients_pass_to_the_scaler_up_to_the_bound_then_stop():
    steps = Steps(scaler=object(), max_skipped=3)
    for _ in range(3):
        steps.step(gradient=math.inf)
    with pytest.raises(NonFiniteError, match="the loss is finite, the gradient is not"):
        steps.step(gradient=math.inf)


def test_finite_step_starts_the_count_of_overflowing_ones_anew():
    steps = Steps(scaler=object(), max_skipped=3)
    for gradient in 2 * [math.inf, math.inf, math.inf, 1.0]:
        steps.step(gradient)


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_loss_that_is_not_finite_stops_at_once_under_a_scaler(loss):
    with pytest.raises(NonFiniteError, match=f"the loss is {loss}"):
        Steps(scaler=object(), max_skipped=3).step(gradient=math.inf, loss=loss)


def test_overflowing_gradient_stops_at_once_without_a_scaler():
    with pytest.raises(NonFiniteError, match="the gradient of weight"):
        Steps(scaler=None, max_skipped=3).step(gradient=math.inf)


@pytest.mark.parametrize(("gradient", "clipped"), [(8.0, 2.0), (1.5, 1.5)])
def test_gradient_is_clipped_to_the_norm_of_the_recipe(gradient, clipped):
    steps = Steps(scaler=None, max_skipped=3)
    steps.guard.clip = 2.0
    steps.step(gradient=gradient)
    assert steps.model.weight.grad.item() == pytest.approx(clipped, rel=1e-5)


def test_recipe_without_clipping_leaves_a_large_gradient_as_it_is():
    steps = Steps(scaler=None, max_skipped=3)
    steps.step(gradient=1e4)
    assert steps.model.weight.grad.item() == 1e4


def test_overflowing_gradient_that_the_scaler_leaves_out_is_not_clipped():
    steps = Steps(scaler=object(), max_skipped=3)
    steps.guard.clip = 2.0
    steps.step(gradient=math.inf)
    assert steps.model.weight.grad.item() == math.inf
