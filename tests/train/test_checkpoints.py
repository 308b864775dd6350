"""What the checkpoints of a run hold, and how they are loaded elsewhere."""

import copy
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from small_runs import checkpoint, small_recipe, train
from torch import Tensor

import effbackbones  # noqa: F401  (registers the models)
from effbackbones.checkpoint import load_weights, strip_wrappers
from effbackbones.config import load_recipe
from effbackbones.train.callbacks.checkpoints import RunCheckpoints

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

CLASSES = [f"class {i}" for i in range(4)]
ARGS: dict[str, Any] = {"head_dim": 16, "dims": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}


class Evaluations(Callback):
    """The scores of all evaluations and the weights they are of."""

    def __init__(self):
        self.scores, self.weights = [], []

    def on_validation_end(self, trainer, pl_module):
        self.scores.append(float(trainer.callback_metrics["val/loss"]))
        self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose best evaluation, by its loss, is not the last: its folder and its evaluations."""
    evaluations = Evaluations()
    # The rate rises to one that destroys the weights.
    rates = ["schedule.warmup_epochs=4", "schedule.warmup_lr=0", "optim.lr=0.3"]
    overrides = ["trainer.epochs=4", "trainer.monitor=loss", "ema.decay=0.5", *rates]
    return train(small_recipe(tmp_path_factory.mktemp("run") / "run", overrides), evaluations), evaluations


def types_in(value: Any) -> Iterator[type]:
    yield type(value)
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, entry in entries:
        yield type(key)
        yield from types_in(entry)


@pytest.mark.parametrize("name", ["last", "best"])
def test_checkpoint_holds_plain_types_and_says_what_it_is_of(run, name):
    folder, _ = run
    saved = checkpoint(folder, name)
    dictionaries = {kind for kind in types_in(saved) if issubclass(kind, dict)}
    assert set(types_in(saved)) - dictionaries <= {int, float, bool, str, list, tuple, type(None), Tensor}
    assert saved["classes"] == CLASSES
    assert saved["recipe"] == (folder / "recipe.yaml").read_text()


def test_last_checkpoint_holds_the_last_step_and_the_best_score(run):
    folder, evaluations = run
    saved = checkpoint(folder)
    assert saved["global_step"] == 24
    assert {"best_score": min(evaluations.scores), "evaluation_due": False} in saved["callbacks"].values()


def test_best_checkpoint_holds_the_weights_of_the_best_evaluation(run):
    folder, evaluations = run
    best = evaluations.scores.index(min(evaluations.scores))
    assert best < len(evaluations.scores) - 1
    saved = checkpoint(folder, "best")["state_dict"]
    assert saved.keys() == evaluations.weights[best].keys()
    assert all(torch.equal(saved[name], value) for name, value in evaluations.weights[best].items())


def test_best_checkpoint_has_no_state_of_the_optimizer(run):
    folder, _ = run
    assert "optimizer_states" not in checkpoint(folder, "best")


def test_best_checkpoint_loads_through_timm(run):
    folder, _ = run
    path = folder / "checkpoints" / "best.ckpt"
    overlay = {"file": str(path), "num_classes": 4}
    model = timm.create_model("uniformer_small", pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay, **ARGS)
    assert same_weights(model, checkpoint(folder, "best"))
    features = timm.create_model(
        "uniformer_small", pretrained=True, features_only=True, pretrained_cfg_overlay=overlay, **ARGS
    )
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(features.eval()(images)[3], model.eval().forward_features(images))


@pytest.mark.parametrize("ema", [False, True])
def test_run_folder_loads_as_weights(run, ema):
    folder, _ = run
    model = timm.create_model("uniformer_small", num_classes=4, **ARGS)
    load_weights(model, folder, ema)
    assert same_weights(model, checkpoint(folder, "best"), ema)
    assert not same_weights(model, checkpoint(folder, "best"), not ema)


def test_run_starts_from_the_weights_of_another(run, tmp_path):
    folder, _ = run
    start = {}
    look = Callback()
    look.on_train_start = lambda trainer, module: start.update(copy.deepcopy(module.state_dict()))
    train(small_recipe(tmp_path / "run", [f"model.checkpoint={folder}", "ema.decay=0.9", "trainer.steps=1"]), look)
    best = strip_wrappers(checkpoint(folder, "best"))
    for prefix in ("model.", "ema.module."):
        assert all(torch.equal(start[f"{prefix}{name}"], value) for name, value in best.items())


def test_recipe_in_a_checkpoint_reads_back(run, tmp_path):
    folder, _ = run
    path = tmp_path / "recipe.yaml"
    path.write_text(checkpoint(folder, "best")["recipe"])
    assert load_recipe(path).recipe == load_recipe(folder / "recipe.yaml").recipe


def same_weights(model: torch.nn.Module, saved: dict[str, Any], ema: bool = False) -> bool:
    weights = strip_wrappers(saved, ema)
    own = model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[name], value) for name, value in weights.items())


# Which evaluation is the best


class Scores:
    """A trainer that only evaluates; it notes at which evaluations the best checkpoint was to be written.

    At those that are `full`, the disk is: nothing can be written.
    """

    def __init__(self, folder, monitor, scores, full=()):
        self.state = SimpleNamespace(fn=TrainerFn.FITTING)
        self.strategy = SimpleNamespace(checkpoint_io=SimpleNamespace(complete=True), broadcast=lambda value: value)
        self.callback_metrics, self.global_step, self.best, self.full = {}, 0, [], full
        checkpoints = RunCheckpoints(folder, monitor)
        for score in scores:
            self.global_step += 1
            self.callback_metrics[monitor] = torch.tensor(score)
            checkpoints.on_validation_end(self, None)

    def save_checkpoint(self, path, weights_only=False):
        self.strategy.checkpoint_io.complete = self.global_step not in self.full
        if path.name == "best.ckpt":
            assert weights_only
            self.best.append(self.global_step)


@pytest.mark.parametrize(
    ("monitor", "scores", "best"),
    [
        ("val/top1", [0.1, 0.3, 0.3, 0.2, 0.4], [1, 2, 5]),
        ("val/top1_ema", [0.4, 0.3], [1]),
        ("val/loss", [2.0, 1.0, 1.0, 1.5, 0.5], [1, 2, 5]),
        ("val/loss", [math.nan, 2.0, math.nan, 1.0], [2, 4]),
    ],
)
def test_best_is_the_first_of_the_highest_scores_or_of_the_lowest_losses(tmp_path, monitor, scores, best):
    assert Scores(tmp_path, monitor, scores).best == best


def test_best_that_found_no_room_leaves_its_place_to_the_next(tmp_path):
    assert Scores(tmp_path, "val/top1", [0.1, 0.4, 0.3, 0.2], full=[2]).best == [1, 2, 3]
