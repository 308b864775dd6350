"""Runs of a second or less: a tiny UniFormer on synthetic images, whole, broken off and resumed."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback
from torch import Tensor

from effbackbones.config import LoadedRecipe, load_recipe
from effbackbones.train import run
from effbackbones.train.callbacks.pictures import Pictures

RECIPE = """
model:
  name: uniformer_small
  args: {head_dim: 16, dims: [16, 16, 32, 32], depths: [1, 1, 1, 1]}
data:
  source: synthetic
  num_classes: 4
  size: 32
  batch_size: 4
  workers: 0
  synthetic_images: 26
trainer:
  epochs: 2
  accelerator: cpu
  log_every: 1
"""
"""Two epochs of 6 steps."""

TIMINGS = ("train/images_per_second", "train/data_wait")
TOOLS = Path(__file__).parents[2] / "tools"


def small_recipe(folder: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Return RECIPE with the run folder `folder`."""
    return load_recipe(write_recipe(folder.parent), [f"run.dir={folder}", *overrides])


def write_recipe(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(RECIPE)
    return path


def train(loaded: LoadedRecipe, *callbacks: Callback, pictures: bool = False) -> Path:
    """Train in this process, with more callbacks, and without the pictures, which take most of the time."""

    def with_more(*args: Any) -> list[Callback]:
        return [c for c in own(*args) if pictures or not isinstance(c, Pictures)] + list(callbacks)

    own = run._callbacks
    with patch.object(run, "_callbacks", with_more):
        return run.train(loaded)


class BrokenOffError(Exception):
    pass


class BreakOff(Callback):
    """Stops a run by an exception in one hook, after a number of optimizer steps."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self.break_off)

    def break_off(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise BrokenOffError


def train_command(*arguments: str) -> list[str]:
    return [sys.executable, str(TOOLS / "train.py"), *arguments]


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that a run leaves behind, but for the text of its recipe and its pictures."""
    last, best = ({**checkpoint(folder, name), "recipe": None} for name in ("last", "best"))
    return {"last": last, "best": best, "metrics": repeated_metrics(folder)}


def repeated_metrics(folder: Path) -> list[str]:
    """Return the lines of metrics.csv without the columns that no two runs have alike."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    kept = [i for i, name in enumerate(rows[0]) if name not in TIMINGS]
    return [",".join(row[i] for i in kept) for row in rows]


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return the places where two nested structures differ; tensors are equal bit for bit or they differ."""
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: {list(one)} and {list(other)}"]
        return [line for key in one for line in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} entries"]
        pairs = zip(one, other, strict=True)
        return [line for i, pair in enumerate(pairs) for line in differences(*pair, f"{where}[{i}]")]
    if isinstance(one, Tensor):
        return [] if torch.equal(one, other) else [f"{where}: other values"]
    return [] if one == other else [f"{where}: {one} and {other}"]
