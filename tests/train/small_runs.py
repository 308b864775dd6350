"""Runs of a second or less: a tiny UniFormer on synthetic images, whole, broken off and resumed."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback
from torch import Tensor

from effbackbones.config import LoadedRecipe, load_recipe
from effbackbones.train import run
from effbackbones.train.callbacks.pictures import Pictures

STEPS_PER_EPOCH = 6
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


class BrokenOffError(Exception):
    pass


class BreakOff(Callback):
    """Stops a run by an exception in one hook, after a number of steps."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._break_off)

    def _break_off(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise BrokenOffError


def small_recipe(folder: Path, *overrides: str) -> LoadedRecipe:
    """Return a recipe whose run takes 12 steps in 2 epochs, in the run folder `folder`."""
    path = folder.parent / "small.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, [f"run.dir={folder}", *overrides])


def train(loaded: LoadedRecipe, *callbacks: Callback, pictures: bool = False) -> Path:
    """Train in this process, with more callbacks, and without the pictures, which take most of the time."""

    def with_more(*args: Any) -> list[Callback]:
        return [c for c in own(*args) if pictures or not isinstance(c, Pictures)] + list(callbacks)

    own = run._callbacks
    with patch.object(run, "_callbacks", with_more):
        return run.train(loaded)


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return the places where two nested structures differ; tensors are equal bit for bit or not at all."""
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: {list(one)} and {list(other)}"]
        return [line for key in one for line in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} entries"]
        return [line for i, pair in enumerate(zip(one, other)) for line in differences(*pair, f"{where}[{i}]")]
    if isinstance(one, Tensor):
        return [] if torch.equal(one, other) else [f"{where}: tensors differ"]
    return [] if one == other else [f"{where}: {one} and {other}"]
