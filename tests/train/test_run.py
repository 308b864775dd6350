"""A run from its recipe to its closing words, and what it leaves in its folder."""

import csv

import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from small_runs import checkpoint, repeated_metrics, small_recipe, train

from effbackbones.cli import main
from effbackbones.config import load_recipe
from effbackbones.train import classification
from effbackbones.train.logger import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train(small_recipe(tmp_path_factory.mktemp("run") / "run"), pictures=True)


def test_run_folder_holds_pictures_tables_and_checkpoints(folder):
    names = {"checkpoints", "curves.png", "metrics.csv", "predictions.png", "recipe.yaml"}
    assert {path.name for path in folder.iterdir()} - {"tensorboard"} == names
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    for name in ("curves.png", "predictions.png"):
        with Image.open(folder / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**20)) > 10


def test_recipe_in_the_run_folder_reads_back_equal(folder):
    assert load_recipe(folder / "recipe.yaml").recipe == small_recipe(folder).recipe


def test_metrics_have_a_row_per_step_and_the_evaluations_at_the_ends_of_epochs(folder):
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(row["epoch"], row["step"]) for row in rows] == [(str(1 + i // 6), str(1 + i)) for i in range(12)]
    assert all(float(row["train/loss"]) > 0 and float(row["lr"]) > 0 for row in rows)
    assert [row["step"] for row in rows if row["val/top1"]] == ["6", "12"]


def test_metrics_have_the_speed_of_every_step_but_the_first_and_the_wait_for_data(folder):
    rows = read_metrics(folder / "metrics.csv")
    timed = [row for row in rows if "train/images_per_second" in row]
    assert [row["step"] for row in timed] == list(range(2, 13))
    assert all(row["train/images_per_second"] > 0 and 0 < row["train/data_wait"] < 1 for row in timed)


def test_metrics_have_a_row_every_so_many_steps_and_of_the_last_step_and_are_logged_for_these_alone(
    tmp_path, monkeypatch
):
    logged, log_dict = [], LightningModule.log_dict
    monkeypatch.setattr(
        LightningModule, "log_dict", lambda self, values: logged.append(set(values)) or log_dict(self, values)
    )
    folder = train(small_recipe(tmp_path / "run", ["trainer.steps=6", "trainer.log_every=4"]))
    assert [names for names in logged if "lr" in names] == [{"train/loss", "lr"}] * 2
    rows = read_metrics(folder / "metrics.csv")
    assert [row["step"] for row in rows] == [4, 6]
    assert all(row["train/loss"] > 0 and row["lr"] > 0 for row in rows)


def test_run_ends_with_an_evaluation_whatever_the_interval_of_evaluations(tmp_path):
    folder = train(small_recipe(tmp_path / "run", ["trainer.epochs=3", "trainer.val_every=2"]))
    evaluated = [row["epoch"] for row in read_metrics(folder / "metrics.csv") if "val/top1" in row]
    assert evaluated == [2, 3]


def test_rows_of_metrics_are_as_far_apart_as_the_recipe_says(tmp_path):
    folder = train(small_recipe(tmp_path / "run", ["trainer.log_every=3"]))
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["3", "6", "9", "12"]


def test_run_without_an_option_goes_into_a_folder_named_after_its_recipe(tmp_path, monkeypatch):
    loaded = small_recipe(tmp_path / "run", ["trainer.steps=1"])
    loaded.recipe.run.dir = None
    monkeypatch.chdir(tmp_path)
    assert str(train(loaded)) == "runs/small"
    assert (tmp_path / "runs" / "small" / "checkpoints" / "last.ckpt").is_file()


def test_closing_words_name_the_best_and_what_to_do_next(tmp_path, capsys):
    folder = train(small_recipe(tmp_path / "run"))
    rows = csv.DictReader((folder / "metrics.csv").open())
    best = max(float(row["val/top1"]) for row in rows if row["val/top1"])
    words = capsys.readouterr().out
    assert f"Best top1: {100 * best:.2f}%\n  checkpoint  {folder}/checkpoints/best.ckpt\n" in words
    assert f"effb eval {folder}" in words
    assert "skipped" not in words


def test_small_run_with_the_same_seed_is_the_same_and_with_another_is_not(tmp_path):
    one, same, other = (
        train(small_recipe(tmp_path / name, ["trainer.steps=2", f"trainer.seed={seed}"]))
        for name, seed in (("one", 3), ("same", 3), ("other", 4))
    )
    assert repeated_metrics(one) == repeated_metrics(same) != repeated_metrics(other)


@pytest.mark.parametrize(
    ("option", "tolerance"),
    [("model.grad_checkpointing=true", 1e-6), ("model.channels_last=true", 1e-4), ("trainer.precision=bf16", 0.05)],
)
def test_option_of_the_computation_changes_no_more_than_the_rounding(tmp_path, option, tolerance):
    def losses(folder):
        return [float(row["train/loss"]) for row in csv.DictReader((folder / "metrics.csv").open())]

    recipe = ["model.drop_path_rate=0.3", "trainer.steps=3"]
    plain = losses(train(small_recipe(tmp_path / "plain", recipe)))
    assert losses(train(small_recipe(tmp_path / "option", [*recipe, option]))) == pytest.approx(plain, rel=tolerance)


def test_model_learns_one_batch_by_heart(tmp_path):
    overrides = [f"run.dir={tmp_path / 'run'}", "trainer.epochs=1", "data.batch_size=16"]
    folder = train(load_recipe("debug/overfit_batch", overrides))
    *_, last = csv.DictReader((folder / "metrics.csv").open())
    assert last["step"] == "20"
    assert float(last["train/loss"]) < 0.05
    assert float(last["val/top1"]) == 1


# Images that cannot be read


@pytest.fixture
def images(tmp_path):
    """An image folder of two classes, with a broken image to train on and one to evaluate."""
    pixels = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for i in range(10):
            path = tmp_path / "images" / split / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(torch.randint(256, (32, 32, 3), generator=pixels, dtype=torch.uint8).numpy()).save(path)
        path.write_bytes(b"not an image")
    return tmp_path / "images"


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_images_are_counted_in_the_closing_words(tmp_path, images, capsys, workers):
    source = ["data.source=folder", f"data.root={images}", "data.num_classes=null", f"data.workers={workers}"]
    limits = ["data.on_bad_image=skip", "trainer.epochs=2", "data.batch_size=5"]
    train(small_recipe(tmp_path / "run", [*source, *limits]))
    assert "  skipped     2 images that could not be read\n" in capsys.readouterr().out


def test_picture_of_predictions_has_readable_images_of_all_classes_in_turn(tmp_path, images, monkeypatch):
    drawn = []
    monkeypatch.setattr(classification, "draw_predictions", lambda *args, **kwargs: drawn.append(args[3].tolist()))
    source = ["data.source=folder", f"data.root={images}", "data.num_classes=null", "data.on_bad_image=skip"]
    train(small_recipe(tmp_path / "run", [*source, "trainer.steps=1"]), pictures=True)
    (targets,) = drawn
    assert sorted(targets) == [0] * 5 + [1] * 4
    assert targets != sorted(targets)


@pytest.mark.parametrize("workers", [0, 1])
def test_command_ends_with_the_name_of_an_image_that_cannot_be_read(tmp_path, images, capsys, workers):
    recipe = small_recipe(tmp_path / "run").path
    source = ["data.source=folder", f"data.root={images}", "data.num_classes=null", f"data.workers={workers}"]
    assert main(["train", str(recipe), f"run.dir={tmp_path / 'run'}", *source, "data.batch_size=10"]) == 2
    message = capsys.readouterr().err
    assert str(images / "train" / "class1" / "9.png") in message
    assert "data.on_bad_image=skip" in message


def test_run_started_again_says_where_it_goes_on(tmp_path, capsys):
    folder = train(small_recipe(tmp_path / "run", ["trainer.save_every=5", "trainer.steps=12"]))
    assert checkpoint(folder)["global_step"] == 12
    capsys.readouterr()
    train(small_recipe(folder, ["trainer.save_every=5", "trainer.steps=12"]))
    assert f"Resuming {folder} at step 12." in capsys.readouterr().out
