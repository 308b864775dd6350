"""A folder like a checkout, whose recipe `quickstart` is the real one cut down to a second of training."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from effbackbones.cli import main

ROOT = Path(__file__).parents[1]
RECIPE = f"""extends: {json.dumps(str(ROOT / "recipes" / "quickstart.yaml"))}
model:
  name: uniformer_small
  args: {{head_dim: 16, dims: [16, 16, 32, 32], depths: [1, 1, 1, 1]}}
data:
  batch_size: 8
  eval_batch_size: 8
schedule:
  warmup_epochs: 0
trainer:
  epochs: 1
  accelerator: cpu
  log_every: 1
  limit_train: 2
  limit_val: 3
"""


def make_checkout(folder: Path) -> Path:
    """Fill `folder` with recipes/quickstart.yaml and data/, and return it."""
    (folder / "recipes").mkdir()
    (folder / "recipes" / "quickstart.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "data").symlink_to(ROOT / "data")
    return folder


def train_quickstart(folder: Path) -> str:
    """Run `effb train quickstart` in `folder`, and return what it printed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        assert main(["train", "quickstart"]) == 0
    return printed.getvalue()
