"""Every recipe that comes with the package trains: two steps on images of 32 to 64 pixels, with few blocks.

Of the dense ones, which differ in their width alone once few blocks are left, one of each head and family is not slow.
"""

import math
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import Callback
from small_models import depths
from small_runs import train
from small_scenes import scenes

from effbackbones.assets import asset_dir
from effbackbones.config import load_recipe
from effbackbones.config.schema import METRICS
from effbackbones.models._zoo import ZOO
from effbackbones.train.callbacks.checkpoints import AtomicCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

FOLDER = asset_dir("recipes")
NAMES = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in sorted(FOLDER.rglob("*.yaml"))]
SMALL = [
    "data.batch_size=4",
    "data.eval_batch_size=4",
    "data.workers=0",
    "optim.eps=1e-20",  # the usual one hides gradients behind an initial layer scale
    "optim.lr_batch=null",  # scaled to four images, a rate of fine-tuning is too small for float32 to add to 1
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.precision=32",
    "trainer.sync_bn=false",
    "trainer.steps=2",
    "trainer.limit_val=1",
]
IMAGES = ["data.source=synthetic", "data.num_classes=10", "data.synthetic_images=8", "data.size=32"]
SCENES = [
    "schedule.warmup_steps=null",
    "data.scale=[85, 64]",
    "data.batch_size=2",
    "data.eval_batch_size=1",
]
HEADS = {  # what takes long, or needs more cells than such images have
    "mask_rcnn": ["model.head_overrides.train_cfg.rcnn.sampler.num=8"],
    "cascade": ["model.head_overrides.train_cfg.rcnn.sampler.num=8"],
    "dino": ["model.head_overrides.num_queries=30", "model.head_overrides.test_cfg.max_per_img=30"],
}


def recipes() -> list[Any]:
    parameters = {row.model: row.params for row in ZOO}
    smallest: dict[Any, str] = {}
    for name in NAMES:
        model = load_recipe(name).recipe.model
        kind = (model.head, timm.models.model_entrypoint(model.name).__module__) if model.head else name
        other = smallest.get(kind)
        if other is None or parameters[model.name] < parameters[load_recipe(other).recipe.model.name]:
            smallest[kind] = name
    return [pytest.param(name, marks=[] if name in smallest.values() else [pytest.mark.slow]) for name in NAMES]


def small(name: str) -> list[str]:
    """Return the overrides that make a recipe small."""
    recipe = load_recipe(name).recipe
    blocks = f"model.args.depths={list(depths(recipe.model.name, compiled=True))}"
    if recipe.task == "classification":
        # At 32 pixels some attention of these is over one key, which leaves queries and keys without a gradient.
        size = ["data.size=64"] if name.startswith(("in1k/s2aformer", "in1k/transnext")) else []
        return [*SMALL, *IMAGES, *size, blocks]
    pytest.importorskip("mmcv", reason="needs the mm extra")
    head = next((overrides for kind, overrides in HEADS.items() if kind in name), [])
    size = ["data.size=64"] if recipe.task == "segmentation" else []
    return [*SMALL, *SCENES, *size, *head, f"data.root={scenes() / recipe.data.source}", blocks]


class Watch(Callback):
    """The weights before and after, and the loss of every step."""

    def __init__(self):
        self.losses = []

    def on_train_start(self, trainer, pl_module):
        trained = ((name, value) for name, value in pl_module.model.named_parameters() if value.requires_grad)
        self.before = {name: value.detach().clone() for name, value in trained}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, trainer, pl_module):
        self.steps = trainer.global_step
        self.metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.after = dict(pl_module.model.named_parameters())


@pytest.mark.parametrize("name", recipes())
def test_recipe_trains_two_steps(tmp_path, monkeypatch, name):
    # Together, the checkpoints of all recipes take gigabytes.
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", lambda *args, **options: None)
    watch = Watch()
    overrides = [*small(name), f"run.dir={tmp_path / 'run'}"]
    if teacher := load_recipe(name).recipe.distill.teacher:
        torch.save(timm.create_model(teacher, num_classes=10).state_dict(), tmp_path / "teacher.pth")
        overrides.append(f"distill.checkpoint={tmp_path / 'teacher.pth'}")
    loaded = load_recipe(name, overrides)
    train(loaded, watch)
    assert watch.steps == 2
    assert len(watch.losses) == 2 * loaded.recipe.trainer.accumulate
    assert all(map(math.isfinite, watch.losses))
    assert all(map(math.isfinite, watch.metrics.values()))
    assert (f"val/{METRICS[loaded.recipe.task][0]}_ema" in watch.metrics) == (loaded.recipe.ema.decay is not None)
    unchanged = [name for name, value in watch.before.items() if torch.equal(value, watch.after[name])]
    assert [name for name in unchanged if loaded.recipe.task == "classification" or name.startswith("backbone.")] == []
    assert all(value.isfinite().all() for value in watch.after.values())
