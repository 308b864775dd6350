"""A literal STViT-R on Swin for the tests: the formulas one by one, on state dicts in the official format.

Making Vision Transformers Efficient from A Token Sparsification View, https://arxiv.org/abs/2303.08685.
Written for checking, not for speed: softmax and norms are spelled out, windows are taken one by one, the patches of
dense mode are unfolded before they are normed and projected, and the official pad mask is added as -1000. Evaluation
mode only (batch norms use their running statistics; no dropout, no drop path). Everything is differentiable with
respect to the images and to the float entries of the state dict.

Layouts in names: b batch, c channels, h and w rows and columns, n tokens in raster order.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of every norm
UNIT = 6  # blocks of a unit of stage 2
SIDE = 3  # rows and columns of a window's semantic tokens
REACHES = {1: 14, 2: 21, 5: 27}  # side of a window's patch of keys in dense mode, by the block's place in its unit

State = Mapping[str, Tensor]


@dataclass
class Config:
    """An architecture; `global_token` and `layer_scale` are the two official options, off in the releases."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    head_dim: int = 32
    window: int = 7
    mlp_ratio: float = 4
    global_token: bool = False
    layer_scale: bool = False
    dense: bool = False  # output norms in place of the classifier, patches in place of global attention
    pad_mask: Literal["official", "exact"] = "official"


VARIANTS: dict[str, Config] = {
    "stvit_r_swin_tiny": Config((2, 2, 6, 2), (96, 192, 384, 768)),
    "stvit_r_swin_small": Config((2, 2, 18, 2), (96, 192, 384, 768)),
    "stvit_r_swin_base": Config((2, 2, 18, 2), (128, 256, 512, 1024)),
}


def state_dict_shapes(config: Config, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of the official checkpoint, constants of the architecture left out."""
    shapes: dict[str, tuple[int, ...]] = {}

    def weight_bias(key: str, *shape: int) -> None:
        shapes[f"{key}.weight"] = shape
        shapes[f"{key}.bias"] = shape[:1]

    widths = (3, config.dims[0] // 2, config.dims[0])
    for i, c_in, c in ((0, *widths[:2]), (2, *widths[1:])):
        shapes[f"patch_embed.proj.{i}.c.weight"] = (c, c_in, 3, 3)
        weight_bias(f"patch_embed.proj.{i}.bn", c)
        for name in ("running_mean", "running_var"):
            shapes[f"patch_embed.proj.{i}.bn.{name}"] = (c,)
        shapes[f"patch_embed.proj.{i}.bn.num_batches_tracked"] = ()
    for i, (depth, c) in enumerate(zip(config.depths, config.dims, strict=True)):
        hidden = int(c * config.mlp_ratio)
        for j in range(depth):
            key = f"layers.{i}.blocks.{j}"
            for k in (1, 2):
                weight_bias(f"{key}.norm{k}", c)
            if i == 2 and j % UNIT:
                weight_bias(f"{key}.attn.q", c, c)
                weight_bias(f"{key}.attn.kv", 2 * c, c)
            else:
                weight_bias(f"{key}.attn.qkv", 3 * c, c)
                table = ((2 * config.window - 1) ** 2, c // config.head_dim)
                shapes[f"{key}.attn.relative_position_bias_table"] = table
            weight_bias(f"{key}.attn.proj", c, c)
            weight_bias(f"{key}.mlp.fc1", hidden, c)
            weight_bias(f"{key}.mlp.fc2", c, hidden)
            if j % UNIT if i == 2 else config.layer_scale:
                shapes[f"{key}.layer_scale_1"] = shapes[f"{key}.layer_scale_2"] = (c,)
        if i < 3:
            weight_bias(f"layers.{i}.downsample.norm", 4 * c)
            shapes[f"layers.{i}.downsample.reduction.weight"] = (config.dims[i + 1], 4 * c)
        if config.dense:
            weight_bias(f"norm{i}", c)
    if config.global_token:
        shapes["layers.2.semantic_token2"] = (1, 36, config.dims[2])
    if not config.dense:
        weight_bias("norm", config.dims[3])
        weight_bias("head", num_classes, config.dims[3])
    return shapes


def constants(config: Config, size: int) -> dict[str, Tensor]:
    """Return the constants in an official classifier's checkpoint for square images of `size`."""
    w = config.window
    entries: dict[str, Tensor] = {}
    for i, depth in enumerate(config.depths):
        side = size // 4 // 2**i
        for j in range(depth):
            key = f"layers.{i}.blocks.{j}"
            if i != 2 or j % UNIT == 0:
                entries[f"{key}.attn.relative_position_index"] = _position_index(w)
            if i != 2 and j % 2 and side > w:
                entries[f"{key}.attn_mask"] = _shift_mask(side, side, w, w // 2)
    return entries


def forward(state: State, x_bchw: Tensor, config: Config) -> tuple[Tensor | None, list[Tensor]]:
    """Return (logits, maps of the four stages), in evaluation mode.

    Args:
        state: state dict with the keys of :func:`state_dict_shapes` (`num_batches_tracked` may be absent).
        x_bchw: images (B, 3, H, W), of the dtype of `state`.

    Returns:
        Logits (B, classes), None in dense mode; maps (B, C, H / stride, W / stride): the raw outputs of the last
        blocks, in dense mode their layer norms.

    Raises:
        ValueError: `state` lacks a key, or has one that the architecture has not.
    """
    differing = {k for k in state.keys() ^ state_dict_shapes(config) if not k.endswith("num_batches_tracked")}
    if differing:
        raise ValueError(f"state: keys missing or not of this architecture: {sorted(differing)}")

    x_bchw = F.pad(x_bchw, (0, -x_bchw.shape[3] % 4, 0, -x_bchw.shape[2] % 4))
    for i in (0, 2):
        x_bchw = F.conv2d(x_bchw, state[f"patch_embed.proj.{i}.c.weight"], stride=2, padding=1)
        x_bchw = _batch_norm(state, f"patch_embed.proj.{i}.bn", x_bchw)
        x_bchw = x_bchw * (x_bchw + 3).clamp(0, 6) / 6
    x_bhwc = x_bchw.permute(0, 2, 3, 1)
    maps = []
    for i, depth in enumerate(config.depths):
        s_bhwc = x_bhwc  # of stage 2: the semantic map, from block 1 of a unit on
        for j in range(depth):
            key = f"layers.{i}.blocks.{j}"
            if i != 2:
                x_bhwc = _swin_block(state, key, x_bhwc, config, config.window // 2 if j % 2 else 0)
            elif j % UNIT == 0:
                x_bhwc = _swin_block(state, key, x_bhwc, config, 0)
            else:
                block = _dense_unit_block if config.dense else _unit_block
                x_bhwc, s_bhwc = block(state, j, x_bhwc, s_bhwc, config)
        maps.append(x_bhwc)
        if i < 3:
            x_bhwc = _merge(state, f"layers.{i}.downsample", x_bhwc)
    if config.dense:
        maps = [_layer_norm(state, f"norm{i}", m) for i, m in enumerate(maps)]
    logits = None if config.dense else _linear(state, "head", _layer_norm(state, "norm", x_bhwc).mean(dim=(1, 2)))
    return logits, [m.permute(0, 3, 1, 2) for m in maps]


# Swin


def _merge(state: State, key: str, x_bhwc: Tensor) -> Tensor:
    x = F.pad(x_bhwc, (0, 0, 0, x_bhwc.shape[2] % 2, 0, x_bhwc.shape[1] % 2))
    x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=3)
    return _layer_norm(state, f"{key}.norm", x) @ state[f"{key}.reduction.weight"].T


def _swin_block(state: State, key: str, x_bhwc: Tensor, config: Config, shift: int) -> Tensor:
    height, width = x_bhwc.shape[1:3]
    if not config.dense and min(height, width) <= config.window:
        shift = 0
    gamma_1, gamma_2 = (state.get(f"{key}.layer_scale_{k}", 1.0) for k in (1, 2))
    y = _layer_norm(state, f"{key}.norm1", x_bhwc)
    x_bhwc = x_bhwc + gamma_1 * _window_attention(state, f"{key}.attn", y, config, shift)
    return x_bhwc + gamma_2 * _mlp(state, key, x_bhwc)


def _window_attention(state: State, key: str, x_bhwc: Tensor, config: Config, shift: int) -> Tensor:
    w = config.window
    b, height, width, c = x_bhwc.shape
    heads = c // config.head_dim
    x = F.pad(x_bhwc, (0, 0, 0, -width % w, 0, -height % w))
    rows, cols = x.shape[1:3]
    x = x.roll((-shift, -shift), dims=(1, 2))
    table = state[f"{key}.relative_position_bias_table"]
    bias = table[_position_index(w).flatten()].reshape(w * w, w * w, heads).permute(2, 0, 1)
    mask = _shift_mask(rows, cols, w, shift) if shift else torch.zeros(rows * cols // w**2, w * w, w * w)
    out = torch.empty_like(x)
    for n, (top, left) in enumerate(_corners(rows, cols, w)):
        tokens = x[:, top : top + w, left : left + w].reshape(b, w * w, c)
        q, k, v = _linear(state, f"{key}.qkv", tokens).chunk(3, dim=2)
        y = _linear(state, f"{key}.proj", _attend(q, k, v, heads, bias + mask[n]))
        out[:, top : top + w, left : left + w] = y.reshape(b, w, w, c)
    return out.roll((shift, shift), dims=(1, 2))[:, :height, :width]


def _corners(rows: int, cols: int, w: int) -> list[tuple[int, int]]:
    return [(top, left) for top in range(0, rows, w) for left in range(0, cols, w)]


def _position_index(w: int) -> Tensor:
    index = torch.empty(w * w, w * w, dtype=torch.long)
    for p in range(w * w):
        for r in range(w * w):
            index[p, r] = (p // w - r // w + w - 1) * (2 * w - 1) + p % w - r % w + w - 1
    return index


def _shift_mask(rows: int, cols: int, w: int, shift: int) -> Tensor:
    label = torch.empty(rows, cols)
    for i, row in enumerate((slice(0, rows - w), slice(rows - w, rows - shift), slice(rows - shift, rows))):
        for j, col in enumerate((slice(0, cols - w), slice(cols - w, cols - shift), slice(cols - shift, cols))):
            label[row, col] = 3 * i + j
    masks = []
    for top, left in _corners(rows, cols, w):
        own = label[top : top + w, left : left + w].flatten()
        masks.append(torch.where(own[:, None] == own, 0.0, -100.0))
    return torch.stack(masks)


# Units: the classifier


def _unit_block(state: State, j: int, x_bhwc: Tensor, s_bhwc: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Return (map, semantic map) after block `j` of stage 2, one of the last five of its unit."""
    key, heads = f"layers.2.blocks.{j}", x_bhwc.shape[3] // config.head_dim
    gamma_1, gamma_2 = state[f"{key}.layer_scale_1"], state[f"{key}.layer_scale_2"]
    b, height, width, c = x_bhwc.shape
    if j % UNIT == 1:
        windows = (math.ceil(height / config.window), math.ceil(width / config.window))
        t = _adaptive_max_pool(x_bhwc, SIDE * windows[0], SIDE * windows[1])
        s_bhwc = torch.empty_like(t)
        for row in range(windows[0]):
            for col in range(windows[1]):
                own = (slice(None), slice(SIDE * row, SIDE * row + SIDE), slice(SIDE * col, SIDE * col + SIDE))
                top, left = _start(row, windows[0], height, config), _start(col, windows[1], width, config)
                patch = x_bhwc[:, top : top + 10, left : left + 10]
                keys = torch.cat([_flat(t[own]), _flat(patch)], dim=1)
                s_bhwc[own] = (gamma_1 * _cross(state, key, _flat(t[own]), keys, heads)).reshape(b, SIDE, SIDE, c)
    elif j % UNIT == 2:
        query = s_bhwc
        if config.global_token and j == 2:
            g = state["layers.2.semantic_token2"].reshape(1, 6, 6, c).permute(0, 3, 1, 2)
            g = F.interpolate(g, s_bhwc.shape[1:3], mode="bilinear", align_corners=False)
            query = s_bhwc + g.permute(0, 2, 3, 1)
        keys = torch.cat([_flat(s_bhwc), _flat(x_bhwc)], dim=1)
        s_bhwc = query + gamma_1 * _cross(state, key, _flat(query), keys, heads).reshape(query.shape)
    elif j % UNIT == 5:
        x_bhwc = x_bhwc + gamma_1 * _cross(state, key, _flat(x_bhwc), _flat(s_bhwc), heads).reshape(x_bhwc.shape)
        return x_bhwc + gamma_2 * _mlp(state, key, x_bhwc), s_bhwc
    else:
        s_bhwc = _mix(state, j, s_bhwc, heads)
    return x_bhwc, s_bhwc + gamma_2 * _mlp(state, key, s_bhwc)


def _start(n: int, windows: int, length: int, config: Config) -> int:
    """Return the first row of the patch of window row `n` (columns alike)."""
    return min(max(n * length // windows - config.window // 2, 0), max(length - 10, 0))


def _mix(state: State, j: int, s_bhwc: Tensor, heads: int) -> Tensor:
    """Self-attention of semantic tokens: of each window in block 3 of a unit, of all in block 4."""
    key = f"layers.2.blocks.{j}"
    b, rows, cols, c = s_bhwc.shape
    if j % UNIT == 4:
        y = _cross(state, key, _flat(s_bhwc), _flat(s_bhwc), heads).reshape(s_bhwc.shape)
    else:
        y = torch.empty_like(s_bhwc)
        for top, left in _corners(rows, cols, SIDE):
            own = (slice(None), slice(top, top + SIDE), slice(left, left + SIDE))
            tokens = _flat(s_bhwc[own])
            y[own] = _cross(state, key, tokens, tokens, heads).reshape(b, SIDE, SIDE, c)
    return s_bhwc + state[f"{key}.layer_scale_1"] * y


# Units: dense mode


def _dense_unit_block(state: State, j: int, x_bhwc: Tensor, s_bhwc: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Return (map, semantic map) after block `j` of stage 2, one of the last five of its unit."""
    w, key, heads = config.window, f"layers.2.blocks.{j}", x_bhwc.shape[3] // config.head_dim
    gamma_1, gamma_2 = state[f"{key}.layer_scale_1"], state[f"{key}.layer_scale_2"]
    height, width = x_bhwc.shape[1:3]
    pad = (-height % w, -width % w)
    padded = F.pad(x_bhwc, (0, 0, 0, pad[1], 0, pad[0]))
    if j % UNIT == 1:
        rows = []
        for top in range(0, padded.shape[1], w):
            windows = [padded[:, top : top + w, left : left + w] for left in range(0, padded.shape[2], w)]
            rows.append(torch.cat([_adaptive_max_pool(window, SIDE, SIDE) for window in windows], dim=2))
        s_bhwc = torch.cat(rows, dim=1)
    if j % UNIT in (1, 2):
        y = _patch_attention(state, j, s_bhwc, SIDE, padded, w, pad, heads, config)
        s_bhwc = s_bhwc + gamma_1 * y
    elif j % UNIT == 5:
        y = _patch_attention(state, j, padded, w, s_bhwc, SIDE, pad, heads, config)[:, :height, :width]
        x_bhwc = x_bhwc + gamma_1 * y
        return x_bhwc + gamma_2 * _mlp(state, key, x_bhwc), s_bhwc
    else:
        s_bhwc = _mix(state, j, s_bhwc, heads)
    return x_bhwc, s_bhwc + gamma_2 * _mlp(state, key, s_bhwc)


def _patch_attention(
    state: State,
    j: int,
    q_bhwc: Tensor,
    q_side: int,
    k_bhwc: Tensor,
    k_side: int,
    pad: tuple[int, int],
    heads: int,
    config: Config,
) -> Tensor:
    """Attend from every window of `q_side` rows to the patch around the same window, of `k_side` rows, of the keys."""
    reach = REACHES[j % UNIT]
    b, rows, cols, c = k_bhwc.shape
    before, after = (reach - k_side) // 2, reach - k_side - (reach - k_side) // 2
    border = (before, after, before, after)
    bad = torch.ones(1, 1, rows + reach - k_side, cols + reach - k_side, dtype=k_bhwc.dtype)
    bad[:, :, before : before + rows, before : before + cols] = _bad(rows, cols, k_side, pad, config)
    unfolded = F.unfold(F.pad(k_bhwc.permute(0, 3, 1, 2), border), reach, stride=k_side)  # (B, C reach^2, windows)
    unfolded_bad = F.unfold(bad, reach, stride=k_side)
    out = torch.empty_like(q_bhwc)
    for n, (top, left) in enumerate(_corners(*q_bhwc.shape[1:3], q_side)):
        own = (slice(None), slice(top, top + q_side), slice(left, left + q_side))
        keys = unfolded[:, :, n].reshape(b, c, reach**2).transpose(1, 2)
        score = -1000 * unfolded_bad[0, :, n]
        out[own] = _cross(state, f"layers.2.blocks.{j}", _flat(q_bhwc[own]), keys, heads, score).reshape(
            b, q_side, q_side, c
        )
    return out


def _bad(rows: int, cols: int, side: int, pad: tuple[int, int], config: Config) -> Tensor:
    """Return which keys the pad mask names, (rows, cols)."""
    if config.pad_mask == "official":
        bad = torch.zeros(rows, cols)
        # A slice that begins at -0 takes everything.
        bad[slice(-min(pad[0], rows), None), slice(-min(pad[1], cols), None)] = 1
        return bad
    bad = torch.zeros(rows, cols)
    w = config.window
    for axis, n in enumerate(pad):
        if side == SIDE:  # semantic rows without an image token in their bin
            n = sum(w * i // SIDE >= w - n for i in range(SIDE))
        length = (rows, cols)[axis]
        bad.narrow(axis, length - n, n).fill_(1)
    return bad


# Formulas of layers


def _cross(state: State, key: str, q_bnc: Tensor, k_bmc: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    q = _linear(state, f"{key}.attn.q", _layer_norm(state, f"{key}.norm1", q_bnc))
    k, v = _linear(state, f"{key}.attn.kv", _layer_norm(state, f"{key}.norm1", k_bmc)).chunk(2, dim=2)
    return _linear(state, f"{key}.attn.proj", _attend(q, k, v, heads, bias))


def _attend(q_bnc: Tensor, k_bmc: Tensor, v_bmc: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    d = q_bnc.shape[2] // heads
    q, k, v = (t.reshape(len(t), -1, heads, d).transpose(1, 2) for t in (q_bnc, k_bmc, v_bmc))
    scores = d**-0.5 * q @ k.transpose(2, 3)
    if bias is not None:
        scores = scores + bias
    weights = (scores - scores.amax(dim=3, keepdim=True)).exp()
    return (weights / weights.sum(dim=3, keepdim=True) @ v).transpose(1, 2).reshape(q_bnc.shape)


def _adaptive_max_pool(x_bhwc: Tensor, rows: int, cols: int) -> Tensor:
    return F.adaptive_max_pool2d(x_bhwc.permute(0, 3, 1, 2), (rows, cols)).permute(0, 2, 3, 1)


def _mlp(state: State, key: str, x: Tensor) -> Tensor:
    x = _linear(state, f"{key}.mlp.fc1", _layer_norm(state, f"{key}.norm2", x))
    return _linear(state, f"{key}.mlp.fc2", 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))


def _linear(state: State, key: str, x: Tensor) -> Tensor:
    return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]


def _layer_norm(state: State, key: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    var = centred.square().mean(dim=-1, keepdim=True)
    return centred / (var + EPS).sqrt() * state[f"{key}.weight"] + state[f"{key}.bias"]


def _batch_norm(state: State, key: str, x_bchw: Tensor) -> Tensor:
    mean, var, weight, bias = (
        state[f"{key}.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x_bchw - mean) / (var + EPS).sqrt() * weight + bias


def _flat(x_bhwc: Tensor) -> Tensor:
    return x_bhwc.flatten(1, 2)
