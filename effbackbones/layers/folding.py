"""Weights folded into the layer beside them, for inference: what is folded in has nothing left to do.

Every function changes the layer in place and is exact up to rounding.
"""

import torch
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d


def fold_norm(layer: Layer, norm: nn.BatchNorm2d) -> None:
    """Fold a batch norm that follows a layer into it."""
    scale_c, shift_c = _affine(norm)
    fold_scale(layer, scale_c)
    _add_bias(layer, shift_c)


def fold_norm_before(norm: nn.BatchNorm2d, layer: Layer) -> None:
    """Fold a batch norm into the layer that follows: linear, or a convolution of one group without padding.

    Raises:
        ValueError: The convolution pads its input: zeros around a norm's output are no zeros in front of it.
    """
    if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or any(map(bool, layer.padding))):
        raise ValueError(f"a norm in front of {layer} does not fold into it: it has groups or padding")
    scale_c, shift_c = _affine(norm)
    weight = layer.weight.detach()
    shape = (1, -1, *[1] * (weight.ndim - 2))
    _add_bias(layer, (weight * shift_c.reshape(shape)).flatten(1).sum(1))
    layer.weight = _fixed(weight * scale_c.reshape(shape))


def fold_scale(layer: Layer, scale: Tensor) -> None:
    """Fold a factor of each output channel, of any shape with as many elements as there are channels."""
    weight, scale_c = layer.weight.detach(), scale.detach().flatten()
    layer.weight = _fixed(weight * scale_c.reshape(-1, *[1] * (weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias = _fixed(layer.bias.detach() * scale_c)


def fold_scales(block: nn.Module, first: Layer, second: Layer) -> None:
    """Fold the layer scales `gamma1` and `gamma2` of a block, where it has them, into the last layer of each branch."""
    for name, layer in (("gamma1", first), ("gamma2", second)):
        if (gamma := getattr(block, name)) is not None:
            fold_scale(layer, gamma)
            setattr(block, name, None)


def fold_identity(conv: nn.Conv2d) -> None:
    """Fold x into x + conv(x), of a depthwise convolution that keeps the map's size."""
    weight = conv.weight.detach().clone()
    weight[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] += 1
    conv.weight = _fixed(weight)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift (C,) of a batch norm in evaluation."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{norm} keeps no running statistics: there is nothing fixed to fold")
    scale_c = torch.rsqrt(norm.running_var + norm.eps)
    shift_c = -norm.running_mean * scale_c
    if norm.affine:
        scale_c, shift_c = scale_c * norm.weight.detach(), shift_c * norm.weight.detach() + norm.bias.detach()
    return scale_c, shift_c


def _add_bias(layer: Layer, shift_c: Tensor) -> None:
    layer.bias = _fixed(shift_c if layer.bias is None else layer.bias.detach() + shift_c)


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
