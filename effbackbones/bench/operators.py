"""Operators that can be measured: the registry of realistic examples of calls of `effbackbones.ops`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effbackbones.layers import attend
from effbackbones.ops import aggregated_attention, super_token_attention, token_merging

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


@operator("aggregated_attention")
def _aggregated_attention(example: Example) -> Callable[[], Tensor]:
    """Stage 0 of TransNeXt-Tiny: 3 heads of 24 channels, keys and values pooled by 8."""
    b, heads, d = example.batch, 3, 24
    grid = h, w = example.height // 4, example.width // 4
    p_h, p_w = max(1, h // 8), max(1, w // 8)
    q, q_unit, k, v = (example.randn(b, heads, d, h * w) for _ in range(4))
    k_pool, v_pool = (example.randn(b, heads, d, p_h * p_w) for _ in range(2))
    local_bias, tokens, token_bias = example.randn(heads, 9), example.randn(heads, d, 9), example.randn(heads, 9)
    pool_bias = example.randn(heads, p_h, p_w, h, w)
    return lambda: aggregated_attention(
        q, q_unit, k, v, k_pool, v_pool, local_bias, tokens, token_bias, pool_bias, grid
    )


@operator("attention")
def _attention(example: Example) -> Callable[[], Tensor]:
    """Stage 2 of UniFormer-S: 5 heads of 64 channels, among all tokens of the map."""
    n = (example.height // 16) * (example.width // 16)
    q, k, v = (example.randn(example.batch, 5, n, 64) for _ in range(3))
    return lambda: attend(q, k, v)


@operator("window_attention")
def _window_attention(example: Example) -> Callable[[], Tensor]:
    """Stage 0 of GC ViT-Tiny: 2 heads of 32 channels, in windows of 7 x 7 that share a bias."""
    windows = example.batch * -(-example.height // 28) * -(-example.width // 28)
    q, k, v = (example.randn(windows, 2, 49, 32) for _ in range(3))
    bias = example.randn(1, 2, 49, 49)
    return lambda: attend(q, k, v, bias)


@operator("super_token_attention")
def _super_token_attention(example: Example) -> Callable[[], Tensor]:
    """Stage 0 of STViT-S: 64 channels, cells of 8 x 8, one round; without the attention among super tokens."""
    x_bhwc = example.randn(example.batch, example.height // 4, example.width // 4, 64)
    return lambda: super_token_attention(x_bhwc, 8, 1, refine=lambda s_bhwc: s_bhwc)


@operator("token_merging")
def _token_merging(example: Example) -> Callable[[], Tensor]:
    """Stage 0 of SG-Former-S: 64 channels, three tiers, merged by 196, 56 and 28."""
    n = (example.height // 4) * (example.width // 4)
    x_bnc = example.randn(example.batch, n, 64)
    order_bn = torch.rand(example.batch, n, device=example.device).argsort()
    weights, biases = [example.randn(1, r) for r in (196, 56, 28)], [example.randn(1) for _ in range(3)]
    return lambda: token_merging(x_bnc, order_bn, (n // 4, 2 * (n // 4), n - 3 * (n // 4)), weights, biases)
