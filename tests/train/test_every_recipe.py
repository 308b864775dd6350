"""Every recipe that comes with the package trains: two steps on made-up images of 32 pixels, with few blocks."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from small_models import depths
from small_runs import train

from effbackbones.assets import asset_dir
from effbackbones.config import load_recipe
from effbackbones.train.callbacks.checkpoints import AtomicCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")

FOLDER = asset_dir("recipes")
NAMES = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in sorted(FOLDER.rglob("*.yaml"))]
SMALL = [
    "data.source=synthetic",
    "data.num_classes=10",
    "data.synthetic_images=8",
    "data.size=32",
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


class Watch(Callback):
    """The weights before and after, and the loss of every step."""

    def __init__(self):
        self.losses = []

    def on_train_start(self, trainer, pl_module):
        self.before = {name: value.detach().clone() for name, value in pl_module.model.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, trainer, pl_module):
        self.steps = trainer.global_step
        self.metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.after = dict(pl_module.model.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_two_steps(tmp_path, monkeypatch, name):
    # Together, the checkpoints of all recipes take gigabytes.
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", lambda *args, **options: None)
    watch = Watch()
    # At 32 pixels some attention of these is over one key, which leaves queries and keys without a gradient.
    size = ["data.size=64"] if name.startswith(("in1k/s2aformer", "in1k/transnext")) else []
    blocks = f"model.args.depths={list(depths(load_recipe(name).recipe.model.name, compiled=True))}"
    loaded = load_recipe(name, [*SMALL, *size, blocks, f"run.dir={tmp_path / 'run'}"])
    train(loaded, watch)
    assert watch.steps == 2
    assert len(watch.losses) == 2 * loaded.recipe.trainer.accumulate
    assert all(map(math.isfinite, watch.losses))
    assert all(map(math.isfinite, watch.metrics.values()))
    assert ("val/top1_ema" in watch.metrics) == (loaded.recipe.ema.decay is not None)
    unchanged = [name for name, value in watch.before.items() if torch.equal(value, watch.after[name])]
    assert unchanged == []
    assert all(value.isfinite().all() for value in watch.after.values())
