"""Operators that can be measured: the registry of realistic examples of calls of `effbackbones.ops`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

PREFIX = "op:"


@dataclass
class Example:
    """What an example of a call is made for; it makes the tensors.

    Attributes:
        batch: Images of the call.
        height, width: Size of the images in pixels; the maps of a model's stages are smaller by its strides.
        dtype, device: Of the tensors that :meth:`randn` gives.
        train: Whether gradients of these tensors are computed too.
    """

    batch: int
    height: int
    width: int
    dtype: torch.dtype
    device: str
    train: bool
    tensors: list[Tensor] = field(default_factory=list)

    def randn(self, *shape: int) -> Tensor:
        """Return a tensor of normal values, a leaf that takes a gradient in training."""
        tensor = torch.randn(shape, dtype=self.dtype, device=self.device, requires_grad=self.train)
        self.tensors.append(tensor)
        return tensor


Build = Callable[[Example], Callable[[], Tensor]]

OPERATORS: dict[str, Build] = {}
"""By name what builds an example: the call, ready but for being made, that returns the operator's output."""


def operator(name: str) -> Callable[[Build], Build]:
    """Register what builds the example of an operator, under the name that `effb bench op:NAME` takes."""

    def register(build: Build) -> Build:
        OPERATORS[name] = build
        return build

    return register
