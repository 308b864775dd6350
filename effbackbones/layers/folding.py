"""Weights folded into the layer beside them, for inference: what is folded in has nothing left to do.

Every function changes the layer in place and is exact up to rounding.
"""

import torch
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d


def fold_norm(owner: nn.Module, norm: str, layer: Layer) -> None:
    """Fold the batch norm that `owner` has under the name `norm` into the layer in front of it, and drop it."""
    if (affine := _taken(owner, norm)) is not None:
        fold_scale(layer, affine[0])
        _add_bias(layer, affine[1])


def fold_norm_before(owner: nn.Module, norm: str, layer: Layer) -> None:
    """Fold the batch norm that `owner` has under the name `norm` into the layer that follows it, and drop it.

    Raises:
        ValueError: The layer is a convolution of groups, or it pads its input: zeros around a norm's output are no
            zeros in front of it.
    """
    if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or any(map(bool, layer.padding))):
        raise ValueError(f"a norm in front of {layer} does not fold into it: it has groups or padding")
    if (affine := _taken(owner, norm)) is not None:
        scale_c, shift_c = affine
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


def _taken(owner: nn.Module, name: str) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift (C,) of a batch norm in evaluation, which an identity replaces; None if it is one."""
    norm = getattr(owner, name)
    if not isinstance(norm, nn.BatchNorm2d):
        return None
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{norm} keeps no running statistics: there is nothing fixed to fold")
    scale_c = torch.rsqrt(norm.running_var + norm.eps)
    shift_c = -norm.running_mean * scale_c
    if norm.affine:
        scale_c, shift_c = scale_c * norm.weight.detach(), shift_c * norm.weight.detach() + norm.bias.detach()
    setattr(owner, name, nn.Identity())
    return scale_c, shift_c


def _add_bias(layer: Layer, shift_c: Tensor) -> None:
    layer.bias = _fixed(shift_c if layer.bias is None else layer.bias.detach() + shift_c)


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
