"""Fine-tuning: where weights come from, what of a model is trained, and a folder of images as it is."""

import re
import socket
import time
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Callback
from PIL import Image
from small_runs import BreakOff, BrokenOffError, checkpoint, differences, outcome, small_recipe, train

from effbackbones.checkpoint import CheckpointError, load_weights
from effbackbones.cli import main
from effbackbones.config import RecipeError, load_recipe
from effbackbones.data import DataError
from effbackbones.data.folder import split_folder
from effbackbones.train.classification import build_model
from effbackbones.train.run import evaluate, open_data

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("this test has no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Watch(Callback):
    """The state before training, the modes in the last step, after an evaluation, and the optimizer at the end."""

    def on_fit_start(self, trainer, pl_module):
        self.before = {name: value.clone() for name, value in pl_module.model.state_dict().items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.resting = {name for name, module in pl_module.model.named_modules() if not module.training}

    def on_train_end(self, trainer, pl_module):
        after = pl_module.model.state_dict()
        self.changed = {name for name, value in self.before.items() if not torch.equal(value, after[name])}
        (optimizer,) = trainer.optimizers
        self.optimized = sum(len(group["params"]) for group in optimizer.param_groups)
        self.states = len(optimizer.state)


def below(names, *prefixes):
    return {name for name in names if name.startswith(prefixes)}


# What is trained


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_stages_stay_as_they_are_and_the_rest_is_trained(tmp_path, checkpointing):
    watch = Watch()
    overrides = ["model.frozen_stages=2", "model.drop_path_rate=0.2", "trainer.limit_train=2", "ema.decay=0.5"]
    train(small_recipe(tmp_path / "run", [*overrides, f"model.grad_checkpointing={checkpointing}"]), watch)
    frozen = ("stem.", "stages.0.", "stages.1.")
    assert below(watch.changed, *frozen) == set()
    assert watch.changed == set(watch.before) - below(watch.before, *frozen)
    assert below(watch.resting, "stem", "stages.0", "stages.1") == watch.resting
    assert {"stem", "stages.0.blocks.0.drop_path", "stages.1.blocks.0.norm1"} < watch.resting
    trained = [name for name, _ in build(tmp_path / "run").named_parameters() if not name.startswith(frozen)]
    assert watch.optimized == watch.states == len(trained)


def build(folder):
    recipe = small_recipe(folder).recipe
    return build_model(recipe, recipe.data.num_classes)


def test_linear_probe_trains_the_classifier_and_nothing_moves_in_the_rest(tmp_path):
    watch = Watch()
    overrides = ["model.linear_probe=true", "model.drop_path_rate=0.2", "trainer.limit_train=2"]
    folder = train(small_recipe(tmp_path / "run", overrides), watch)
    assert watch.changed == {"head.fc.weight", "head.fc.bias"}
    assert watch.optimized == watch.states == 2
    assert {"stem", "stages", "stages.3.blocks.0.drop_path", "norm"} < watch.resting
    assert "head.fc" not in watch.resting
    assert len(checkpoint(folder)["optimizer_states"][0]["state"]) == 2


def test_linear_probe_trains_each_classifier_of_a_model_with_two(tmp_path):
    args = "model.args={head_dim: 16, dims: [16, 16, 32, 32], depths: [1, 1, 2, 1]}"
    watch = Watch()
    overrides = ["model.name=uniformer_xxs", args, "model.linear_probe=true", "trainer.steps=2"]
    train(small_recipe(tmp_path / "run", overrides), watch)
    assert watch.changed
    assert {name.partition(".")[0] for name in watch.changed} == {"head", "head_cls"}


@pytest.mark.parametrize("what", ["model.linear_probe=true", "model.frozen_stages=1"])
def test_run_of_a_part_of_the_model_resumes_to_the_same_bits(tmp_path, what):
    overrides = [what, "model.drop_path_rate=0.3", "model.drop_rate=0.2", "ema.decay=0.9", "trainer.save_every=4"]
    whole = train(small_recipe(tmp_path / "whole", overrides))
    with pytest.raises(BrokenOffError):
        train(small_recipe(tmp_path / "run", overrides), BreakOff("on_train_batch_start", 9))
    assert differences(outcome(whole), outcome(train(small_recipe(tmp_path / "run", overrides)))) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.linear_probe=true", "model.frozen_stages=0"], r"model\.frozen_stages: has no effect beside"),
        (["model.linear_probe=true", "lora.rank=2"], r"lora\.rank: has no effect beside model\.linear_probe"),
        (["model.name=resnet18", "model.args={}", "model.frozen_stages=1"], "resnet18 is no model of the zoo"),
        (["task=detection", "model.linear_probe=true"], r"model\.linear_probe: has no effect in detection"),
    ],
)
def test_parts_that_cannot_be_trained_together_are_refused(tmp_path, overrides, message):
    with pytest.raises(RecipeError, match=message):
        small_recipe(tmp_path / "run", overrides)


# Where weights come from


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of 4 classes."""
    normal = ["data.mean=[0.3, 0.3, 0.3]", "data.std=[0.4, 0.4, 0.4]"]
    return train(small_recipe(tmp_path_factory.mktemp("pretrained") / "run", ["trainer.steps=2", *normal]))


@pytest.mark.parametrize(("classes", "fresh"), [(3, "; fresh: head.fc.*"), (4, "")])
def test_run_says_what_it_starts_from_and_what_is_fresh(tmp_path, pretrained, capsys, classes, fresh):
    overrides = [f"data.num_classes={classes}", f"model.checkpoint={pretrained}", "trainer.steps=1"]
    train(small_recipe(tmp_path / "run", overrides))
    best = pretrained / "checkpoints" / "best.ckpt"
    assert re.search(
        rf"^Started from {re.escape(str(best))}: \d+ tensors loaded{re.escape(fresh)}$",
        capsys.readouterr().out,
        re.MULTILINE,
    )


def test_run_without_weights_says_once_that_it_starts_from_scratch(tmp_path, capsys):
    train(small_recipe(tmp_path / "run", ["trainer.steps=1"]))
    assert capsys.readouterr().out.count("uniformer_small starts from scratch: model.checkpoint names no weights.") == 1
    train(small_recipe(tmp_path / "run", ["trainer.steps=1"]))
    assert "from scratch" not in capsys.readouterr().out


def test_normalisation_is_that_of_the_weights_where_the_recipe_says_nothing(tmp_path, pretrained):
    def normalisation(*overrides):
        data = small_recipe(tmp_path / "run", overrides).recipe.data
        return data.mean[0], data.std[0]

    assert normalisation() == (0.485, 0.229)
    assert normalisation(f"model.checkpoint={pretrained}") == (0.3, 0.4)
    assert normalisation(f"model.checkpoint={pretrained}", "data.mean=[0, 0, 0]") == (0, 0.4)
    other = ["model.args={}", "model.name=vit_tiny_patch16_224"]
    assert normalisation(*other) == (0.5, 0.5)
    clip = ["model.args={}", "model.name=vit_base_patch16_clip_224"]
    assert normalisation(*clip, "model.checkpoint=timm::vit_base_patch16_clip_224.openai")[0] == 0.48145466
    assert normalisation(*clip, "model.checkpoint=timm::no_such_model") == normalisation(*clip)


def test_origin_of_the_normalisation_is_shown(tmp_path, pretrained):
    origins = small_recipe(tmp_path / "run", [f"model.checkpoint={pretrained}", "data.std=[1, 1, 1]"]).origins
    assert (origins["data.mean"], origins["data.std"]) == ("weights", "command line")
    assert small_recipe(tmp_path / "run").origins["data.mean"] == "default"


def test_fine_tuned_run_keeps_the_normalisation_of_its_weights(tmp_path, pretrained):
    folder = train(small_recipe(tmp_path / "run", [f"model.checkpoint={pretrained}", "trainer.steps=1"]))
    assert load_recipe(folder / "recipe.yaml").recipe.data.mean == [0.3, 0.3, 0.3]


# Weights of timm's hub


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (
            "test_resnet",
            "resnet18.a1_in1k",
            r"no weights of test_resnet .*expected one of timm::test_resnet\.r160_in1k",
        ),
        ("test_resnet", "test_resnet.nothing", r"no weights of test_resnet .*expected one of timm::"),
        ("uniformer_xxs", "uniformer_xxs", r"no weights of uniformer_xxs in timm's hub; expected a file or a run"),
    ],
)
def test_hub_weights_of_another_model_or_none_are_refused(model, name, message):
    with pytest.raises(CheckpointError, match=rf"timm::{name}: {message}"):
        load_weights(timm.create_model(model, num_classes=3), f"timm::{name}")


def test_hub_weights_without_a_network_are_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client tries again and again
    with pytest.raises(CheckpointError, match=r"timm::test_resnet: cannot be fetched .*fetch the file elsewhere"):
        load_weights(timm.create_model("test_resnet"), "timm::test_resnet")


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k"])
def test_hub_weights_are_those_that_timm_fetches(monkeypatch, tmp_path, name):
    hub = timm.create_model("test_resnet")
    fetched = []

    def fetch(model_id, *args, **kwargs):
        fetched.append(model_id)
        return hub.state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fetch)
    model = timm.create_model("test_resnet", num_classes=3)
    loaded = load_weights(model, f"timm::{name}")
    assert fetched == ["timm/test_resnet.r160_in1k"]
    assert str(loaded).startswith(f"Started from timm::{name}: ")
    assert str(loaded).endswith("; fresh: fc.*")
    different = [key for key, value in model.state_dict().items() if not value.equal(hub.state_dict()[key])]
    assert different == ["fc.weight", "fc.bias"]


# A folder of one's own


@pytest.fixture
def images(tmp_path):
    """Folders of three classes with 4, 11 and 20 images, told by their brightness."""
    noise = np.random.default_rng(0)
    for number, (name, count) in enumerate({"dark": 4, "grey": 11, "light": 20}.items()):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = 100 * number + noise.integers(0, 40, (40, 32, 3), np.uint8)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


SMALL = [
    "model.args={head_dim: 16, dims: [16, 16, 32, 32], depths: [1, 1, 1, 1]}",
    *("data.size=32", "data.workers=0", "trainer.accelerator=cpu", "trainer.epochs=2", "schedule.warmup_epochs=0"),
]


def test_folder_of_classes_is_all_that_fine_tuning_needs(tmp_path, images, pretrained, capsys):
    folder = tmp_path / "run"
    overrides = [f"data.root={images}", f"model.checkpoint={pretrained}", f"run.dir={folder}", *SMALL]
    assert main(["train", "finetune/folder", *overrides]) == 0
    out = capsys.readouterr().out
    assert "; fresh: head.fc.*" in out
    assert "Batches of 30 per device instead, as the training set has 31 images (data.shrink_batch).\n" in out
    saved = checkpoint(folder)
    assert saved["classes"] == ["dark", "grey", "light"]
    assert saved["state_dict"]["model.head.fc.weight"].shape[0] == 3
    assert saved["global_step"] == 2  # fewer images than a batch: one step for each epoch
    assert 0 <= evaluate(str(folder))["top1"] <= 1
    assert main(["predict", str(images / "dark" / "0.png"), "--run", str(folder)]) == 0
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]} >= {"dark", "grey", "light"}


def test_folder_of_classes_is_split_by_class_and_always_in_the_same_way(images):
    train, val = split_folder(images, 0.25)
    assert train.classes == val.classes == ["dark", "grey", "light"]
    assert Counter(target for _, target in val) == {0: 1, 1: 3, 2: 5}
    assert Counter(target for _, target in train) == {0: 3, 1: 8, 2: 15}
    shown = [np.asarray(image).tobytes() for part in (train, val) for image, _ in part]
    assert len(set(shown)) == len(shown) == 35
    assert [np.asarray(image).tobytes() for part in split_folder(images, 0.25) for image, _ in part] == shown
    assert Counter(target for _, target in split_folder(images, 0.01)[1]) == {0: 1, 1: 1, 2: 1}
    assert Counter(target for _, target in split_folder(images, 0.9)[0]) == {0: 1, 1: 1, 2: 2}


def test_class_of_one_image_cannot_be_split(images):
    for path in sorted((images / "dark").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match=r"dark: 1 images, expected at least 2, to train on one and evaluate the other"):
        split_folder(images, 0.1)


@pytest.mark.parametrize(("batch", "expected"), [(40, 26), (8, 8)])
def test_batch_is_no_larger_than_the_training_set(tmp_path, batch, expected):
    overrides = ["data.shrink_batch=true", f"data.batch_size={batch}"]
    data = open_data(small_recipe(tmp_path / "run", overrides).recipe)
    images, _ = next(iter(data.train_dataloader()))
    assert len(images) == expected


def test_folder_with_train_and_val_is_taken_as_it_is_split(tmp_path, images):
    for split in ("train", "val"):
        (tmp_path / "split" / split).mkdir(parents=True)
        for name in ("dark", "light"):
            (tmp_path / "split" / split / name).symlink_to(images / name)
    overrides = [f"data.root={tmp_path / 'split'}", f"run.dir={tmp_path / 'run'}", *SMALL, "trainer.epochs=1"]
    folder = train(load_recipe("finetune/folder", overrides))
    assert checkpoint(folder)["classes"] == ["dark", "light"]
