"""A literal STViT for the tests: the formulas one by one, on state dicts in the official format.

Vision Transformer with Super Token Sampling, https://arxiv.org/abs/2211.11167.
Written for checking, not for speed: softmax and norms are spelled out, and super tokens are a dictionary with one entry
for each cell. Evaluation mode only (batch norms use their running statistics; no dropout, no drop path). Everything is
differentiable with respect to the images and to the float entries of the state dict.

Layouts in names: b batch, h and w height and width, n tokens in raster order, c channels, k neighbours.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LN_EPS = 1e-6
BN_EPS = 1e-5
GUARD = 1e-12

State = Mapping[str, Tensor]


@dataclass
class Config:
    """An architecture; `layer_scale` says which stages have gammas."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    cells: tuple[int, int, int, int] = (8, 4, 1, 1)
    n_iter: tuple[int, int, int, int] = (1, 1, 1, 1)
    layer_scale: tuple[bool, bool, bool, bool] = (False, False, False, False)
    mlp_ratio: float = 4
    projection: int = 1024


_DEEP = (False, False, True, True)

VARIANTS: dict[str, Config] = {
    "stvit_small": Config((3, 5, 9, 3), (64, 128, 320, 512), (1, 2, 5, 8)),
    "stvit_base": Config((4, 6, 14, 6), (96, 192, 384, 512), (2, 3, 6, 8), layer_scale=_DEEP),
    "stvit_large": Config((4, 7, 19, 8), (96, 192, 448, 640), (2, 3, 7, 10), layer_scale=_DEEP),
}


def is_constant(key: str) -> bool:
    """Return whether an entry of the state dict is a constant of the architecture, which nothing reads."""
    return key.endswith((".fold.weights", ".unfold.weights"))


def state_dict_shapes(config: Config, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of the official checkpoint, buffers and constants included."""
    shapes: dict[str, tuple[int, ...]] = {}

    def weight_bias(key: str, *shape: int) -> None:
        shapes[f"{key}.weight"] = shape
        shapes[f"{key}.bias"] = shape[:1]

    def batch_norm(key: str, c: int) -> None:
        weight_bias(key, c)
        shapes[f"{key}.running_mean"] = shapes[f"{key}.running_var"] = (c,)
        shapes[f"{key}.num_batches_tracked"] = ()

    c_in, c = 3, config.dims[0]
    for i, c_out in enumerate((c // 2, c // 2, c, c)):
        weight_bias(f"patch_embed.proj.{3 * i}", c_out, c_in, 3, 3)
        batch_norm(f"patch_embed.proj.{3 * i + 2}", c_out)
        c_in = c_out
    for i, c in enumerate(config.dims):
        hidden = int(config.mlp_ratio * c)
        for j in range(config.depths[i]):
            key = f"layers.{i}.blocks.{j}"
            weight_bias(f"{key}.pos_embed.conv", c, 1, 3, 3)
            weight_bias(f"{key}.norm1.norm", c)
            shapes[f"{key}.attn.unfold.weights"] = shapes[f"{key}.attn.fold.weights"] = (9, 1, 3, 3)
            weight_bias(f"{key}.attn.stoken_refine.qkv", 3 * c, c, 1, 1)
            weight_bias(f"{key}.attn.stoken_refine.proj", c, c, 1, 1)
            batch_norm(f"{key}.norm2", c)
            weight_bias(f"{key}.mlp2.fc1", hidden, c, 1, 1)
            weight_bias(f"{key}.mlp2.conv.conv", hidden, 1, 3, 3)
            weight_bias(f"{key}.mlp2.fc2", c, hidden, 1, 1)
            if config.layer_scale[i]:
                shapes[f"{key}.gamma_1"] = shapes[f"{key}.gamma_2"] = (1, c, 1, 1)
        if i < 3:
            weight_bias(f"layers.{i}.downsample.proj.0", config.dims[i + 1], c, 3, 3)
            batch_norm(f"layers.{i}.downsample.proj.1", config.dims[i + 1])
    weight_bias("proj", config.projection, c, 1, 1)
    batch_norm("norm", config.projection)
    weight_bias("head", num_classes, config.projection)
    return shapes


def forward(state: State, x_bchw: Tensor, config: Config) -> tuple[Tensor, list[Tensor]]:
    """Return (logits, maps of the four stages), in evaluation mode.

    Args:
        state: state dict with the keys of :func:`state_dict_shapes` (constants and `num_batches_tracked` may be
            absent).
        x_bchw: images (B, 3, H, W), of the dtype of `state`.

    Returns:
        Logits (B, classes); maps (B, C, ceil(H / stride), ceil(W / stride)), the raw outputs of the last blocks.

    Raises:
        ValueError: `state` lacks a key, or has one that the architecture has not.
    """
    differing = {
        key
        for key in state.keys() ^ state_dict_shapes(config)
        if not (is_constant(key) or key.endswith("num_batches_tracked"))
    }
    if differing:
        raise ValueError(f"state: keys missing or not of this architecture: {sorted(differing)}")

    for i, stride in enumerate((2, 1, 2, 1)):
        x_bchw = _conv(state, f"patch_embed.proj.{3 * i}", x_bchw, stride, padding=1)
        x_bchw = _batch_norm(state, f"patch_embed.proj.{3 * i + 2}", _gelu(x_bchw))
    maps = []
    for i in range(4):
        for j in range(config.depths[i]):
            x_bchw = _block(state, f"layers.{i}.blocks.{j}", x_bchw, config.heads[i], config.cells[i], config.n_iter[i])
        maps.append(x_bchw)
        if i < 3:
            key = f"layers.{i}.downsample.proj"
            x_bchw = _batch_norm(state, f"{key}.1", _conv(state, f"{key}.0", x_bchw, stride=2, padding=1))
    z_bchw = _batch_norm(state, "norm", _conv(state, "proj", x_bchw))
    z_bc = (z_bchw * torch.sigmoid(z_bchw)).mean(dim=(2, 3))
    return z_bc @ state["head.weight"].T + state["head.bias"], maps


def _block(state: State, key: str, x_bchw: Tensor, heads: int, cell: int, n_iter: int) -> Tensor:
    gamma_1, gamma_2 = state.get(f"{key}.gamma_1", 1.0), state.get(f"{key}.gamma_2", 1.0)
    x_bchw = x_bchw + _depthwise(state, f"{key}.pos_embed.conv", x_bchw)

    y_bchw = _layer_norm(state, f"{key}.norm1.norm", x_bchw)

    def attention(t_bchw: Tensor) -> Tensor:
        return _attention(state, f"{key}.attn.stoken_refine", t_bchw, heads)

    y_bchw = attention(y_bchw) if cell == 1 else super_token_attention(y_bchw, cell, n_iter, attention)
    x_bchw = x_bchw + gamma_1 * y_bchw

    z_bchw = _gelu(_conv(state, f"{key}.mlp2.fc1", _batch_norm(state, f"{key}.norm2", x_bchw)))
    z_bchw = z_bchw + _depthwise(state, f"{key}.mlp2.conv.conv", z_bchw)
    return x_bchw + gamma_2 * _conv(state, f"{key}.mlp2.fc2", z_bchw)


def super_token_attention(
    y_bchw: Tensor,
    cell: int,
    n_iter: int,
    refine: Callable[[Tensor], Tensor],
    association: "Association | None" = None,
) -> Tensor:
    """Return the map after `refine` of its super tokens (B, C, cells down, cells across).

    `association` replaces the one that the map itself has.
    """
    (height, width), c = y_bchw.shape[2:], y_bchw.shape[1]
    rows, cols = math.ceil(height / cell), math.ceil(width / cell)
    y_bchw = F.pad(y_bchw, (0, cols * cell - width, 0, rows * cell - height))
    x_bnc = {
        (i, j): y_bchw[:, :, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].flatten(2).transpose(1, 2)
        for i in range(rows)
        for j in range(cols)
    }
    q_bnk, total_b = association or associate(x_bnc, n_iter)
    s_bc = _update(x_bnc, q_bnk, total_b)
    s_bchw = torch.stack([s_bc[at] for at in x_bnc], dim=2).reshape(-1, c, rows, cols)
    s_bcn = refine(s_bchw).flatten(2)
    s_bc = {at: s_bcn[:, :, n] for n, at in enumerate(x_bnc)}
    out_bchw = torch.zeros_like(y_bchw)
    for (i, j), q in q_bnk.items():
        y_bnc = q @ _neighbours(s_bc, i, j)
        out_bchw[:, :, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell] = y_bnc.transpose(1, 2).unflatten(
            2, (cell, cell)
        )
    return out_bchw[:, :, :height, :width]


Cells = dict[tuple[int, int], Tensor]
Association = tuple[Cells, Cells]


@torch.no_grad()
def associate(x_bnc: Cells, n_iter: int) -> Association:
    """Return for each cell the weights (B, N, 9) of its tokens, and the total (B,) that its super token gets."""
    s_bc = {at: x.mean(dim=1) for at, x in x_bnc.items()}
    for t in range(n_iter):
        if t > 0:
            s_bc = _update(x_bnc, q_bnk, total_b)  # noqa: F821 (of the round before)
        q_bnk, total_b = {}, {at: torch.zeros_like(x[:, 0, 0]) for at, x in x_bnc.items()}
        for (i, j), x in x_bnc.items():
            scores = x @ _neighbours(s_bc, i, j).transpose(1, 2) * x.shape[2] ** -0.5
            q_bnk[i, j] = _softmax(scores)
        for (i, j), q in q_bnk.items():
            for k, at in enumerate(_around(i, j)):
                if at in total_b:
                    total_b[at] = total_b[at] + q[:, :, k].sum(dim=1)
    return q_bnk, total_b


def _update(x_bnc: Cells, q_bnk: Cells, total_b: Cells) -> Cells:
    """Return the weighted means of the tokens, (B, C) for each cell."""
    sums_bc = {at: torch.zeros_like(x[:, 0]) for at, x in x_bnc.items()}
    for (i, j), x in x_bnc.items():
        for k, at in enumerate(_around(i, j)):
            if at in sums_bc:
                sums_bc[at] = sums_bc[at] + (q_bnk[i, j][:, :, k, None] * x).sum(dim=1)
    return {at: sums / (total_b[at][:, None] + GUARD) for at, sums in sums_bc.items()}


def _around(i: int, j: int) -> list[tuple[int, int]]:
    return [(i + a - 1, j + b - 1) for a in range(3) for b in range(3)]


def _neighbours(s_bc: Cells, i: int, j: int) -> Tensor:
    """Return the nine super tokens around cell (i, j), (B, 9, C); those outside the grid are zero vectors."""
    return torch.stack([s_bc.get(at, torch.zeros_like(s_bc[i, j])) for at in _around(i, j)], dim=1)


def _attention(state: State, key: str, t_bchw: Tensor, heads: int) -> Tensor:
    b, c, h, w = t_bchw.shape
    d = c // heads
    qkv_bcn = _conv(state, f"{key}.qkv", t_bchw).flatten(2)
    out = []
    for j in range(heads):
        q, k, v = (qkv_bcn[:, 3 * d * j + d * part : 3 * d * j + d * (part + 1)] for part in range(3))
        weights = _softmax(q.transpose(1, 2) @ k * d**-0.5)
        out.append(v @ weights.transpose(1, 2))
    return _conv(state, f"{key}.proj", torch.cat(out, dim=1).reshape(b, c, h, w))


# Formulas of layers


def _softmax(scores: Tensor) -> Tensor:
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return weights / weights.sum(dim=-1, keepdim=True)


def _conv(state: State, key: str, x_bchw: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    return F.conv2d(x_bchw, state[f"{key}.weight"], state[f"{key}.bias"], stride, padding)


def _depthwise(state: State, key: str, x_bchw: Tensor) -> Tensor:
    weight = state[f"{key}.weight"]
    return F.conv2d(x_bchw, weight, state[f"{key}.bias"], padding=1, groups=len(weight))


def _batch_norm(state: State, key: str, x_bchw: Tensor) -> Tensor:
    mean, var, weight, bias = (
        state[f"{key}.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x_bchw - mean) / (var + BN_EPS).sqrt() * weight + bias


def _layer_norm(state: State, key: str, x_bchw: Tensor) -> Tensor:
    centred = x_bchw - x_bchw.mean(dim=1, keepdim=True)
    var = centred.square().mean(dim=1, keepdim=True)
    weight, bias = (state[f"{key}.{name}"][:, None, None] for name in ("weight", "bias"))
    return centred / (var + LN_EPS).sqrt() * weight + bias


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
