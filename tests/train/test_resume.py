"""A run that is stopped and started again ends with the bits of the run that never stopped."""

import pytest
from lightning.pytorch import Callback
from small_runs import BreakOff, BrokenOffError, checkpoint, differences, outcome, small_recipe, train

from effbackbones.cli import main
from effbackbones.config import RecipeError
from effbackbones.train.run import load_target

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

LIGHT = "model.args={head_dim: 16, dims: [16, 16, 32, 32], depths: [1, 1, 2, 1]}"


class BreakOffAtBatch(Callback):
    """Stops a run before a batch of an epoch, counted from 0."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            raise BrokenOffError


def broken_off(folder, overrides, *breaks):
    """Start the same run again and again, break it off in each of the given hooks in turn, then let it end."""
    for hook, step in breaks:
        with pytest.raises(BrokenOffError):
            train(small_recipe(folder, overrides), BreakOff(hook, step))
    return train(small_recipe(folder, overrides))


@pytest.mark.parametrize(
    ("save_every", "breaks"),
    [
        pytest.param(4, [("on_train_batch_start", 3)], id="before the first checkpoint"),
        pytest.param(4, [("on_train_batch_start", 9)], id="in an epoch"),
        pytest.param(5, [("on_train_batch_start", 5)], id="before the last batch of an epoch"),
        pytest.param(4, [("on_validation_start", 6)], id="before an evaluation"),
        pytest.param(4, [("on_validation_batch_end", 6)], id="in an evaluation"),
        pytest.param(4, [("on_train_epoch_end", 6)], id="after an evaluation"),
        pytest.param(4, [("on_train_batch_start", 6)], id="at the start of an epoch"),
        pytest.param(4, [("on_train_end", 12)], id="at the end"),
        pytest.param(1, [("on_train_batch_start", step) for step in (2, 5, 6, 10)], id="again and again"),
    ],
)
def test_run_stopped_anywhere_ends_like_the_one_that_never_stopped(uninterrupted, tmp_path, save_every, breaks):
    folder = broken_off(tmp_path / "run", [f"trainer.save_every={save_every}"], *breaks)
    assert differences(uninterrupted(), outcome(folder)) == []


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("ema.decay=0.9", "ema.warmup=true", "trainer.monitor=top1_ema"), id="averaged weights"),
        pytest.param(("augment.mixup=0.8", "augment.cutmix=1", "augment.smoothing=0.1"), id="mixup and cutmix"),
        pytest.param(("model.drop_path_rate=0.4", "model.drop_rate=0.3"), id="dropout and stochastic depth"),
        pytest.param(
            ("optim.layer_decay=0.7", "schedule.warmup_epochs=1", "optim.clip_grad=1"), id="layer decay and warm-up"
        ),
        pytest.param(("data.workers=2", "augment.repeats=2", "augment.erase=0.5"), id="loader processes"),
        pytest.param(("model.name=uniformer_xxs", LIGHT, "augment.policy=rand-m9-mstd0.5-inc1"), id="light model"),
        pytest.param(("model.name=uniformer_small_tl", "optim.name=sgd", "optim.momentum=0.9"), id="token labelling"),
        pytest.param(("trainer.limit_train=5", "trainer.val_every=2", "trainer.epochs=3"), id="limits"),
    ],
)
def test_run_with_a_feature_stopped_in_an_epoch_ends_like_the_one_that_never_stopped(
    uninterrupted, tmp_path, overrides
):
    folder = broken_off(tmp_path / "run", (*overrides, "trainer.save_every=4"), ("on_train_batch_start", 9))
    assert differences(uninterrupted(overrides), outcome(folder)) == []


def test_accumulating_run_is_never_saved_between_the_batches_of_a_step(uninterrupted, tmp_path):
    accumulate = ("trainer.accumulate=2",)
    saved_often = small_recipe(tmp_path / "run", (*accumulate, "trainer.save_every=1"))
    with pytest.raises(BrokenOffError):
        train(saved_often, BreakOff("on_train_batch_start", 2))
    with pytest.raises(BrokenOffError):
        train(saved_often, BreakOffAtBatch(5))  # the second of the third step
    folder = train(saved_often)
    assert differences(uninterrupted(accumulate), outcome(folder)) == []


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_start"])
@pytest.mark.parametrize("val_every", [1, 5])
def test_run_of_limited_steps_ends_with_its_evaluation_even_if_stopped(uninterrupted, tmp_path, hook, val_every):
    limits = ("trainer.steps=8", f"trainer.val_every={val_every}")
    step = 7 if hook == "on_train_batch_start" else 8
    folder = broken_off(tmp_path / "run", (*limits, "trainer.save_every=2"), (hook, step))
    assert differences(uninterrupted(limits), outcome(folder)) == []
    assert outcome(folder)["metrics"][-1].startswith("2,8,")
    assert outcome(folder)["metrics"][-1].count(",,") == 0


@pytest.mark.parametrize("overrides", [(), ("trainer.steps=8",), ("trainer.epochs=3", "trainer.val_every=2")])
def test_finished_run_started_again_changes_nothing_and_names_the_best(tmp_path, capsys, overrides):
    folder = train(small_recipe(tmp_path / "run", overrides))
    before = outcome(folder)
    contents = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    said = capsys.readouterr().out
    for _ in range(2):
        train(small_recipe(folder, overrides))
        assert differences(before, outcome(folder)) == []
        assert {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()} == contents
        best = [line for line in said.splitlines() if line.startswith("Best top1: ")]
        assert best
        assert best[0] in capsys.readouterr().out


# What may change


@pytest.fixture
def stopped(tmp_path):
    """A run folder whose run broke off after 9 steps."""
    with pytest.raises(BrokenOffError):
        train(small_recipe(tmp_path / "run", ["trainer.save_every=4"]), BreakOff("on_train_batch_start", 9))
    return tmp_path / "run"


def test_resuming_with_another_recipe_is_refused_naming_every_key(stopped):
    before = outcome(stopped)
    args = "model.args={head_dim: 16, dims: [16, 16, 32, 32], mlp_ratio: 2.0}"
    with pytest.raises(RecipeError) as refusal:
        train(small_recipe(stopped, ["optim.lr=0.01", "data.batch_size=2", args]))
    message = str(refusal.value)
    for line in (
        "optim.lr: 0.001 then, 0.01 now",
        "data.batch_size: 4 then, 2 now",
        "model.args.mlp_ratio: None then, 2.0 now",
        "run.force=true",
    ):
        assert line in message
    assert "model.args.dims" not in message
    assert differences(before, outcome(stopped)) == []


def test_resuming_without_an_argument_of_the_model_is_refused(stopped):
    recipe = small_recipe(stopped)
    del recipe.recipe.model.args["depths"]
    with pytest.raises(RecipeError, match=r"model\.args\.depths: \[1, 1, 1, 1\] then, None now"):
        train(recipe)


def test_command_that_is_refused_ends_with_code_2_and_the_reason(stopped, capsys):
    assert main(["train", str(stopped), "trainer.seed=1"]) == 2
    assert "trainer.seed: 0 then, 1 now" in capsys.readouterr().err


def test_resuming_with_other_means_gives_the_same_bits(uninterrupted, stopped, tmp_path):
    moved = tmp_path / "elsewhere"
    stopped.rename(moved)
    means = ["data.workers=1", "trainer.devices=1", "trainer.log_every=1", "trainer.save_every=1", "data.root=/images"]
    train(small_recipe(moved, [*means, "data.eval_batch_size=4", "trainer.strategy=auto"]))
    assert differences(uninterrupted(), outcome(moved)) == []


def test_forced_run_goes_on_with_the_new_settings(stopped):
    rates = []
    watch = BreakOff("on_train_batch_end", -1)
    watch.on_train_batch_start = lambda trainer, *args: rates.append(trainer.optimizers[0].param_groups[1].copy())
    recipe = ["run.force=true", "optim.lr=0.002", "optim.weight_decay=0.3", "trainer.epochs=3", "schedule.name=poly"]
    train(small_recipe(stopped, recipe), watch)
    # 18 steps in all, gone on with after 8
    assert [group["lr"] for group in rates] == pytest.approx([0.002 * (1 - step / 18) for step in range(8, 18)])
    assert {group["weight_decay"] for group in rates} == {0.3}
    assert checkpoint(stopped)["global_step"] == 18


def test_force_is_for_one_command(stopped):
    train(small_recipe(stopped, ["run.force=true", "trainer.epochs=3"]))
    with pytest.raises(RecipeError, match=r"optim\.lr"):
        train(load_target(str(stopped), ["optim.lr=0.1"]))
