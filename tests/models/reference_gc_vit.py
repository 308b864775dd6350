"""A literal GC ViT for the tests: the formulas one by one, on state dicts in the official format.

Global Context Vision Transformers, https://arxiv.org/abs/2206.09959.
Written for checking, not for speed: softmax, norms and biases are spelled out, and windows are visited one at a time.
Evaluation mode only (no dropout, no drop path). Everything is differentiable with respect to the images and to the
state dict.

Layouts in names: b batch, h and w height and width, n tokens of a window in raster order, c channels, k heads, d
channels of a head.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LN_EPS = 1e-5

State = Mapping[str, Tensor]
Window = tuple[int, int]
Windows = tuple[Window, Window, Window, Window]


def square(*sides: int) -> Windows:
    """Return square windows of the four stages."""
    a, b, c, d = sides
    return (a, a), (b, b), (c, c), (d, d)


NATIVE = square(7, 7, 14, 7)


@dataclass
class Config:
    """An architecture; `pretrain_window` is the side of stage 2's window that a dense model's weights come from."""

    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int] = (2, 4, 8, 16)
    dim: int = 64
    mlp_ratio: float = 3
    layer_scale: bool = False
    windows: Windows = NATIVE
    dense: bool = False  # output norms in place of the classifier
    pretrain_window: int = 14


_DEEP = (3, 4, 19, 5)
_S, _B, _L = (3, 6, 12, 24), (4, 8, 16, 32), (6, 12, 24, 48)

VARIANTS: dict[str, Config] = {
    "gc_vit_xxtiny": Config((2, 2, 6, 2)),
    "gc_vit_xtiny": Config((3, 4, 6, 5)),
    "gc_vit_tiny": Config(_DEEP),
    "gc_vit_tiny2": Config((3, 4, 29, 5)),
    "gc_vit_small": Config(_DEEP, _S, 96, 2, layer_scale=True),
    "gc_vit_small2": Config((3, 4, 23, 5), _S, 96, 3, layer_scale=True),
    "gc_vit_base": Config(_DEEP, _B, 128, 2, layer_scale=True),
    "gc_vit_large": Config(_DEEP, _L, 192, 2, layer_scale=True),
    "gc_vit_large_224_21k": Config(_DEEP, _L, 192, 2, layer_scale=True),
    "gc_vit_large_384_21k": Config(_DEEP, _L, 192, 2, layer_scale=True, windows=square(12, 12, 24, 12)),
    "gc_vit_large_512_21k": Config(_DEEP, _L, 192, 2, layer_scale=True, windows=square(16, 16, 32, 16)),
}


def state_dict_shapes(config: Config, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of the official checkpoint, without the integer buffers.

    A stage of one block, which no official model has, is without the layers of a query that nothing would use.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def weight_bias(key: str, *shape: int) -> None:
        shapes[f"{key}.weight"] = shape
        shapes[f"{key}.bias"] = shape[:1]

    def mb(key: str, c: int) -> None:
        shapes[f"{key}.conv.0.weight"] = (c, 1, 3, 3)
        shapes[f"{key}.conv.2.fc.0.weight"] = (c // 4, c)
        shapes[f"{key}.conv.2.fc.2.weight"] = (c, c // 4)
        shapes[f"{key}.conv.3.weight"] = (c, c, 1, 1)

    def down(key: str, c: int, c_out: int) -> None:
        weight_bias(f"{key}.norm1", c)
        mb(key, c)
        shapes[f"{key}.reduction.weight"] = (c_out, c, 3, 3)
        weight_bias(f"{key}.norm2", c_out)

    weight_bias("patch_embed.proj", config.dim, 3, 3, 3)
    down("patch_embed.conv_down", config.dim, config.dim)
    for i, (depth, heads, (h, w)) in enumerate(zip(config.depths, config.heads, config.windows, strict=True)):
        c = config.dim * 2**i
        hidden = int(config.mlp_ratio * c)
        for j in range(depth):
            key = f"levels.{i}.blocks.{j}"
            weight_bias(f"{key}.norm1", c)
            weight_bias(f"{key}.attn.qkv", c * (3 if j % 2 == 0 else 2), c)
            weight_bias(f"{key}.attn.proj", c, c)
            shapes[f"{key}.attn.relative_position_bias_table"] = ((2 * h - 1) * (2 * w - 1), heads)
            weight_bias(f"{key}.norm2", c)
            weight_bias(f"{key}.mlp.fc1", hidden, c)
            weight_bias(f"{key}.mlp.fc2", c, hidden)
            if config.layer_scale:
                shapes[f"{key}.gamma1"] = shapes[f"{key}.gamma2"] = (c,)
        if depth > 1:
            for s in range((3, 2, 1, 1)[i]):
                mb(f"levels.{i}.q_global_gen.to_q_global.{s}", c)
        if i < 3:
            down(f"levels.{i}.downsample", c, 2 * c)
        if config.dense:
            weight_bias(f"norm{i}", c)
    if not config.dense:
        weight_bias("norm", 8 * config.dim)
        weight_bias("head", num_classes, 8 * config.dim)
    return shapes


def forward(state: State, x_bchw: Tensor, config: Config) -> tuple[Tensor | None, list[Tensor]]:
    """Return (logits, maps of the four stages), in evaluation mode.

    Args:
        state: state dict with the keys of :func:`state_dict_shapes`, and possibly integer buffers.
        x_bchw: images (B, 3, H, W), H and W at least 32, of the dtype of `state`.

    Returns:
        Logits (B, classes), None in dense mode; maps (B, C, H / stride, W / stride): the raw outputs of the last
        blocks, in dense mode their layer norms.

    Raises:
        ValueError: `state` lacks a key, or has one that the architecture has not.
    """
    differing = {k for k in state.keys() ^ state_dict_shapes(config) if not k.endswith("relative_position_index")}
    if differing:
        raise ValueError(f"state: keys missing or not of this architecture: {sorted(differing)}")

    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x_bchw = _down(state, "patch_embed.conv_down", F.conv2d(x_bchw, weight, bias, stride=2, padding=1))
    maps = []
    for i, depth in enumerate(config.depths):
        q_bnkd = _global_query(state, i, x_bchw, config) if depth > 1 else None
        x_bhwc = _nhwc(x_bchw)
        for j in range(depth):
            x_bhwc = _block(state, f"levels.{i}.blocks.{j}", x_bhwc, None if j % 2 == 0 else q_bnkd, i, config)
        maps.append(_nchw(x_bhwc))
        if i < 3:
            x_bchw = _down(state, f"levels.{i}.downsample", maps[-1])

    if config.dense:
        return None, [_norm_map(state, f"norm{i}", m) for i, m in enumerate(maps)]
    pooled_bc = _layer_norm(state, "norm", _nhwc(maps[3])).mean(dim=(1, 2))
    return _linear(state, "head", pooled_bc), maps


# Convolutions


def _mb(state: State, key: str, x_bchw: Tensor) -> Tensor:
    y_bchw = _gelu(F.conv2d(x_bchw, state[f"{key}.conv.0.weight"], padding=1, groups=x_bchw.shape[1]))
    hidden_bc = _gelu(y_bchw.mean(dim=(2, 3)) @ state[f"{key}.conv.2.fc.0.weight"].T)
    gate_bc = 1 / (1 + (-(hidden_bc @ state[f"{key}.conv.2.fc.2.weight"].T)).exp())
    return torch.einsum("oc,bchw->bohw", state[f"{key}.conv.3.weight"][:, :, 0, 0], y_bchw * gate_bc[:, :, None, None])


def _down(state: State, key: str, x_bchw: Tensor) -> Tensor:
    y_bchw = _norm_map(state, f"{key}.norm1", x_bchw)
    z_bchw = y_bchw + _mb(state, key, y_bchw)
    return _norm_map(state, f"{key}.norm2", F.conv2d(z_bchw, state[f"{key}.reduction.weight"], stride=2, padding=1))


def _global_query(state: State, i: int, x_bchw: Tensor, config: Config) -> Tensor:
    """Return the query (B, N, heads, d) that every window of an image gets."""
    h, w = config.windows[i]
    for s in range((3, 2, 1, 1)[i]):
        x_bchw = x_bchw + _mb(state, f"levels.{i}.q_global_gen.to_q_global.{s}", x_bchw)
        if i < 2 or (i == 2 and config.dense and h != config.pretrain_window):
            x_bchw = F.max_pool2d(F.pad(x_bchw, (1, 1, 1, 1), value=-math.inf), kernel_size=3, stride=2)
    if x_bchw.shape[2:] != (h, w):
        x_bchw = F.interpolate(x_bchw, size=(h, w), mode="bicubic", align_corners=False)
    b, c = x_bchw.shape[:2]
    return _nhwc(x_bchw).reshape(b, h * w, config.heads[i], c // config.heads[i])


# Blocks


def _block(state: State, key: str, x_bhwc: Tensor, q_bnkd: Tensor | None, i: int, config: Config) -> Tensor:
    y_bhwc = _window_attention(state, f"{key}.attn", _layer_norm(state, f"{key}.norm1", x_bhwc), q_bnkd, i, config)
    x_bhwc = x_bhwc + state.get(f"{key}.gamma1", 1.0) * y_bhwc
    hidden = _gelu(_linear(state, f"{key}.mlp.fc1", _layer_norm(state, f"{key}.norm2", x_bhwc)))
    return x_bhwc + state.get(f"{key}.gamma2", 1.0) * _linear(state, f"{key}.mlp.fc2", hidden)


def _window_attention(state: State, key: str, y_bhwc: Tensor, q_bnkd: Tensor | None, i: int, config: Config) -> Tensor:
    """Attend within windows, one at a time; the zeros that fill the last ones take part as tokens."""
    h, w = config.windows[i]
    height, width = y_bhwc.shape[1:3]
    y_bhwc = F.pad(y_bhwc, (0, 0, 0, -width % w, 0, -height % h))
    rows = []
    for top in range(0, y_bhwc.shape[1], h):
        row = []
        for left in range(0, y_bhwc.shape[2], w):
            tokens_bnc = y_bhwc[:, top : top + h, left : left + w].flatten(1, 2)
            row.append(_attention(state, key, tokens_bnc, q_bnkd, i, config).unflatten(1, (h, w)))
        rows.append(torch.cat(row, dim=2))
    return torch.cat(rows, dim=1)[:, :height, :width]


def _attention(state: State, key: str, x_bnc: Tensor, q_bnkd: Tensor | None, i: int, config: Config) -> Tensor:
    """Attend within the same window of every image."""
    b, n, c = x_bnc.shape
    heads = config.heads[i]
    d = c // heads
    parts = _linear(state, f"{key}.qkv", x_bnc).reshape(b, n, -1, heads, d)
    if q_bnkd is None:
        q_bnkd, k_bnkd, v_bnkd = parts.unbind(2)
    else:
        k_bnkd, v_bnkd = parts.unbind(2)
    scale = d**-0.5
    if not config.dense:  # the classifier holds it in float32
        scale = torch.tensor(scale, dtype=torch.float32).item()
    bias = _bias(state[f"{key}.relative_position_bias_table"], config.windows[i])
    exponents = torch.einsum("bnkd,bmkd->bknm", scale * q_bnkd, k_bnkd) + bias
    weights = (exponents - exponents.amax(dim=-1, keepdim=True)).exp()
    weights = weights / weights.sum(dim=-1, keepdim=True)
    out_bnc = torch.einsum("bknm,bmkd->bnkd", weights, v_bnkd).reshape(b, n, c)
    return _linear(state, f"{key}.proj", out_bnc)


def _bias(table: Tensor, window: Window) -> Tensor:
    """Return the bias (heads, N, N) of queries over keys."""
    return table[_bias_index(window)].permute(2, 0, 1)


@functools.cache
def _bias_index(window: Window) -> Tensor:
    h, w = window
    places = [(r, c) for r in range(h) for c in range(w)]
    return torch.tensor([[(ra - rb + h - 1) * (2 * w - 1) + ca - cb + w - 1 for rb, cb in places] for ra, ca in places])


# Formulas of layers, and layouts


def _linear(state: State, key: str, x: Tensor) -> Tensor:
    return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]


def _layer_norm(state: State, key: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    var = centred.square().mean(dim=-1, keepdim=True)
    return centred / (var + LN_EPS).sqrt() * state[f"{key}.weight"] + state[f"{key}.bias"]


def _norm_map(state: State, key: str, x_bchw: Tensor) -> Tensor:
    return _nchw(_layer_norm(state, key, _nhwc(x_bchw)))


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _nhwc(x_bchw: Tensor) -> Tensor:
    return x_bchw.permute(0, 2, 3, 1)


def _nchw(x_bhwc: Tensor) -> Tensor:
    return x_bhwc.permute(0, 3, 1, 2)
