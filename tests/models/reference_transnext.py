"""A literal TransNeXt for the tests: the formulas one by one, on state dicts in the official format.

TransNeXt: Robust Foveal Visual Perception for Vision Transformers, https://arxiv.org/abs/2311.17132.
Written for checking, not for speed: windows are unfolded, softmax and norms are spelled out, and the position bias is
computed pair by pair. Evaluation mode only (no drop path). Everything is differentiable with respect to the images and
to the entries of the state dict.

Layouts in names: b batch, h heads, d channels of a head, n tokens and p pooled tokens in raster order, o the cells of a
3x3 window row by row, c channels; `grid` and `pool` are the (rows, columns) of a map and of its pooled map.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # block and stage norms
DEFAULT_EPS = 1e-5  # patch embeddings, pooled tokens

State = Mapping[str, Tensor]
Grid = tuple[int, int]


@dataclass
class Config:
    """An architecture and the sizes it was made for; `dims` are multiples of `head_dim`."""

    depths: tuple[int, int, int, int] = (2, 2, 15, 2)
    dims: tuple[int, int, int, int] = (48, 96, 192, 384)
    head_dim: int = 24
    mlp_ratios: tuple[float, float, float, float] = (8, 8, 4, 4)
    pool_ratios: tuple[int, int, int, int] = (8, 4, 2, 1)
    dense: bool = False  # no classifier
    interpolate: bool = False  # the bias of `img_size`, resized
    img_size: int | Grid = 224
    pretrain_size: int = 224
    fixed_pool_size: int | None = None


VARIANTS: dict[str, Config] = {
    "transnext_micro": Config(),
    "transnext_tiny": Config(dims=(72, 144, 288, 576)),
    "transnext_small": Config((5, 5, 22, 5), (72, 144, 288, 576)),
    "transnext_base": Config((5, 5, 23, 5), (96, 192, 384, 768)),
    "transnext_micro_AAAA": Config(pool_ratios=(16, 8, 4, 2), pretrain_size=256),
}


def state_dict_shapes(config: Config, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of the official checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}

    def weight_bias(key: str, *shape: int) -> None:
        shapes[f"{key}.weight"] = shape
        shapes[f"{key}.bias"] = shape[:1]

    c_in = 3
    for i, c in enumerate(config.dims):
        stage, k, heads, hidden = i + 1, 3 if i else 7, c // config.head_dim, int(2 * (c * config.mlp_ratios[i]) / 3)
        weight_bias(f"patch_embed{stage}.proj", c, c_in, k, k)
        weight_bias(f"patch_embed{stage}.norm", c)
        for j in range(config.depths[i]):
            key = f"block{stage}.{j}"
            weight_bias(f"{key}.norm1", c)
            weight_bias(f"{key}.norm2", c)
            shapes[f"{key}.attn.temperature"] = (heads, 1, 1)
            shapes[f"{key}.attn.query_embedding"] = (heads, 1, config.head_dim)
            if config.pool_ratios[i] > 1:
                shapes[f"{key}.attn.relative_pos_bias_local"] = (heads, 9)
                shapes[f"{key}.attn.learnable_tokens"] = (heads, config.head_dim, 9)
                shapes[f"{key}.attn.learnable_bias"] = (heads, 1, 9)
                weight_bias(f"{key}.attn.q", c, c)
                weight_bias(f"{key}.attn.kv", 2 * c, c)
                weight_bias(f"{key}.attn.sr", c, c, 1, 1)
                weight_bias(f"{key}.attn.norm", c)
            else:
                weight_bias(f"{key}.attn.qkv", 3 * c, c)
            weight_bias(f"{key}.attn.proj", c, c)
            weight_bias(f"{key}.attn.cpb_fc1", 512, 2)
            weight_bias(f"{key}.attn.cpb_fc2", heads, 512)
            weight_bias(f"{key}.mlp.fc1", 2 * hidden, c)
            weight_bias(f"{key}.mlp.dwconv.dwconv", hidden, 1, 3, 3)
            weight_bias(f"{key}.mlp.fc2", c, hidden)
        weight_bias(f"norm{stage}", c)
        c_in = c
    if not config.dense:
        weight_bias("head", num_classes, c_in)
    return shapes


def forward(state: State, x_bchw: Tensor, config: Config) -> tuple[Tensor | None, list[Tensor]]:
    """Return (logits, maps of the four stages), in evaluation mode.

    Args:
        state: state dict with the keys of :func:`state_dict_shapes`.
        x_bchw: images (B, 3, H, W), H and W at least 32, of the dtype of `state`.

    Returns:
        Logits (B, classes), None in dense mode; maps (B, C, H / stride, W / stride), rounded up: the stage norms'.

    Raises:
        ValueError: `state` lacks a key, or has one that the architecture has not.
    """
    if differing := state.keys() ^ state_dict_shapes(config).keys():
        raise ValueError(f"state: keys missing or not of this architecture: {sorted(differing)}")
    maps = []
    for i, depth in enumerate(config.depths):
        stage = i + 1
        x_bchw = _conv(state, f"patch_embed{stage}.proj", x_bchw, stride=2 if i else 4)
        grid = (x_bchw.shape[2], x_bchw.shape[3])
        x_bnc = _layer_norm(state, f"patch_embed{stage}.norm", x_bchw.flatten(2).transpose(1, 2), DEFAULT_EPS)
        for j in range(depth):
            key = f"block{stage}.{j}"
            attention = _aggregated_attention if config.pool_ratios[i] > 1 else _attention
            y_bnc = _layer_norm(state, f"{key}.norm1", x_bnc, EPS)
            x_bnc = x_bnc + attention(state, f"{key}.attn", y_bnc, grid, i, config)
            x_bnc = x_bnc + _glu(state, f"{key}.mlp", _layer_norm(state, f"{key}.norm2", x_bnc, EPS), grid)
        x_bnc = _layer_norm(state, f"norm{stage}", x_bnc, EPS)
        x_bchw = x_bnc.transpose(1, 2).unflatten(2, grid)
        maps.append(x_bchw)
    return None if config.dense else _linear(state, "head", x_bnc.mean(1)), maps


def _aggregated_attention(state: State, key: str, x_bnc: Tensor, grid: Grid, i: int, config: Config) -> Tensor:
    pool = _pooled(grid, config.pool_ratios[i])
    if config.fixed_pool_size is not None:
        pool = (config.fixed_pool_size, config.fixed_pool_size)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    def windows(x_bhnd: Tensor) -> Tensor:  # (B, heads, N, 9, d), zero outside
        x_bchw = x_bhnd.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, grid)
        unfolded = F.unfold(x_bchw, 3, padding=1).unflatten(1, (x_bhnd.shape[1], -1, 9))
        return unfolded.permute(0, 1, 4, 3, 2)

    q_bhnd = _unit(heads(_linear(state, f"{key}.q", x_bnc)))
    k_bnc, v_bnc = _linear(state, f"{key}.kv", x_bnc).chunk(2, dim=-1)
    k_bhnd, v_bhnd = _unit(heads(k_bnc)), heads(v_bnc)

    z_bchw = _gelu(_conv(state, f"{key}.sr", x_bnc.transpose(1, 2).unflatten(2, grid)))
    z_bpc = F.adaptive_avg_pool2d(z_bchw, pool).flatten(2).transpose(1, 2)
    z_bpc = _layer_norm(state, f"{key}.norm", z_bpc, DEFAULT_EPS)
    k_bpc, v_bpc = _linear(state, f"{key}.kv", z_bpc).chunk(2, dim=-1)
    k_bhpd, v_bhpd = _unit(heads(k_bpc)), heads(v_bpc)

    inside_no = windows(x_bnc.new_ones(1, 1, x_bnc.shape[1], 1))[0, 0, :, :, 0] > 0
    length_n = (inside_no.sum(1) + pool[0] * pool[1]).float().log().to(x_bnc.dtype)
    s_bhnd = (q_bhnd + state[f"{key}.query_embedding"]) * _softplus(state[f"{key}.temperature"]) * length_n[:, None]
    local_bhno = (s_bhnd[:, :, :, None] * windows(k_bhnd)).sum(-1) + state[f"{key}.relative_pos_bias_local"][:, None]
    local_bhno = torch.where(inside_no, local_bhno, -torch.inf)
    bias_hnp = _position_bias(state, key, grid, pool, i, config)
    weights = _softmax(torch.cat([local_bhno, s_bhnd @ k_bhpd.transpose(2, 3) + bias_hnp], dim=-1))
    direct_bhno = q_bhnd @ state[f"{key}.learnable_tokens"] + state[f"{key}.learnable_bias"]
    out_bhnd = ((weights[..., :9] + direct_bhno)[..., None] * windows(v_bhnd)).sum(3) + weights[..., 9:] @ v_bhpd
    return _linear(state, f"{key}.proj", out_bhnd.transpose(1, 2).flatten(2))


def _attention(state: State, key: str, x_bnc: Tensor, grid: Grid, i: int, config: Config) -> Tensor:
    q_bhnd, k_bhnd, v_bhnd = (
        x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        for x in _linear(state, f"{key}.qkv", x_bnc).chunk(3, dim=-1)
    )
    length = math.log(x_bnc.shape[1])
    if config.dense:  # the official dense code has it in float32, its classifier has not
        length = torch.tensor(length, dtype=torch.float32).item()
    s_bhnd = (_unit(q_bhnd) + state[f"{key}.query_embedding"]) * _softplus(state[f"{key}.temperature"]) * length
    bias_hnn = _position_bias(state, key, grid, grid, i, config)
    out_bhnd = _softmax(s_bhnd @ _unit(k_bhnd).transpose(2, 3) + bias_hnn) @ v_bhnd
    return _linear(state, f"{key}.proj", out_bhnd.transpose(1, 2).flatten(2))


# Position bias


def _position_bias(state: State, key: str, grid: Grid, pool: Grid, i: int, config: Config) -> Tensor:
    """Return the bias (heads, N, P) of a map over its pooled map."""
    stride = 2 ** (i + 2)
    span = max(1, config.pretrain_size // stride - 1)
    if not config.interpolate:
        return _pair_bias(state, key, grid, pool, span)
    sides = (config.img_size,) * 2 if isinstance(config.img_size, int) else config.img_size
    trained = _pooled(sides, stride)
    trained_pool = _pooled(trained, config.pool_ratios[i])
    bias = _pair_bias(state, key, trained, trained_pool, span)  # (heads, trained N, trained P)
    heads = bias.shape[0]
    bias = F.interpolate(bias.unflatten(2, trained_pool), pool, mode="bilinear").flatten(2)  # keys
    bias = bias.transpose(1, 2).unflatten(2, trained)
    bias = F.interpolate(bias, grid, mode="bilinear").flatten(2)  # queries
    return bias.transpose(1, 2).reshape(heads, math.prod(grid), math.prod(pool))


def _pair_bias(state: State, key: str, grid: Grid, pool: Grid, span: int) -> Tensor:
    """Return the bias (heads, N, P) of every pair of query and key; equal offsets are computed once."""
    axes = []
    for n, m in zip(grid, pool, strict=True):
        positions = torch.arange(n, dtype=torch.float32)
        axes.append(positions[:, None] - F.adaptive_avg_pool1d(positions[None], m))
    rows, cols = axes
    offsets = torch.stack(
        torch.broadcast_tensors(rows[:, None, :, None], cols[None, :, None, :]), dim=-1
    )  # (H, W, pH, pW, 2)
    offsets, index = offsets.flatten(0, 3).unique(dim=0, return_inverse=True)
    x = offsets / span * 8
    coordinates = (x.sign() * (x.abs() + 1).log2() / math.log2(8)).to(state[f"{key}.cpb_fc1.weight"].dtype)
    hidden = _linear(state, f"{key}.cpb_fc1", coordinates).clamp_min(0)
    bias = _linear(state, f"{key}.cpb_fc2", hidden)[index]
    return bias.T.unflatten(1, (math.prod(grid), math.prod(pool)))


def _pooled(grid: Grid, ratio: int) -> Grid:
    return max(1, grid[0] // ratio), max(1, grid[1] // ratio)


# Formulas of layers


def _glu(state: State, key: str, x_bnc: Tensor, grid: Grid) -> Tensor:
    a_bnm, g_bnm = _linear(state, f"{key}.fc1", x_bnc).chunk(2, dim=-1)
    weight, bias = state[f"{key}.dwconv.dwconv.weight"], state[f"{key}.dwconv.dwconv.bias"]
    a_bmhw = F.conv2d(a_bnm.transpose(1, 2).unflatten(2, grid), weight, bias, padding=1, groups=len(weight))
    return _linear(state, f"{key}.fc2", _gelu(a_bmhw.flatten(2).transpose(1, 2)) * g_bnm)


def _linear(state: State, key: str, x: Tensor) -> Tensor:
    return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]


def _conv(state: State, key: str, x_bchw: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{key}.weight"]
    return F.conv2d(x_bchw, weight, state[f"{key}.bias"], stride, weight.shape[-1] // 2)


def _layer_norm(state: State, key: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    var = centred.square().mean(dim=-1, keepdim=True)
    return centred / (var + eps).sqrt() * state[f"{key}.weight"] + state[f"{key}.bias"]


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)


def _softmax(x: Tensor) -> Tensor:
    weights = (x - x.amax(dim=-1, keepdim=True)).exp()
    return weights / weights.sum(dim=-1, keepdim=True)


def _softplus(x: Tensor) -> Tensor:
    return torch.where(x > 20, x, x.clamp_max(20).exp().log1p())


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
