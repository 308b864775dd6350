"""A folder like a checkout, whose recipe `quickstart` is the real one cut down to a second of training."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from parity.parity import reference_state_dict
from project import ROOT
from small_scenes import RECIPES, ROOTS, scenes

from effbackbones.cli import main

RECIPE = f"""extends: {json.dumps(str(ROOT / "recipes" / "quickstart.yaml"))}
model:
  name: uniformer_small
  args: {{dims: [16, 16, 320, 192], depths: [1, 1, 1, 1]}}
data:
  batch_size: 8
  eval_batch_size: 8
optim:
  lr: 2e-3
schedule:
  warmup_epochs: 0
trainer:
  epochs: 1
  accelerator: cpu
  log_every: 1
  limit_train: 2
  limit_val: 3
"""


def make_scenes_runs(folder: Path) -> None:
    """Make a few scenes in `folder`/datasets/scenes, and train cut-down recipes of them there."""
    (folder / "datasets").mkdir()
    (folder / "datasets" / "scenes").symlink_to(scenes())
    (folder / "recipes" / "scenes").mkdir()
    for name, task in (("mask_rcnn", "detection"), ("semantic_fpn", "segmentation")):
        recipe = folder / "recipes" / "scenes" / f"{name}.yaml"
        recipe.write_text(RECIPES[task].replace("data:\n", f"data:\n  root: datasets/scenes/{ROOTS[task]}\n"))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        settings = ("model.name=s2aformer_mini", "data.size=64", "run.dir=runs/quickstart_s2aformer")
        assert main(["train", "quickstart", *settings]) == 0
        assert main(["train", "scenes/mask_rcnn"]) == 0
        assert main(["train", "scenes/semantic_fpn"]) == 0


def make_checkout(folder: Path) -> Path:
    """Fill `folder` with recipes/quickstart.yaml and data/, and return it."""
    (folder / "recipes").mkdir()
    (folder / "recipes" / "quickstart.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "data").symlink_to(ROOT / "data")
    return folder


def official_weights(fixture: str) -> dict[str, torch.Tensor]:
    """Return the float32 weights of a parity fixture (uniformer/uniformer_xxs_128x128) in the official format."""
    meta = json.loads((ROOT / "tests" / "parity" / f"{fixture}.json").read_text(encoding="utf-8"))
    weights = reference_state_dict(meta)
    return {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}


def train_quickstart(folder: Path) -> str:
    """Run `effb train quickstart` in `folder`, and return what it printed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        assert main(["train", "quickstart"]) == 0
    return printed.getvalue()
