"""What evaluations say, against a direct computation over all images."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from PIL import Image
from small_runs import checkpoint, small_recipe, train

from effbackbones.checkpoint import strip_wrappers
from effbackbones.data import build_data
from effbackbones.train.classification import build_model
from effbackbones.train.run import evaluate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

CLASSES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with averaged weights on an image folder: 40 images to train on, 23 to evaluate, 3 of which are broken."""
    root = tmp_path_factory.mktemp("data")
    pixels = torch.Generator().manual_seed(0)
    for split, images in (("train", 40), ("val", 23)):
        for i in range(images):
            path = root / "images" / split / f"class{i % CLASSES}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(torch.randint(256, (32, 32, 3), generator=pixels, dtype=torch.uint8).numpy()).save(path)
    for i in (0, 5, 17):
        path = root / "images" / "val" / f"class{i % CLASSES}" / f"{i}.png"
        path.write_bytes(path.read_bytes()[:100])
    overrides = [
        "data.source=folder",
        f"data.root={root / 'images'}",
        "data.num_classes=null",
        "data.on_bad_image=skip",
        "data.eval_batch_size=5",
        "ema.decay=0.9",
        "trainer.epochs=1",
    ]
    return train(small_recipe(root / "run", overrides))


def logged(folder):
    *_, last = csv.DictReader((folder / "metrics.csv").open())
    return {name.removeprefix("val/"): float(value) for name, value in last.items() if name.startswith("val/")}


@torch.no_grad()
def direct(folder, ema=False):
    """Return the metrics of the last weights of a run, image by image."""
    recipe = small_recipe(folder, [f"data.root={folder.parent / 'images'}", "data.on_bad_image=skip"]).recipe
    recipe.data.source, recipe.data.num_classes = "folder", None
    data = build_data(recipe.data, recipe.augment, seed=0)
    model = build_model(recipe, CLASSES)
    model.load_state_dict(strip_wrappers(checkpoint(folder), ema))
    model.eval()
    images, targets = zip(*(data.val_dataset[i] for i in range(len(data.val_dataset))), strict=True)
    kept = [i for i, target in enumerate(targets) if target >= 0]
    assert len(kept) == 20
    logits = torch.cat([model(images[i][None]) for i in kept])
    targets = torch.tensor([targets[i] for i in kept])
    places = (logits > logits.gather(1, targets[:, None])).sum(1)  # how many classes are before the right one
    metrics = {f"top{k}": (places < k).float().mean().item() for k in (1, 5)}
    return {**metrics, "loss": F.cross_entropy(logits, targets).item()}


def test_metrics_are_those_of_all_readable_images_whatever_their_batches(folder):
    found = logged(folder)
    assert 0 < found["top1"] < found["top5"] < 1
    expected = direct(folder)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_averaged_weights_have_metrics_of_their_own(folder):
    found, expected = logged(folder), direct(folder, ema=True)
    assert {name: found[f"{name}_ema"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found["loss_ema"] != found["loss"]


@pytest.mark.parametrize(("batch_size", "monitor"), [(1, "top1"), (7, "top1"), (23, "top1_ema")])
def test_evaluating_the_run_gives_the_metrics_of_the_weights_it_monitored(folder, batch_size, monitor):
    found = evaluate(str(folder), [f"data.eval_batch_size={batch_size}", f"trainer.monitor={monitor}"])
    assert found == pytest.approx(direct(folder, ema=monitor == "top1_ema"), rel=1e-5)


def test_evaluation_leaves_the_run_folder_as_it_was(folder):
    def listing():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    before = listing()
    evaluate(str(folder))
    assert listing() == before


class BrokenHead(Callback):
    """Makes the model say nan to one image of every evaluation."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            batch[0][0] = math.nan


def test_loss_that_is_not_a_number_is_not_hidden_and_never_the_best(tmp_path):
    folder = train(small_recipe(tmp_path / "run", ["trainer.epochs=1", "trainer.monitor=loss"]), BrokenHead())
    assert math.isnan(logged(folder)["loss"])
    assert not (folder / "checkpoints" / "best.ckpt").exists()
    assert evaluate(str(folder))["loss"] > 0  # of the last checkpoint, where there is no best


def test_frozen_batch_norms_keep_their_statistics_through_evaluations(tmp_path):
    folder = train(small_recipe(tmp_path / "run", ["model.norm_eval=true"]))
    weights = checkpoint(folder)["state_dict"]
    statistics = {name: value for name, value in weights.items() if "running_" in name}
    assert statistics
    for name, value in statistics.items():
        assert torch.equal(value, torch.full_like(value, name.endswith("var"))), name


class Averages(Callback):
    """A running average kept by hand."""

    def __init__(self, decay):
        self.decay = decay

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = {name: value.detach().clone() for name, value in pl_module.model.named_parameters()}
        if trainer.global_step == 1:
            self.weights = weights
        for name, value in weights.items():
            self.weights[name].lerp_(value, 1 - self.decay)


def test_averaged_weights_follow_the_weights_after_every_step(tmp_path):
    averages = Averages(0.8)
    folder = train(small_recipe(tmp_path / "run", ["ema.decay=0.8", "trainer.epochs=1"]), averages)
    found = strip_wrappers(checkpoint(folder), ema=True)
    for name, value in averages.weights.items():
        torch.testing.assert_close(found[name], value)
