"""The optimizer's groups and the schedule's values, against their formulas."""

import math
from itertools import pairwise

import pytest
import timm
import torch
from lightning.pytorch import Callback
from small_runs import small_recipe, train

import effbackbones  # noqa: F401  (registers the models)
from effbackbones.config.schema import OptimConfig, ScheduleConfig
from effbackbones.train.optim import build_optimizer, build_schedule, scaled_lr

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

STEPS_PER_EPOCH, EPOCHS, LR = 20, 10, 0.4
STEPS = STEPS_PER_EPOCH * EPOCHS


def rates(steps=STEPS, **schedule):
    """Return the rate of each step, and of the one after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = build_schedule(optimizer, ScheduleConfig(**schedule), steps, STEPS_PER_EPOCH)
    found = [optimizer.param_groups[0]["lr"]]
    for step in range(1, steps + 1):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_cosine_falls_from_the_peak_to_the_minimum():
    expected = [0.01 + (LR - 0.01) * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS + 1)]
    assert rates(name="cosine", min_lr=0.01) == pytest.approx(expected)


def test_poly_falls_linearly_to_the_minimum():
    expected = [0.01 + (LR - 0.01) * (1 - step / STEPS) for step in range(STEPS + 1)]
    assert rates(name="poly", min_lr=0.01) == pytest.approx(expected)


def test_step_decays_every_so_many_epochs():
    found = rates(name="step", decay_epochs=3, decay_rate=0.5)
    assert found == pytest.approx([LR * 0.5 ** (step // 60) for step in range(STEPS + 1)])


def test_constant_stays():
    assert rates(name="constant") == [LR] * (STEPS + 1)


@pytest.mark.parametrize("name", ["cosine", "poly", "step", "constant"])
def test_warmup_rises_linearly_and_then_the_schedule_is_where_it_would_be_without(name):
    found = rates(name=name, warmup_epochs=1.5, warmup_lr=0.1)
    assert found[:30] == pytest.approx([0.1 + (LR - 0.1) * step / 30 for step in range(30)])
    assert found[30:] == pytest.approx(rates(name=name)[30:])


def test_schedule_of_fewer_steps_reaches_its_minimum_there():
    found = rates(steps=50, name="cosine")
    assert found[25] == pytest.approx(LR / 2)
    assert found[50] == 0


@pytest.mark.parametrize(("lr_batch", "global_batch", "lr"), [(None, 64, 0.1), (1024, 1024, 0.1), (1024, 256, 0.025)])
def test_rate_scales_with_the_batch_it_belongs_to(lr_batch, global_batch, lr):
    assert scaled_lr(OptimConfig(lr=0.1, lr_batch=lr_batch), global_batch) == pytest.approx(lr)


class Rates(Callback):
    """The rate of every step of a run."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_run_scales_its_rate_by_the_images_of_a_step_and_ends_its_schedule_at_its_last(tmp_path):
    watch = Rates()
    overrides = ["trainer.accumulate=2", "optim.lr_batch=16", "optim.lr=0.01", "trainer.steps=5"]
    train(small_recipe(tmp_path / "run", overrides), watch)
    peak = 0.01 * 2 * 4 / 16
    assert watch.rates == pytest.approx([peak * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)])


def test_epochs_that_end_before_the_limit_of_steps_end_the_schedule(tmp_path):
    watch = Rates()
    train(small_recipe(tmp_path / "run", ["trainer.steps=1000", "schedule.name=poly", "optim.lr=0.01"]), watch)
    assert watch.rates == pytest.approx([0.01 * (1 - step / 12) for step in range(12)])


# Groups


def groups(optimizer, model):
    """Return the group of every parameter by its name; each must be in exactly one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}
    assert found.keys() == set(names.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    return found


@pytest.mark.parametrize("name", ["uniformer_small", "uniformer_xxs", "uniformer_base_ls"])
@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_norms_biases_and_what_the_model_exempts_have_no_weight_decay(name, layer_decay):
    model = timm.create_model(name)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3, layer_decay=layer_decay), 1)
    exempt = model.no_weight_decay()
    for parameter_name, group in groups(optimizer, model).items():
        plain = model.get_parameter(parameter_name).ndim <= 1 or parameter_name in exempt
        assert group["weight_decay"] == (0 if plain else 0.3), parameter_name


def test_layer_decay_scales_the_rate_down_from_the_head_to_the_stem():
    model = timm.create_model("uniformer_small")
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, layer_decay=0.7), 1)
    scale = {name: group["lr_scale"] for name, group in groups(optimizer, model).items()}
    layers = [f"stages.{stage}.blocks.{block}." for stage, depth in enumerate((3, 4, 8, 3)) for block in range(depth)]
    by_layer = [{value for name, value in scale.items() if name.startswith(layer)} for layer in ["stem.", *layers]]
    assert all(len(values) == 1 for values in by_layer)
    in_order = [values.pop() for values in by_layer]
    assert [shallow / deep for shallow, deep in pairwise(in_order)] == pytest.approx([0.7] * 18)
    assert scale["head.fc.weight"] == 1
    for stage in (1, 2, 3):
        assert scale[f"stages.{stage}.downsample.proj.weight"] == scale[f"stages.{stage}.blocks.0.pos_embed.weight"]

    schedule = build_schedule(optimizer, ScheduleConfig(name="cosine", min_lr=0), STEPS, STEPS_PER_EPOCH)
    schedule.step_update(STEPS // 2)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.05 * group["lr_scale"])


def test_settings_reach_the_optimizer():
    model = torch.nn.Linear(2, 2)
    adam = build_optimizer(model, OptimConfig(name="adamw", betas=[0.8, 0.9], eps=1e-6), 1)
    assert isinstance(adam, torch.optim.AdamW)
    assert all(tuple(group["betas"]) == (0.8, 0.9) and group["eps"] == 1e-6 for group in adam.param_groups)
    sgd = build_optimizer(model, OptimConfig(name="sgd", momentum=0.7), 1)
    assert isinstance(sgd, torch.optim.SGD)
    assert all(group["momentum"] == 0.7 for group in sgd.param_groups)


def test_loaded_state_keeps_the_settings_of_the_optimizer():
    model = torch.nn.Linear(2, 2)
    old = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.1), 1)
    model(torch.ones(1, 2)).sum().backward()
    old.step()
    new = build_optimizer(model, OptimConfig(lr=0.2, weight_decay=0.3), 1)
    new.load_state_dict(old.state_dict())
    assert {group["lr"] for group in new.param_groups} == {0.2}
    assert {group["weight_decay"] for group in new.param_groups} == {0, 0.3}
    for parameter in model.parameters():
        assert torch.equal(new.state[parameter]["exp_avg"], old.state[parameter]["exp_avg"])


@pytest.mark.parametrize(("name", "fused"), [("adamw", True), ("sgd", True), ("lamb", None)])
def test_optimizer_is_fused_where_there_is_a_fused_one(name, fused):
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimConfig(name=name), 1, fused=True)
    assert all(group.get("fused") is fused for group in optimizer.param_groups)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 4, 3, 3)])
def test_muon_orthogonalises_in_single_precision_on_a_cpu(shape):
    model = torch.nn.ParameterList([torch.zeros(shape)])
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=0.1, weight_decay=0), 1)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model[0].grad = gradient.clone()
    optimizer.step()

    u, _, vh = torch.linalg.svd(gradient.double().view(shape[0], -1), full_matrices=False)
    step = model[0].detach().double().view(shape[0], -1) / (-0.1 * 0.2 * math.sqrt(max(u.shape[0], vh.shape[1])))
    singular = u.T @ step @ vh.T  # the gradient's singular vectors, each with a singular value of about 1
    torch.testing.assert_close(singular, singular.diag().diag(), rtol=0, atol=1e-5)
    assert singular.diag().min() > 0.7
    assert singular.diag().max() < 1.3
