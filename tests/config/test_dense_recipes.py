"""Recipes of detection and segmentation, and the mm configs beside them: what they name exists, their numbers agree."""

import re
from functools import cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

import pytest
import timm
import torch

from effbackbones.assets import asset_dir
from effbackbones.config import load_recipe

RECIPES = asset_dir("recipes")
NAMES = [f"{kind}/{path.stem}" for kind in ("coco", "ade20k") for path in sorted((RECIPES / kind).glob("*.yaml"))]
CONFIGS = {path.stem: path for path in sorted((RECIPES / "mm").glob("*.py")) if not path.stem.startswith("scenes_")}
FAMILIES = {"uniformer", "gc_vit", "transnext", "sg_former", "stvit", "stvit_r", "s2aformer"}
DEVICES = 8
ADE20K_IMAGES = 20_210
# Parts of names that only heads have.
HEAD_PARTS = {".bn.", ".gn.", "query_embed", "query_feat", "level_embed"}


def header(name):
    """Return the fields of a recipe's header, by name."""
    lines = takewhile(lambda line: line.startswith("#"), (RECIPES / f"{name}.yaml").read_text().splitlines())
    fields = re.split(r"^ (?=[A-Z][a-z ]+:)", "\n".join(line[1:] for line in lines), flags=re.MULTILINE)
    return {key: " ".join(text.split()) for key, _, text in (field.partition(":") for field in fields[1:])}


def step_images(recipe):
    return recipe.data.batch_size * DEVICES * recipe.trainer.accumulate


@cache
def load(name):
    return load_recipe(name).recipe


@cache
def build(name):
    """Return the backbone of a recipe, without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model(load(name).model.name, dense=True, **load(name).model.args)


def families(models):
    return {timm.model_entrypoint(model).__module__.rpartition(".")[2] for model in models}


@pytest.mark.parametrize("name", NAMES)
def test_dense_recipe_is_of_its_datasets_task(name):
    recipe = load(name)
    task, package = {"coco": ("detection", "mmdet"), "ade20k": ("segmentation", "mmseg")}[recipe.data.source]
    assert name.startswith(f"{recipe.data.source}/")
    assert recipe.task == task
    assert recipe.model.head.startswith(f"{package}::")


@pytest.mark.parametrize("name", NAMES)
def test_dense_recipe_header_tells_how_to_run_and_where_settings_come_from(name):
    recipe, fields = load(name), header(name)
    assert {"Command", "Hardware", "Time", "Expect", "Start from", "Settings"} <= fields.keys()
    assert f"trainer.devices={DEVICES}" in fields["Command"]
    assert f"/{recipe.model.name}.pth" in fields["Command"]
    assert f"must be {step_images(recipe)}," in fields["Hardware"]
    assert fields["Settings"].startswith(("as published", "those published", "our proposal"))
    assert re.search(r"\d\d\.\d|nothing published", fields["Expect"])


@pytest.mark.parametrize("name", NAMES)
def test_dense_recipe_names_a_head_that_is_installed(name):
    package, _, file = load(name).model.head.partition("::")
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: it comes with the mm extra")
    assert (Path(spec.submodule_search_locations[0]) / ".mim" / "configs" / file).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_dense_recipe_steps_and_epochs_agree(name):
    recipe = load(name)
    schedule, trainer = recipe.schedule, recipe.trainer
    if recipe.task == "detection":
        assert trainer.steps is None
        expected = [11] if "dino" in name else {12: [8, 11], 36: [27, 33]}[trainer.epochs]
        assert schedule.milestones == expected
    else:
        epoch = ADE20K_IMAGES // step_images(recipe)
        assert (trainer.epochs - 1) * epoch < trainer.steps <= trainer.epochs * epoch
        assert 8_000 <= trainer.val_every * epoch <= 17_000
    if schedule.warmup_steps is not None:
        assert schedule.warmup_lr < recipe.optim.lr


@pytest.mark.parametrize("name", NAMES)
def test_dense_recipe_exempts_parameters_that_are_there(name):
    recipe = load(name)
    names = [name for name, _ in build(name).named_parameters()]
    parts = set(recipe.optim.no_decay or ()) - HEAD_PARTS
    assert [part for part in parts if not any(part in name for name in names)] == []


@pytest.mark.parametrize("head", ["coco/mask_rcnn_1x", "ade20k/semantic_fpn", "ade20k/upernet"])
def test_every_family_has_recipes_of_the_common_heads(head):
    assert families(name.removeprefix(f"{head}_") for name in NAMES if name.startswith(head)) == FAMILIES


def load_config(name):
    mmengine_config = pytest.importorskip("mmengine.config", reason="mmengine comes with the mm extra")
    for package in ("mmdet", "mmseg"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: it comes with the mm extra")
    return mmengine_config.Config.fromfile(CONFIGS[name], import_custom_modules=False)


def recipe_beside(name):
    (recipe,) = (other for other in NAMES if other.partition("/")[2] == name)
    return recipe


@pytest.mark.parametrize("name", CONFIGS)
def test_mm_config_takes_the_widths_of_its_backbone(name):
    config = load_config(name)
    widths = [build(recipe_beside(name)).feature_info[i]["num_chs"] for i in config.model.backbone.out_indices]
    assert config.custom_imports.imports == ["effbackbones.mm"]
    assert config.model.backbone.type == "EffBackbone"
    assert config.model.get("neck", config.model.get("decode_head")).in_channels == widths
    if "auxiliary_head" in config.model:
        assert config.model.auxiliary_head.in_channels == widths[config.model.auxiliary_head.in_index]


@pytest.mark.parametrize("name", CONFIGS)
def test_mm_config_has_the_settings_of_its_recipe(name):
    config, recipe = load_config(name), load(recipe_beside(name))
    backbone, wrapper, optim = dict(config.model.backbone), config.optim_wrapper, recipe.optim
    assert backbone == {
        "type": "EffBackbone",
        "model": recipe.model.name,
        "out_indices": (1, 2, 3) if name.startswith("retinanet") else (0, 1, 2, 3),
        "checkpoint": None,
        "drop_path_rate": recipe.model.drop_path_rate,
        **({"norm_eval": True} if recipe.model.norm_eval else {}),
        **recipe.model.args,
    }
    assert (wrapper.optimizer.lr, wrapper.optimizer.weight_decay) == (optim.lr, optim.weight_decay)
    assert wrapper.get("paramwise_cfg", {}).get("no_decay") == optim.no_decay
    assert config.train_dataloader.batch_size == recipe.data.batch_size
    *warmup, decay = config.param_scheduler
    assert [part.end for part in warmup] == [steps for steps in [recipe.schedule.warmup_steps] if steps is not None]
    assert [part.start_factor * optim.lr for part in warmup] == pytest.approx([recipe.schedule.warmup_lr] * len(warmup))
    if recipe.task == "detection":
        assert (decay.milestones, decay.gamma) == (recipe.schedule.milestones, recipe.schedule.decay_rate)
        assert config.train_cfg.max_epochs == decay.end == recipe.trainer.epochs
    else:
        assert decay.power == recipe.schedule.power
        assert config.train_cfg.max_iters == decay.end == recipe.trainer.steps


@pytest.mark.parametrize("name", CONFIGS)
def test_mm_config_reads_its_data_where_the_environment_says(name, monkeypatch):
    variable = {"detection": "COCO_ROOT", "segmentation": "ADE20K_ROOT"}[load(recipe_beside(name)).task]
    monkeypatch.setenv(variable, "/elsewhere")
    config = load_config(name)
    loaders = [config[f"{split}_dataloader"].dataset for split in ("train", "val", "test")]
    assert [loader.data_root for loader in loaders] == ["/elsewhere"] * 3
    files = [config[f"{split}_evaluator"].get("ann_file", "/elsewhere") for split in ("val", "test")]
    assert all(file.startswith("/elsewhere") for file in files)


@pytest.mark.parametrize("kind", ["coco", "ade20k"])
def test_every_family_has_an_mm_config_of_each_task(kind):
    names = [name for name in CONFIGS if f"{kind}/{name}" in NAMES]
    assert families(load(recipe_beside(name)).model.name for name in names) == FAMILIES
