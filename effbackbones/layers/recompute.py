"""Activations that a training step computes twice, as that takes less than keeping them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from effbackbones.layers.reference import use_reference

_LARGE = 2**22
"""Elements of an input from which on its function is computed twice: 16 MiB in float32."""


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `function(x)`; where `x` is large, the backward pass keeps `x` alone, and computes what it needs again.

    That stops at the last tensor that the backward pass needs: a layer at the end of the function, which needs its
    input, is not computed twice. Nothing is computed twice at inference, in a graph (torch.compile chooses for itself),
    within the transforms of torch.func (they know no checkpoints), and where the operators' references are forced.
    """
    # The size comes last: to ask for it in a graph of any batch would tie the graph to an answer.
    if not (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return function(x)
    if use_reference() or torch._C._are_functorch_transforms_active() or x.numel() < _LARGE:
        return function(x)
    return checkpoint(function, x, use_reentrant=False)
