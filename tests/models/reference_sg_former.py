"""A literal SG-Former for the tests: the formulas one by one, on state dicts in the official format.

SG-Former: Self-guided Transformer with Evolving Token Reallocation, https://arxiv.org/abs/2308.12216.
Written for checking, not for speed: softmax and norms are spelled out, all attention weights are kept, and tokens are
sorted twice over, row by row and column by column. Evaluation mode only. Everything is differentiable with respect to
the images and to the state dict.

Layouts in names: b batch, h and w height and width, n tokens in raster order, c channels, m keys.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 7
REDUCTIONS = {1: 8, 2: 4, 3: 2}
RUNS = {1: (196, 56, 28), 2: (49, 14, 7), 3: (2, 1)}
DEFAULT_EPS = 1e-5  # group norms, the stem's layer norm, the layer norm of reduced maps
BLOCK_EPS = 1e-6

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Config:
    """An architecture: blocks, widths and attention heads of the four stages, side of the table of positions."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    grid: int = 56


VARIANTS: dict[str, Config] = {
    "sgformer_s": Config((2, 4, 16, 1), (64, 128, 256, 512), (2, 4, 8, 16)),
    "sgformer_m": Config((2, 6, 28, 2), (64, 128, 256, 512), (2, 4, 8, 16)),
    "sgformer_b": Config((4, 6, 24, 2), (96, 192, 384, 768), (4, 6, 12, 24)),
}


def state_dict_shapes(config: Config, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of the official checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, config.grid**2, config.dims[0])}

    def weight_bias(key: str, *shape: int) -> None:
        shapes[f"{key}.weight"] = shape
        shapes[f"{key}.bias"] = shape[:1]

    def conv_norm(key: str, *shape: int) -> None:
        shapes[f"{key}.c.weight"] = shape
        weight_bias(f"{key}.bn", shape[0])

    def attention(key: str, stage: int, j: int, c: int) -> None:
        weight_bias(f"{key}.lepe_linear", c, c)
        weight_bias(f"{key}.lepe_conv", c, 1, 3, 3)
        weight_bias(f"{key}.proj", c, c)
        if stage == 4:
            weight_bias(f"{key}.q", c, c)
            weight_bias(f"{key}.kv", 2 * c, c)
        elif j % 2:
            weight_bias(f"{key}.q", c, c)
            weight_bias(f"{key}.kv1", c, c)
            weight_bias(f"{key}.kv2", c, c)
            for tier, run in enumerate(RUNS[stage], start=1):
                weight_bias(f"{key}.f{tier}", 1, run)
        else:
            weight_bias(f"{key}.sr", c, c, REDUCTIONS[stage], REDUCTIONS[stage])
            weight_bias(f"{key}.norm", c)
            for name in ("q1", "q2"):
                weight_bias(f"{key}.{name}", c // 2, c)
            for name in ("kv1", "kv2"):
                weight_bias(f"{key}.{name}", c, c)

    c_in = 3
    for stage, (depth, c) in enumerate(zip(config.depths, config.dims, strict=True), start=1):
        if stage == 1:
            conv_norm("patch_embed1.conv.0", c, c_in, 3, 3)
            conv_norm("patch_embed1.conv.2", c, c, 3, 3)
            conv_norm("patch_embed1.conv.4", c, c, 3, 3)
            weight_bias("patch_embed1.norm", c)
        else:
            conv_norm(f"patch_embed{stage}.conv1", c, c_in, 1, 1)
            conv_norm(f"patch_embed{stage}.conv2", c, 1, 3, 3)
            conv_norm(f"patch_embed{stage}.conv3", c, c, 1, 1)
        for j in range(depth):
            key = f"block{stage}.{j}"
            weight_bias(f"{key}.norm1", c)
            weight_bias(f"{key}.norm2", c)
            attention(f"{key}.attn", stage, j, c)
            weight_bias(f"{key}.mlp.fc1", 4 * c, c)
            weight_bias(f"{key}.mlp.dwconv.dwconv", 4 * c, 1, 3, 3)
            weight_bias(f"{key}.mlp.fc2", c, 4 * c)
        weight_bias(f"norm{stage}", c)
        c_in = c
    weight_bias("head", num_classes, c_in)
    return shapes


def forward(
    state: State, x_bchw: Tensor, config: Config, significances: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return (logits, maps of the four stages).

    Args:
        state: state dict with the keys of :func:`state_dict_shapes`.
        x_bchw: images (B, 3, H, W), H and W at least 32, of the dtype of `state`.
        significances: takes the significance (B, N) that each hybrid block gives.

    Raises:
        ValueError: `state` lacks a key, or has one that the architecture has not.
    """
    differing = state.keys() ^ state_dict_shapes(config)
    if differing:
        raise ValueError(f"state: keys missing or not of this architecture: {sorted(differing)}")
    maps = []
    for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True), start=1):
        x_bhwc = _stem(state, x_bchw) if stage == 1 else _downsample(state, f"patch_embed{stage}", x_bchw)
        significance_bhw = None
        for j in range(depth):
            key = f"block{stage}.{j}"
            y_bhwc = _layer_norm(state, f"{key}.norm1", x_bhwc, BLOCK_EPS)
            if stage == 4:
                y_bhwc = _full_attention(state, f"{key}.attn", y_bhwc, heads)
            elif j % 2 == 0:
                y_bhwc, significance_bhw = _hybrid_attention(state, f"{key}.attn", y_bhwc, heads, REDUCTIONS[stage])
                if significances is not None:
                    significances.append(significance_bhw.flatten(1))
            else:
                y_bhwc = _guided_attention(state, f"{key}.attn", y_bhwc, heads, significance_bhw, RUNS[stage])
            x_bhwc = x_bhwc + y_bhwc
            x_bhwc = x_bhwc + _mlp(state, f"{key}.mlp", _layer_norm(state, f"{key}.norm2", x_bhwc, BLOCK_EPS))
        x_bchw = _nchw(_layer_norm(state, f"norm{stage}", x_bhwc, BLOCK_EPS))
        maps.append(x_bchw)
    return _linear(state, "head", x_bchw.mean((2, 3))), maps


# Embeddings


def _stem(state: State, x_bchw: Tensor) -> Tensor:
    x_bchw = _gelu(_conv_norm(state, "patch_embed1.conv.0", x_bchw, stride=2, padding=1))
    x_bchw = _gelu(_conv_norm(state, "patch_embed1.conv.2", x_bchw, padding=1))
    x_bchw = _conv_norm(state, "patch_embed1.conv.4", x_bchw, stride=2, padding=1)
    x_bhwc = _layer_norm(state, "patch_embed1.norm", _nhwc(x_bchw), DEFAULT_EPS)
    table_1nc = state["pos_embed"]
    side = math.isqrt(table_1nc.shape[1])
    table_1chw = _nchw(table_1nc.reshape(1, side, side, -1))
    if (side, side) != tuple(x_bchw.shape[2:]):
        table_1chw = F.interpolate(table_1chw, x_bchw.shape[2:], mode="bicubic", align_corners=False, antialias=False)
    return x_bhwc + _nhwc(table_1chw)


def _downsample(state: State, key: str, x_bchw: Tensor) -> Tensor:
    x_bchw = _gelu(_conv_norm(state, f"{key}.conv1", x_bchw))
    x_bchw = _gelu(_conv_norm(state, f"{key}.conv2", x_bchw, stride=2, padding=1))
    return _nhwc(_conv_norm(state, f"{key}.conv3", x_bchw))


# Blocks


def _mlp(state: State, key: str, x_bhwc: Tensor) -> Tensor:
    u_bhwc = _linear(state, f"{key}.fc1", x_bhwc)
    return _linear(state, f"{key}.fc2", _gelu(u_bhwc + _depthwise(state, f"{key}.dwconv.dwconv", u_bhwc)))


def _full_attention(state: State, key: str, x_bhwc: Tensor, heads: int) -> Tensor:
    x_bnc = x_bhwc.flatten(1, 2)
    q_bhnd = _heads(_linear(state, f"{key}.q", x_bnc), heads)
    out_bnc, _ = _attention(q_bhnd, *_keys_values(_linear(state, f"{key}.kv", x_bnc), heads))
    return _project(state, key, x_bhwc, out_bnc)


def _hybrid_attention(state: State, key: str, x_bhwc: Tensor, heads: int, reduction: int) -> tuple[Tensor, Tensor]:
    """Return (output, significance (B, H, W))."""
    b, h, w, _ = x_bhwc.shape
    x_bnc = x_bhwc.flatten(1, 2)
    weight, bias = state[f"{key}.sr.weight"], state[f"{key}.sr.bias"]
    z_bhwc = _nhwc(F.conv2d(_nchw(x_bhwc), weight, bias, stride=reduction))
    h_z, w_z = z_bhwc.shape[1:3]
    z_bmc = _gelu(_layer_norm(state, f"{key}.norm", z_bhwc.flatten(1, 2), DEFAULT_EPS))
    q_bhnd = _heads(_linear(state, f"{key}.q1", x_bnc), heads // 2)
    k_bhmd, v_bhmd = _keys_values(_linear(state, f"{key}.kv1", z_bmc), heads // 2)
    global_bnc, p_bhnm = _attention(q_bhnd, k_bhmd, v_bhmd)
    received_bhw = p_bhnm.detach().mean(1).mean(1).reshape(b, h_z, w_z)
    rows = [y * h_z // h for y in range(h)]
    cols = [x * w_z // w for x in range(w)]
    significance_bhw = received_bhw[:, rows][:, :, cols]

    q_bhwc = _linear(state, f"{key}.q2", x_bhwc)
    kv_bhwc = _linear(state, f"{key}.kv2", x_bhwc)
    q, kv, real = (_windows(t) for t in (q_bhwc, kv_bhwc, x_bhwc.new_ones(b, h, w, 1)))
    k_bhmd, v_bhmd = _keys_values(kv, heads // 2)
    local, p = _attention(_heads(q, heads // 2), k_bhmd, v_bhmd, real.transpose(1, 2).unsqueeze(1))
    received = (p.detach().mean(1) * real).sum(1, keepdim=True).transpose(1, 2) / WINDOW**2
    local_bhwc, received_bhwc = (_unwindows(t, h, w) for t in (local, received))
    significance_bhw = significance_bhw + received_bhwc[..., 0]
    out_bnc = torch.cat([global_bnc, local_bhwc.flatten(1, 2)], -1)
    return _project(state, key, x_bhwc, out_bnc), significance_bhw


def _guided_attention(
    state: State, key: str, x_bhwc: Tensor, heads: int, significance_bhw: Tensor, runs: tuple[int, ...]
) -> Tensor:
    x_bnc = x_bhwc.flatten(1, 2)
    q_bhnd = _heads(_linear(state, f"{key}.q", x_bnc), heads)
    outputs = []
    for part, (tokens, s) in enumerate(
        [(x_bhwc, significance_bhw), (x_bhwc.transpose(1, 2), significance_bhw.transpose(1, 2))]
    ):
        order_bn = s.flatten(1).sort(dim=1, stable=True).indices
        merged_bmc = _merge(state, key, _take(tokens.flatten(1, 2), order_bn), runs)
        k_bhmd, v_bhmd = _keys_values(_linear(state, f"{key}.kv{part + 1}", merged_bmc), heads // 2)
        outputs.append(_attention(q_bhnd.chunk(2, 1)[part], k_bhmd, v_bhmd)[0])
    return _project(state, key, x_bhwc, torch.cat(outputs, -1))


def _merge(state: State, key: str, sorted_bnc: Tensor, runs: tuple[int, ...]) -> Tensor:
    n = sorted_bnc.shape[1]
    lengths = [n // 2] if len(runs) == 2 else [n // 4, 2 * (n // 4)]
    lengths.append(n - sum(lengths))
    merged = []
    for tier, (tier_bnc, run) in enumerate(zip(sorted_bnc.split(lengths, 1), runs, strict=True), start=1):
        length = tier_bnc.shape[1]
        groups = max(1, math.ceil(length / run))
        stretched = [t * length // (groups * run) for t in range(groups * run)]
        runs_bgcr = tier_bnc[:, stretched].reshape(len(tier_bnc), groups, run, -1).transpose(2, 3)
        merged.append(_linear(state, f"{key}.f{tier}", runs_bgcr).squeeze(3))
    return torch.cat(merged, 1)


def _project(state: State, key: str, x_bhwc: Tensor, out_bnc: Tensor) -> Tensor:
    lepe_bhwc = _depthwise(state, f"{key}.lepe_conv", _linear(state, f"{key}.lepe_linear", x_bhwc))
    return _linear(state, f"{key}.proj", out_bnc.reshape(x_bhwc.shape) + lepe_bhwc)


def _attention(q_bhnd: Tensor, k_bhmd: Tensor, v_bhmd: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (output (B, N, C), weights (B, heads, N, M)); `real` is 0 for keys that are none."""
    exponents = q_bhnd @ k_bhmd.transpose(2, 3) * q_bhnd.shape[3] ** -0.5
    weights = (exponents - exponents.amax(-1, keepdim=True)).exp()
    if real is not None:
        weights = weights * real
    p_bhnm = weights / weights.sum(-1, keepdim=True)
    return (p_bhnm @ v_bhmd).transpose(1, 2).flatten(2), p_bhnm


# Formulas of layers, and layouts


def _linear(state: State, key: str, x: Tensor) -> Tensor:
    return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]


def _conv_norm(state: State, key: str, x_bchw: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    weight = state[f"{key}.c.weight"]
    y_bchw = F.conv2d(x_bchw, weight, None, stride, padding, groups=x_bchw.shape[1] // weight.shape[1])
    centred = y_bchw - y_bchw.mean((1, 2, 3), keepdim=True)
    normed = centred / (centred.square().mean((1, 2, 3), keepdim=True) + DEFAULT_EPS).sqrt()
    return normed * state[f"{key}.bn.weight"][:, None, None] + state[f"{key}.bn.bias"][:, None, None]


def _depthwise(state: State, key: str, x_bhwc: Tensor) -> Tensor:
    weight = state[f"{key}.weight"]
    return _nhwc(F.conv2d(_nchw(x_bhwc), weight, state[f"{key}.bias"], padding=1, groups=len(weight)))


def _layer_norm(state: State, key: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    var = centred.square().mean(dim=-1, keepdim=True)
    return centred / (var + eps).sqrt() * state[f"{key}.weight"] + state[f"{key}.bias"]


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _nhwc(x_bchw: Tensor) -> Tensor:
    return x_bchw.permute(0, 2, 3, 1)


def _nchw(x_bhwc: Tensor) -> Tensor:
    return x_bhwc.permute(0, 3, 1, 2)


def _heads(x_bnc: Tensor, heads: int) -> Tensor:
    return x_bnc.reshape(*x_bnc.shape[:2], heads, -1).transpose(1, 2)


def _keys_values(x_bmc: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    keys, values = x_bmc.chunk(2, -1)
    return _heads(keys, heads), _heads(values, heads)


def _windows(x_bhwc: Tensor) -> Tensor:
    """Return the windows of a map, the last ones filled with zeros: (B windows, 49, C)."""
    h, w, c = x_bhwc.shape[1:]
    x = F.pad(x_bhwc, (0, 0, 0, -w % WINDOW, 0, -h % WINDOW))
    x = x.reshape(-1, x.shape[1] // WINDOW, WINDOW, x.shape[2] // WINDOW, WINDOW, c)
    return x.transpose(2, 3).reshape(-1, WINDOW * WINDOW, c)


def _unwindows(x_bnc: Tensor, h: int, w: int) -> Tensor:
    rows, cols = math.ceil(h / WINDOW), math.ceil(w / WINDOW)
    x = x_bnc.reshape(-1, rows, cols, WINDOW, WINDOW, x_bnc.shape[2]).transpose(2, 3)
    return x.reshape(-1, rows * WINDOW, cols * WINDOW, x_bnc.shape[2])[:, :h, :w]


def _take(x_bnc: Tensor, index_bn: Tensor) -> Tensor:
    return x_bnc.gather(1, index_bn[:, :, None].expand(-1, -1, x_bnc.shape[2]))
