"""Layer scale: a learned factor on the branch of a residual."""

import torch
from torch import Tensor, nn


def layer_scales(shape: tuple[int, ...], value: float | None) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Return the scales of a block's two branches, or two None where there is no layer scale."""
    if value is None:
        return None, None
    return nn.Parameter(torch.full(shape, value)), nn.Parameter(torch.full(shape, value))


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """Return x times its layer scale, or x where there is none."""
    return x if gamma is None else x * gamma
