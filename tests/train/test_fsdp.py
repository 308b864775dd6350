"""Shards train like the whole: two ranks under fsdp against two under ddp, and from one to the other and back."""

import shutil

import pytest
import torch
from small_runs import checkpoint, small_recipe, train
from torch import Tensor

from effbackbones.config.load import SHARDED_OPTIMIZERS
from effbackbones.train.fsdp import sharded_units, whole_weights
from effbackbones.train.logger import read_metrics
from effbackbones.train.run import evaluate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

# Two epochs of 2 steps, of two batches each; an evaluation has 3 batches on one rank and 2 on the other.
SETTINGS = (
    *("data.synthetic_images=17", "trainer.accumulate=2", "data.batch_size=2", "ema.decay=0.9", "optim.clip_grad=0.1"),
    *("model.drop_path_rate=0.1", "data.eval_batch_size=4"),
    "optim.eps=1e-3",  # a smaller one makes steps of the rounding noise in gradients that are zero
)

CODE = """
import os
import sys

from lightning.pytorch import Callback

from effbackbones.cli import main
from effbackbones.train import run
from effbackbones.train.callbacks.pictures import Pictures


class Stop(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == last:
            os._exit(9)


last, draws = int(sys.argv[1]), sys.argv[2] == "draw"
own = run._callbacks
run._callbacks = lambda *args: [*(c for c in own(*args) if draws or not isinstance(c, Pictures)), Stop()]
sys.exit(main(["train", *sys.argv[3:]]))
"""


class Ranks:
    """Runs of two ranks, in folders of their own."""

    def __init__(self, forks, folder):
        self.forks, self.folder = forks, folder
        self.recipe = str(small_recipe(folder / "run").path)

    def train(self, name, strategy, *settings, until=99, draw=False):
        """Train, and be killed before the step `until`, counted from 0; return the run folder and what was said."""
        folder = self.folder / name
        arguments = (str(until), "draw" if draw else "", self.recipe, f"run.dir={folder}", *SETTINGS, *settings)
        processes = self.forks.start_ranks(*arguments, code=CODE, strategy=strategy)
        for process in processes:
            assert process.wait(600) == (0 if until == 99 else 9), process.said
        return folder, processes[0].said


@pytest.fixture(scope="module")
def ranks(forks, tmp_path_factory):
    return Ranks(forks, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def replicated(ranks):
    return ranks.train("ddp", "ddp")[0]


@pytest.fixture(scope="module")
def sharded(ranks):
    return ranks.train("fsdp", "fsdp", draw=True)[0]


def contents(folder):
    """Return what a run's last checkpoint holds, but for the settings of its optimizer, which fsdp does not fuse."""
    last = checkpoint(folder)
    (optimizer,) = last["optimizer_states"]
    numbers = [group["params"] for group in optimizer["param_groups"]]
    kept = {key: last[key] for key in ("state_dict", "loops", "global_step", "callbacks")}
    return {**kept, "optimizer": optimizer["state"], "numbers": numbers}


def assert_close(one, other, tolerance=1e-5):
    """Two nested structures are the same but for the rounding of numbers."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key], tolerance)
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_close(*pair, tolerance)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4)


def test_shards_end_with_the_checkpoint_of_replicas(replicated, sharded):
    one, other = contents(replicated), contents(sharded)
    assert one["global_step"] == other["global_step"] == 4
    assert_close(one, other)


def test_checkpoint_of_shards_holds_whole_tensors_of_the_ordinary_kind(sharded):
    last = checkpoint(sharded)
    states = last["optimizer_states"][0]["state"].values()
    tensors = [*last["state_dict"].values(), *(value for state in states for value in state.values())]
    assert {type(tensor) for tensor in tensors} == {Tensor}


def test_metrics_of_shards_are_those_of_replicas(replicated, sharded):
    one, other = (read_metrics(folder / "metrics.csv") for folder in (replicated, sharded))
    names = [name for row in one for name in row if name.startswith(("val/", "train/loss", "lr"))]
    assert {"val/top1", "val/top1_ema", "train/loss"} <= set(names)
    for a, b in zip(one, other, strict=True):
        for name in set(a) & set(names):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_run_of_shards_draws_and_evaluates_on_one_device(sharded):
    assert (sharded / "predictions.png").is_file()
    alone = evaluate(str(sharded), ["trainer.devices=1", "trainer.strategy=auto"])
    best = max(read_metrics(sharded / "metrics.csv"), key=lambda row: row.get("val/top1", -1))
    assert alone["top1"] == pytest.approx(best["val/top1"], rel=1e-5)


@pytest.fixture(scope="module")
def changing(ranks):
    """A run that is killed twice and goes on under another strategy each time, and a copy of it after the first."""
    folder, _ = ranks.train("changing", "fsdp", "trainer.save_every=1", until=1)
    copy = shutil.copytree(folder, ranks.folder / "copy")
    ranks.train("changing", "ddp", "trainer.save_every=1", until=3)
    _, said = ranks.train("changing", "fsdp")
    assert "at step 3." in said
    return folder, copy


def test_run_that_changes_its_strategy_ends_with_the_same_checkpoint(sharded, changing):
    assert_close(contents(sharded), contents(changing[0]))


def test_run_of_shards_goes_on_on_one_device(changing):
    folder = changing[1]
    assert checkpoint(folder)["global_step"] == 1
    alone = ["trainer.devices=1", "trainer.accumulate=4", "data.global_batch=8"]
    train(small_recipe(folder, [*SETTINGS, *alone]))
    assert checkpoint(folder)["global_step"] == 4


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_shards_train_in_mixed_precision(ranks, replicated, precision):
    more = ["trainer.steps=2", "model.channels_last=true", "model.grad_checkpointing=[1, 2]"]
    folder, _ = ranks.train(precision, "fsdp", f"trainer.precision={precision}", *more)
    wanted, got = (read_metrics(run / "metrics.csv")[:2] for run in (replicated, folder))
    assert [row["train/loss"] for row in got] == pytest.approx([row["train/loss"] for row in wanted], rel=0.05)


# A bad value in one rank

POISONED = """
import sys

import torch
from lightning.pytorch import Callback

from effbackbones.cli import main
from effbackbones.train import run
from effbackbones.train.fsdp import whole


class Poison(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = [whole(parameter.detach()).clone() for parameter in pl_module.parameters()]
        if trainer.global_step == 1 and trainer.global_rank == 1:
            if place == "input":
                batch[0][0] = torch.nan
            else:
                pl_module.model.stages[1].register_full_backward_hook(lambda m, i, o: (i[0] * torch.nan,))

    def on_exception(self, trainer, pl_module, exception):
        after = [whole(parameter.detach()) for parameter in pl_module.parameters()]
        print("unchanged:", all(map(torch.equal, self.before, after)))


place, own = sys.argv[1], run._callbacks
run._callbacks = lambda *args: [Poison(), *own(*args)]
sys.exit(main(["train", *sys.argv[2:]]))
"""


@pytest.mark.parametrize(
    ("place", "of_rank_0", "of_rank_1"),
    [
        ("input", "the loss of another rank is not finite", "First bad value: the input batch."),
        (
            "gradient",
            "First bad value: the gradient of model.stages.0.",
            "First bad value: the gradient of model.stages.0.",
        ),
    ],
)
def test_bad_value_in_one_rank_stops_both_before_the_step(forks, tmp_path, place, of_rank_0, of_rank_1):
    recipe = str(small_recipe(tmp_path / "run").path)
    processes = forks.start_ranks(place, recipe, f"run.dir={tmp_path / 'run'}", code=POISONED, strategy="fsdp")
    for process, what in zip(processes, (of_rank_0, of_rank_1), strict=True):
        assert process.wait(600) != 0
        assert what in process.said
        assert "unchanged: True" in process.said


# Optimizers

OPTIMIZERS = """
import os
from copy import deepcopy

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from effbackbones.config.load import SHARDED_OPTIMIZERS
from effbackbones.config.schema import OptimConfig
from effbackbones.train.fsdp import FullySharded, whole
from effbackbones.train.optim import build_optimizer


def start(name, sharded):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 3))
    if sharded:
        fully_shard(model, mesh=mesh)
    return model, build_optimizer(model, OptimConfig(name=name, lr=0.01), 1, foreach=sharded)


def train(model, optimizer):
    for _ in range(2):
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
mesh, images = init_device_mesh("cpu", (2,)), torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
for name in SHARDED_OPTIMIZERS:
    (one, own), (two, other) = start(name, False), start(name, True)
    train(one, own)
    train(two, other)
    strategy = FullySharded(parallel_devices=[torch.device("cpu")])
    state = strategy.optimizer_state(other)  # whole on both ranks, each of which is the first one to its strategy
    (three, third) = start(name, True)
    three.load_state_dict(two.state_dict())
    strategy.optimizers = [third]
    strategy.load_optimizer_state_dict({"optimizer_states": [deepcopy(state)]})
    own.load_state_dict(deepcopy(state))
    train(one, own)
    train(three, third)
    pairs = zip(one.parameters(), three.parameters(), strict=True)
    print(name, max((p - whole(q)).abs().max().item() for p, q in pairs))
"""


@pytest.mark.slow
def test_optimizers_that_are_allowed_step_and_restore_shards_like_whole_tensors(forks):
    for process in forks.start_ranks(code=OPTIMIZERS):
        assert process.wait(600) == 0, process.said
        differences = dict(line.split() for line in process.said.splitlines() if line.count(" ") == 1)
        assert differences.keys() == set(SHARDED_OPTIMIZERS)
        assert {name for name, difference in differences.items() if float(difference) > 1e-5} == set()


# Units


def test_unit_of_sharding_is_a_block_the_outermost_one():
    inner = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(1, 1)])})
    model = torch.nn.ModuleDict({"stem": torch.nn.Linear(1, 1), "blocks": torch.nn.ModuleList([inner])})
    assert sharded_units(model) == [inner]


def test_weights_that_are_whole_stay_as_they_are():
    model = torch.nn.Linear(2, 2)
    with whole_weights(model):
        assert type(model.weight) is torch.nn.Parameter
