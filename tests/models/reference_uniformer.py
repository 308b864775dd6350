"""A literal UniFormer for the tests: the formulas one by one, on state dicts in the official format.

UniFormer: Unifying Convolution and Self-attention for Visual Recognition, https://arxiv.org/abs/2201.09450.
Written for checking, not for speed: softmax, norms and windows are spelled out, and pruning sorts. Evaluation
mode only (batch norms use their running statistics; no dropout, no drop path). Everything is differentiable
with respect to the images and to the float entries of the state dict.

Layouts in names: b batch, h and w height and width, n tokens in raster order, c channels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_LN_EPS = 1e-6  # blocks and dense output norms
DEFAULT_LN_EPS = 1e-5  # patch embeddings
BN_EPS = 1e-5
PRUNE_RATIO = 0.5
TRADE_OFF = 0.5

State = Mapping[str, Tensor]


@dataclass
class Config:
    """An architecture; `dims` are the widths of the four stages, `head_dim` divides the last two."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    head_dim: int
    mlp_ratio: float = 4
    conv_stem: bool = False
    conv_downsample: bool = False
    light: bool = False
    layer_scale: Literal["none", "attention", "all"] = "none"  # which blocks have gammas
    token_labelling: bool = False
    dense: bool = False  # output norms in place of the classifier
    attention: Literal["global", "window", "hybrid"] = "global"  # of stage 3
    window_size: int = 14

    def __post_init__(self) -> None:
        if self.light and (self.layer_scale != "none" or self.token_labelling or self.attention != "global"):
            raise ValueError("light=True: layer_scale, token_labelling and windowed attention are not defined for it")


_DIMS = (64, 128, 320, 512)
_SMALL, _PLUS, _BASE = (3, 4, 8, 3), (3, 5, 9, 3), (5, 8, 20, 7)

VARIANTS: dict[str, Config] = {
    "uniformer_small": Config(_SMALL, _DIMS, 64),
    "uniformer_small_plus": Config(_PLUS, _DIMS, 32, conv_stem=True, conv_downsample=True),
    "uniformer_small_plus_dim64": Config(_PLUS, _DIMS, 64, conv_stem=True, conv_downsample=True),
    "uniformer_base": Config(_BASE, _DIMS, 64),
    "uniformer_base_ls": Config(_BASE, _DIMS, 64, layer_scale="attention"),
    "uniformer_xxs": Config((2, 5, 8, 2), (56, 112, 224, 448), 28, mlp_ratio=3, conv_stem=True, light=True),
    "uniformer_xs": Config((3, 5, 9, 3), (64, 128, 256, 512), 32, mlp_ratio=3, conv_stem=True, light=True),
    "uniformer_small_tl": Config(_SMALL, _DIMS, 32, token_labelling=True),
    "uniformer_small_dim64_tl": Config(_SMALL, _DIMS, 64, token_labelling=True),
    "uniformer_small_plus_tl": Config(_PLUS, _DIMS, 32, conv_stem=True, conv_downsample=True, token_labelling=True),
    "uniformer_small_plus_dim64_tl": Config(
        _PLUS, _DIMS, 64, conv_stem=True, conv_downsample=True, token_labelling=True
    ),
    "uniformer_base_tl": Config(_BASE, _DIMS, 32, token_labelling=True),
    "uniformer_base_dim64_tl": Config(_BASE, _DIMS, 64, token_labelling=True),
    "uniformer_large_ls_tl": Config((5, 10, 24, 7), (128, 192, 448, 640), 64, layer_scale="all", token_labelling=True),
}


def state_dict_shapes(config: Config, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of the official checkpoint, buffers included."""
    shapes: dict[str, tuple[int, ...]] = {}

    def weight_bias(key: str, *shape: int) -> None:
        shapes[f"{key}.weight"] = shape
        shapes[f"{key}.bias"] = shape[:1]

    def batch_norm(key: str, c: int) -> None:
        weight_bias(key, c)
        shapes[f"{key}.running_mean"] = shapes[f"{key}.running_var"] = (c,)
        shapes[f"{key}.num_batches_tracked"] = ()

    def embedding(key: str, stage: int, c_in: int, c: int) -> None:
        if stage == 1 and config.conv_stem:
            weight_bias(f"{key}.proj.0", c // 2, c_in, 3, 3)
            batch_norm(f"{key}.proj.1", c // 2)
            weight_bias(f"{key}.proj.3", c, c // 2, 3, 3)
            batch_norm(f"{key}.proj.4", c)
        elif stage > 1 and config.conv_downsample:
            weight_bias(f"{key}.proj.0", c, c_in, 3, 3)
            batch_norm(f"{key}.proj.1", c)
        else:
            k = 4 if stage == 1 else 2
            weight_bias(f"{key}.proj", c, c_in, k, k)
            weight_bias(f"{key}.norm", c)

    def block(key: str, stage: int, c: int) -> None:
        hidden = int(config.mlp_ratio * c)
        weight_bias(f"{key}.pos_embed", c, 1, 3, 3)
        if stage <= 2:
            batch_norm(f"{key}.norm1", c)
            weight_bias(f"{key}.conv1", c, c, 1, 1)
            weight_bias(f"{key}.attn", c, 1, 5, 5)
            weight_bias(f"{key}.conv2", c, c, 1, 1)
            batch_norm(f"{key}.norm2", c)
            weight_bias(f"{key}.mlp.fc1", hidden, c, 1, 1)
            weight_bias(f"{key}.mlp.fc2", c, hidden, 1, 1)
        else:
            weight_bias(f"{key}.norm1", c)
            weight_bias(f"{key}.attn.qkv", 3 * c, c)
            weight_bias(f"{key}.attn.proj", c, c)
            weight_bias(f"{key}.norm2", c)
            weight_bias(f"{key}.mlp.fc1", hidden, c)
            weight_bias(f"{key}.mlp.fc2", c, hidden)
        if config.layer_scale == "all" or (config.layer_scale == "attention" and stage >= 3):
            shapes[f"{key}.gamma_1"] = shapes[f"{key}.gamma_2"] = (1, c, 1, 1) if stage <= 2 else (c,)

    c_in = 3
    for stage, (depth, c) in enumerate(zip(config.depths, config.dims, strict=True), start=1):
        embedding(f"patch_embed{stage}", stage, c_in, c)
        for j in range(depth):
            block(f"blocks{stage}.{j}", stage, c)
        if config.dense:
            weight_bias(f"norm{stage}", c)
        c_in = c
    if config.light:
        shapes["cls_token"] = (1, 1, config.dims[2])
        weight_bias("cls_upsample", config.dims[3], config.dims[2])
    if not config.dense:
        batch_norm("norm", c_in)
        weight_bias("head", num_classes, c_in)
        if config.token_labelling:
            weight_bias("aux_head", num_classes, c_in)
        if config.light:
            weight_bias("norm_cls", c_in)
            weight_bias("head_cls", num_classes, c_in)
    return shapes


def forward(state: State, x_bchw: Tensor, config: Config) -> tuple[Tensor | None, list[Tensor]]:
    """Return (logits, maps of the four stages), in evaluation mode.

    Args:
        state: state dict with the keys of :func:`state_dict_shapes` (`num_batches_tracked` may be absent).
        x_bchw: images (B, 3, H, W), H and W at least 32, of the dtype of `state`.

    Returns:
        Logits (B, classes), None in dense mode; maps (B, C, H / stride, W / stride): the raw outputs of the last
        blocks, in dense mode their layer norms.

    Raises:
        ValueError: `state` lacks a key, or has one that the architecture has not.
    """
    differing = {k for k in state.keys() ^ state_dict_shapes(config) if not k.endswith("num_batches_tracked")}
    if differing:
        raise ValueError(f"state: keys missing or not of this architecture: {sorted(differing)}")

    maps = []
    cls_b1c = x_bchw.new_empty(0)  # of the light models, from stage 3 on
    score_bn = None
    for stage, (depth, c) in enumerate(zip(config.depths, config.dims, strict=True), start=1):
        x_bchw = _embed(state, x_bchw, stage, config)
        heads = c // config.head_dim  # used from stage 3 on
        if config.light and stage == 3:
            cls_b1c = state["cls_token"].expand(len(x_bchw), 1, c)
        elif config.light and stage == 4:
            cls_b1c = _linear(state, "cls_upsample", cls_b1c)
        for j in range(depth):
            key = f"blocks{stage}.{j}"
            if stage <= 2:
                x_bchw = _conv_block(state, key, x_bchw)
            elif config.light:
                x_bchw, cls_b1c, score_bn = _light_block(state, key, x_bchw, cls_b1c, score_bn, heads)
            else:
                x_bchw = _attention_block(state, key, x_bchw, heads, _window(config, stage, j))
        if stage == 3 and score_bn is not None:
            score_bn = _pool_score(score_bn, *x_bchw.shape[2:])
        maps.append(x_bchw)

    if config.dense:
        return None, [_map(_layer_norm(state, f"norm{i}", _nhwc(m), BLOCK_LN_EPS)) for i, m in enumerate(maps, start=1)]
    z_bnc = _tokens(_batch_norm(state, "norm", x_bchw))
    logits = _linear(state, "head", z_bnc.mean(dim=1))
    if config.token_labelling:
        logits = logits + 0.5 * _linear(state, "aux_head", z_bnc).amax(dim=1)
    return logits, maps


# Blocks


def _embed(state: State, x_bchw: Tensor, stage: int, config: Config) -> Tensor:
    key = f"patch_embed{stage}"
    if stage == 1 and config.conv_stem:
        x_bchw = _batch_norm(state, f"{key}.proj.1", _conv(state, f"{key}.proj.0", x_bchw, stride=2, padding=1))
        x_bchw = _conv(state, f"{key}.proj.3", _gelu(x_bchw), stride=2, padding=1)
        return _batch_norm(state, f"{key}.proj.4", x_bchw)
    if stage > 1 and config.conv_downsample:
        return _batch_norm(state, f"{key}.proj.1", _conv(state, f"{key}.proj.0", x_bchw, stride=2, padding=1))
    x_bchw = _conv(state, f"{key}.proj", x_bchw, stride=4 if stage == 1 else 2)
    return _map(_layer_norm(state, f"{key}.norm", _nhwc(x_bchw), DEFAULT_LN_EPS))


def _conv_block(state: State, key: str, x_bchw: Tensor) -> Tensor:
    gamma_1, gamma_2 = _gammas(state, key)
    x_bchw = x_bchw + _depthwise(state, f"{key}.pos_embed", x_bchw)
    y_bchw = _conv(state, f"{key}.conv1", _batch_norm(state, f"{key}.norm1", x_bchw))
    x_bchw = x_bchw + gamma_1 * _conv(state, f"{key}.conv2", _depthwise(state, f"{key}.attn", y_bchw))
    y_bchw = _gelu(_conv(state, f"{key}.mlp.fc1", _batch_norm(state, f"{key}.norm2", x_bchw)))
    return x_bchw + gamma_2 * _conv(state, f"{key}.mlp.fc2", y_bchw)


def _attention_block(state: State, key: str, x_bchw: Tensor, heads: int, window: int | None) -> Tensor:
    """`window` is the side of the attention windows; None for global attention."""
    gamma_1, gamma_2 = _gammas(state, key)
    x_bhwc = _nhwc(x_bchw + _depthwise(state, f"{key}.pos_embed", x_bchw))
    b, h, w, c = x_bhwc.shape
    y_bhwc = _layer_norm(state, f"{key}.norm1", x_bhwc, BLOCK_LN_EPS)
    if window is None:
        y_bhwc = _attention(state, key, y_bhwc.reshape(b, h * w, c), heads)[0].reshape(b, h, w, c)
    else:
        y_bhwc = _window_attention(state, key, y_bhwc, heads, window)
    x_bhwc = x_bhwc + gamma_1 * y_bhwc
    return _map(x_bhwc + gamma_2 * _mlp(state, key, x_bhwc))


def _light_block(
    state: State, key: str, x_bchw: Tensor, cls_b1c: Tensor, score_bn: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (map, class token, score) after a block; with no score yet, all tokens are attended over."""
    x_bchw = x_bchw + _depthwise(state, f"{key}.pos_embed", x_bchw)
    x_bnc = _tokens(x_bchw)
    if score_bn is None:
        t, cls_attention, _ = _attend_and_mlp(state, key, torch.cat([cls_b1c, x_bnc], dim=1), heads)
        cls_b1c, x_bnc, score_bn = t[:, :1], t[:, 1:], cls_attention[:, 1:]
    else:
        tokens = x_bnc.shape[1]
        n = int(tokens * PRUNE_RATIO)
        order = score_bn.argsort(dim=1, descending=True, stable=True)
        x_bnc, score_bn = _take(x_bnc, order), score_bn.gather(1, order)
        x_kept, x_dropped, s_dropped = x_bnc[:, :n], x_bnc[:, n:], score_bn[:, n:]
        share = s_dropped / s_dropped.sum(dim=1, keepdim=True)
        representative_b1c = (share[:, :, None] * x_dropped).sum(dim=1, keepdim=True)

        t, cls_attention, change = _attend_and_mlp(
            state, key, torch.cat([cls_b1c, x_kept, representative_b1c], dim=1), heads
        )
        cls_b1c = t[:, :1]
        x_bnc = torch.cat([t[:, 1 : n + 1], x_dropped + change[:, -1:]], dim=1)
        # One dropped token only: the official code takes the block for an unpruned one and updates that score too.
        updated = n + 1 if tokens == n + 1 else n
        new_score = (1 - TRADE_OFF) * score_bn[:, :updated] + TRADE_OFF * cls_attention[:, 1 : updated + 1]
        score_bn = torch.cat([new_score, score_bn[:, updated:]], dim=1)

        raster = order.argsort(dim=1)
        x_bnc, score_bn = _take(x_bnc, raster), score_bn.gather(1, raster)
    return _map(x_bnc.reshape(_nhwc(x_bchw).shape)), cls_b1c, score_bn


def _attend_and_mlp(state: State, key: str, t_bnc: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens, class attention (B, n), sum of the two branches' outputs) of the sequence with class first."""
    a_bnc, p_bhnn = _attention(state, key, _layer_norm(state, f"{key}.norm1", t_bnc, BLOCK_LN_EPS), heads)
    t_bnc = t_bnc + a_bnc
    m_bnc = _mlp(state, key, t_bnc)
    return t_bnc + m_bnc, p_bhnn[:, :, 0].mean(dim=1), a_bnc + m_bnc


def _pool_score(score_bn: Tensor, h: int, w: int) -> Tensor:
    """Return the score on the grid of stage 4, with the sum that it had on the (h, w) grid of stage 3."""
    pooled = F.avg_pool2d(score_bn.reshape(-1, 1, h, w), kernel_size=2, stride=2).flatten(1)
    return pooled * (score_bn.sum(dim=1, keepdim=True) / pooled.sum(dim=1, keepdim=True))


def _attention(state: State, key: str, y_bnc: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return (output, attention probabilities (B, heads, N, N)) of multi-head attention over all tokens."""
    b, n, c = y_bnc.shape
    d = c // heads
    q, k, v = _linear(state, f"{key}.attn.qkv", y_bnc).reshape(b, n, 3, heads, d).permute(2, 0, 3, 1, 4)
    exponents = q @ k.transpose(-2, -1) * d**-0.5
    weights = (exponents - exponents.amax(dim=-1, keepdim=True)).exp()
    p_bhnn = weights / weights.sum(dim=-1, keepdim=True)
    out_bnc = (p_bhnn @ v).transpose(1, 2).reshape(b, n, c)
    return _linear(state, f"{key}.attn.proj", out_bnc), p_bhnn


def _window_attention(state: State, key: str, y_bhwc: Tensor, heads: int, window: int) -> Tensor:
    """Attend within windows, one at a time; the zeros that fill the last ones take part as keys and values."""
    b, h, w, c = y_bhwc.shape
    y_bhwc = F.pad(y_bhwc, (0, 0, 0, -w % window, 0, -h % window))
    rows = []
    for top in range(0, h, window):
        row = []
        for left in range(0, w, window):
            tokens = y_bhwc[:, top : top + window, left : left + window].reshape(b, window * window, c)
            row.append(_attention(state, key, tokens, heads)[0].reshape(b, window, window, c))
        rows.append(torch.cat(row, dim=2))
    return torch.cat(rows, dim=1)[:, :h, :w]


def _mlp(state: State, key: str, x: Tensor) -> Tensor:
    hidden = _gelu(_linear(state, f"{key}.mlp.fc1", _layer_norm(state, f"{key}.norm2", x, BLOCK_LN_EPS)))
    return _linear(state, f"{key}.mlp.fc2", hidden)


# Which block has what


def _gammas(state: State, key: str) -> tuple[Tensor | float, Tensor | float]:
    return state.get(f"{key}.gamma_1", 1.0), state.get(f"{key}.gamma_2", 1.0)


def _window(config: Config, stage: int, j: int) -> int | None:
    is_global = config.attention == "global" or (config.attention == "hybrid" and (j + 1) % 4 == 0)
    return None if stage == 4 or is_global else config.window_size


# Formulas of layers, and layouts


def _linear(state: State, key: str, x: Tensor) -> Tensor:
    return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]


def _conv(state: State, key: str, x_bchw: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    return F.conv2d(x_bchw, state[f"{key}.weight"], state[f"{key}.bias"], stride, padding)


def _depthwise(state: State, key: str, x_bchw: Tensor) -> Tensor:
    weight = state[f"{key}.weight"]
    return F.conv2d(x_bchw, weight, state[f"{key}.bias"], padding=weight.shape[-1] // 2, groups=len(weight))


def _batch_norm(state: State, key: str, x_bchw: Tensor) -> Tensor:
    mean, var, weight, bias = (
        state[f"{key}.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x_bchw - mean) / (var + BN_EPS).sqrt() * weight + bias


def _layer_norm(state: State, key: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    var = centred.square().mean(dim=-1, keepdim=True)
    return centred / (var + eps).sqrt() * state[f"{key}.weight"] + state[f"{key}.bias"]


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _nhwc(x_bchw: Tensor) -> Tensor:
    return x_bchw.permute(0, 2, 3, 1)


def _map(x_bhwc: Tensor) -> Tensor:
    return x_bhwc.permute(0, 3, 1, 2)


def _tokens(x_bchw: Tensor) -> Tensor:
    return x_bchw.flatten(2).transpose(1, 2)


def _take(x_bnc: Tensor, index_bn: Tensor) -> Tensor:
    return x_bnc.gather(1, index_bn[:, :, None].expand(-1, -1, x_bnc.shape[2]))
