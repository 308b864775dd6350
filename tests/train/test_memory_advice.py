"""Where memory does not suffice, the error names the step, the estimate, and what helps most."""

import re

import pytest
import torch
from lightning.pytorch import Callback
from small_runs import small_recipe, train

from effbackbones import plan
from effbackbones.cli import main
from effbackbones.train.callbacks.memory import MemoryLimitError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def from_torch():
    torch.empty(1 << 58)


def from_python():
    bytearray(1 << 62)


def from_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")


def out_of_memory(folder, overrides=(), hook="on_train_batch_start", step=3, error=from_cuda):
    """Return the lines that a run says whose memory does not suffice in a hook after some steps."""
    fail = Callback()
    setattr(fail, hook, lambda trainer, *args: error() if trainer.global_step == step else None)
    with pytest.raises(MemoryLimitError) as stop:
        train(small_recipe(folder, overrides), fail)
    return str(stop.value).splitlines()


@pytest.mark.parametrize(
    ("error", "reason"),
    [(from_torch, "can't allocate memory"), (from_python, "MemoryError"), (from_cuda, "CUDA out of memory. Tried")],
)
def test_error_names_the_step_the_reason_and_the_estimate(tmp_path, monkeypatch, error, reason):
    def estimate_memory(recipe, world, classes):
        assert (world, classes) == (1, 4)
        return plan.MemoryPlan(recipe.data.batch_size << 30, 0, 0, 0, 0, 0)

    monkeypatch.setattr(plan, "estimate_memory", estimate_memory)
    first, *rest = out_of_memory(tmp_path / "run", error=error)
    assert first.startswith("rank 0, epoch 1, step 4: out of memory: ")
    assert reason in first
    assert rest == [
        "A training step is estimated to take 4.00 GiB a device: weights 4.00 GiB.",
        "What helps most:",
        "  data.batch_size=2 trainer.accumulate=2  2.00 GiB a device",
        "A run that has begun goes on with other settings by run.force=true.",
    ]


def test_settings_are_those_that_save_most_by_the_estimate_in_that_order(tmp_path):
    overrides = ("ema.decay=0.9", "data.batch_size=8")
    _, estimate, _, *lines, _ = out_of_memory(tmp_path / "run", overrides)
    found = [re.fullmatch(r"  (\S.*\S)  +(\S+) (GiB|MiB) a device", line) for line in lines]
    assert len(found) == 3
    sizes = []
    for match in found:
        assert match
        recipe = small_recipe(tmp_path / "run", (*overrides, *match[1].split())).recipe
        total = plan.estimate_memory(recipe, 1, 4).total
        assert f"{match[2]} {match[3]}" == plan.gib(total)
        sizes.append(total)
    assert sizes == sorted(sizes)
    before = plan.estimate_memory(small_recipe(tmp_path / "run", overrides).recipe, 1, 4)
    assert estimate == f"A training step is estimated to take {before}."
    assert sizes[-1] < before.total


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        (
            ("data.batch_size=8",),
            ["model.grad_checkpointing=true", "data.batch_size=4 trainer.accumulate=2", "trainer.precision=bf16"],
        ),
        (
            ("data.global_batch=8", "trainer.precision=bf16", "data.size=64"),
            ["model.grad_checkpointing=true", "trainer.accumulate=2", "data.size=32"],
        ),
        (
            ("data.batch_size=2", "augment.mixup=0.8", "model.grad_checkpointing=true", "data.size=96"),
            ["trainer.precision=bf16", "data.size=64"],
        ),
        (
            ("data.batch_size=1", "ema.decay=0.9", "trainer.monitor=top1_ema"),  # which needs the average
            ["model.grad_checkpointing=true", "trainer.precision=bf16"],
        ),
    ],
)
def test_settings_are_possible_ones_where_nothing_can_be_estimated(tmp_path, monkeypatch, overrides, settings):
    def fail(*args):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(plan, "estimate_memory", fail)
    lines = out_of_memory(tmp_path / "run", overrides, step=0)
    assert lines[1] == "There is no estimate: RuntimeError: no such operator"
    assert [line.strip() for line in lines[3:-1]] == settings


def test_evaluation_is_told_to_take_fewer_images(tmp_path):
    lines = out_of_memory(tmp_path / "run", hook="on_validation_batch_start", step=6)
    assert lines[0].startswith("rank 0, evaluation at step 6: out of memory: ")
    assert lines[3] == "  data.eval_batch_size=2"


def test_other_errors_stay_as_they_are(tmp_path):
    fail = Callback()

    def on_train_batch_start(*args):
        raise RuntimeError("something else")

    fail.on_train_batch_start = on_train_batch_start
    with pytest.raises(RuntimeError, match="something else") as error:
        train(small_recipe(tmp_path / "run"), fail)
    assert type(error.value) is RuntimeError


def test_command_ends_with_code_2_and_the_advice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "effbackbones.train.classification.ClassificationModule.validation_step", lambda *_: from_cuda()
    )
    recipe = small_recipe(tmp_path / "run").path
    assert main(["train", str(recipe), f"run.dir={tmp_path / 'run'}", "trainer.steps=1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("effb train: rank 0, evaluation at step 1: out of memory: CUDA out of memory.")
    assert "data.eval_batch_size=2" in message
