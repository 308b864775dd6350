"""The choice between the operators' references, their fast paths in PyTorch, and their kernels."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from effbackbones.kernels import problem

_ENV = "EFFBACKBONES_OPS"
_NAMES = ("auto", "torch", "reference")


def _checked(name: str, source: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(_NAMES)}")
    return name


_choice = _checked(os.environ.get(_ENV, "auto"), f"environment variable {_ENV}")


@contextmanager
def ops_backend(name: str) -> Iterator[None]:
    """Force the operators' path within the block: auto, torch (no kernels of our own) or reference.

    Raises ValueError for another name. The choice is one of the process, not of the thread.
    """
    global _choice
    before, _choice = _choice, _checked(name, "the operators' backend")
    try:
        yield
    finally:
        _choice = before


def use_reference() -> bool:
    """Return whether the references are forced."""
    return _choice == "reference"


def laid_out(x_bchw: Tensor) -> Tensor:
    """Return a map as it lies in memory on a path: with the channels last; first where the references are forced."""
    return x_bchw.contiguous(memory_format=torch.contiguous_format if use_reference() else torch.channels_last)


def use_kernels(name: str, device: torch.device) -> bool:
    """Return whether to take a module of `effbackbones.kernels` on a device: `auto`, a GPU, and they work there.

    Not where a model is exported: other programs do not know them.
    """
    cuda = device.type == "cuda" and _choice == "auto" and not torch.compiler.is_exporting()
    return cuda and not problem(name, device)
