"""A literal S2AFormer for the tests: the formulas one by one, on state dicts of our format.

S2AFormer: Strip Self-Attention for Efficient Vision Transformer, https://arxiv.org/abs/2505.22195 (there is no official
code). Written for checking, not for speed: softmax and norms are spelled out, nothing is folded or reordered.
Evaluation mode only (batch norms use their running statistics; no dropout, no drop path). Everything is differentiable
with respect to the images and to the float entries of the state dict.

Layouts in names: b batch, h and w height and width, n tokens in raster order, m reduced tokens, c channels, d channels
of one head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LN_EPS = 1e-6
BN_EPS = 1e-5

State = Mapping[str, Tensor]


@dataclass
class Config:
    """An architecture; four numbers are those of the four stages."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    num_heads: tuple[int, int, int, int]
    stem_width: int = 16
    sr_ratios: tuple[int, int, int, int] = (8, 4, 2, 1)
    mlp_ratio: int = 4
    head_hidden_size: int = 1280
    dense: bool = False  # output norms in place of the classifier


VARIANTS: dict[str, Config] = {
    "s2aformer_mini": Config((1, 1, 3, 4), (32, 64, 160, 240), (1, 2, 5, 6)),
    "s2aformer_t": Config((3, 3, 11, 3), (32, 56, 112, 280), (1, 1, 2, 7)),
    "s2aformer_xs": Config((2, 3, 7, 3), (32, 80, 160, 288), (1, 2, 4, 6)),
    "s2aformer_s": Config((2, 2, 12, 3), (40, 96, 192, 352), (1, 2, 4, 11)),
    "s2aformer_m": Config((3, 3, 12, 3), (72, 160, 320, 528), (1, 2, 5, 6), stem_width=32),
}


def state_dict_shapes(config: Config, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of the checkpoint, buffers included."""
    shapes: dict[str, tuple[int, ...]] = {}

    def weight_bias(key: str, *shape: int) -> None:
        shapes[f"{key}.weight"] = shape
        shapes[f"{key}.bias"] = shape[:1]

    def batch_norm(key: str, c: int) -> None:
        weight_bias(key, c)
        shapes[f"{key}.running_mean"] = shapes[f"{key}.running_var"] = (c,)
        shapes[f"{key}.num_batches_tracked"] = ()

    def block(key: str, c: int, heads: int, ratio: int) -> None:
        weight_bias(f"{key}.lpu", c, 1, 3, 3)
        weight_bias(f"{key}.norm1", c)
        if ratio > 1:
            shapes[f"{key}.attn.sr.weight"] = (c, 1, ratio, ratio)
            batch_norm(f"{key}.attn.sr_bn", c)
        weight_bias(f"{key}.attn.q", heads, c)
        weight_bias(f"{key}.attn.k", heads, c)
        weight_bias(f"{key}.attn.v", c, c)
        weight_bias(f"{key}.attn.proj", c, c)
        weight_bias(f"{key}.norm2", c)
        shapes[f"{key}.lim.dw1.weight"] = (c, 1, 3, 3)
        batch_norm(f"{key}.lim.bn", c)
        weight_bias(f"{key}.lim.dw2", c, 1, 3, 3)
        weight_bias(f"{key}.norm3", c)
        weight_bias(f"{key}.mlp.fc1", config.mlp_ratio * c, c)
        weight_bias(f"{key}.mlp.fc2", c, config.mlp_ratio * c)

    for n, c_in in enumerate((3, config.stem_width, config.stem_width)):
        shapes[f"stem.{n}.conv.weight"] = (config.stem_width, c_in, 3, 3)
        batch_norm(f"stem.{n}.bn", config.stem_width)
    c_in = config.stem_width
    for i, c in enumerate(config.dims):
        weight_bias(f"stages.{i}.downsample.conv", c, c_in, 2, 2)
        weight_bias(f"stages.{i}.downsample.norm", c)
        for j in range(config.depths[i]):
            block(f"stages.{i}.blocks.{j}", c, config.num_heads[i], config.sr_ratios[i])
        if config.dense:
            weight_bias(f"norms.{i}", c)
        c_in = c
    if not config.dense:
        shapes["head.conv.weight"] = (config.head_hidden_size, c_in, 1, 1)
        batch_norm("head.bn", config.head_hidden_size)
        weight_bias("head.fc", num_classes, config.head_hidden_size)
    return shapes


def forward(state: State, x_bchw: Tensor, config: Config) -> tuple[Tensor | None, list[Tensor]]:
    """Return (logits, maps of the four stages), in evaluation mode.

    Args:
        state: state dict with the keys of :func:`state_dict_shapes` (`num_batches_tracked` may be absent).
        x_bchw: images (B, 3, H, W), of the dtype of `state`.

    Returns:
        Logits (B, classes), None in dense mode; maps (B, C, ~H / stride, ~W / stride): the raw outputs of the last
        blocks, in dense mode their layer norms.

    Raises:
        ValueError: `state` lacks a key, or has one that the architecture has not.
    """
    differing = {k for k in state.keys() ^ state_dict_shapes(config) if not k.endswith("num_batches_tracked")}
    if differing:
        raise ValueError(f"state: keys missing or not of this architecture: {sorted(differing)}")

    for n in range(3):
        x_bchw = F.conv2d(x_bchw, state[f"stem.{n}.conv.weight"], stride=1 if n else 2, padding=1)
        x_bchw = _gelu(_batch_norm(state, f"stem.{n}.bn", x_bchw))
    maps = []
    for i in range(4):
        key = f"stages.{i}.downsample"
        x_bchw = _padded(x_bchw, 2)
        x_bchw = F.conv2d(x_bchw, state[f"{key}.conv.weight"], state[f"{key}.conv.bias"], stride=2)
        x_bchw = _layer_norm(state, f"{key}.norm", x_bchw)
        for j in range(config.depths[i]):
            x_bchw = _block(state, f"stages.{i}.blocks.{j}", x_bchw, config.num_heads[i], config.sr_ratios[i])
        maps.append(x_bchw)
    if config.dense:
        return None, [_layer_norm(state, f"norms.{i}", m) for i, m in enumerate(maps)]
    z_bchw = _gelu(_batch_norm(state, "head.bn", F.conv2d(x_bchw, state["head.conv.weight"])))
    return _linear(state, "head.fc", z_bchw.mean(dim=(2, 3))), maps


def _block(state: State, key: str, x_bchw: Tensor, heads: int, ratio: int) -> Tensor:
    x_bchw = _depthwise(state, f"{key}.lpu", x_bchw) + x_bchw
    x_bchw = _strip_attention(state, f"{key}.attn", _layer_norm(state, f"{key}.norm1", x_bchw), heads, ratio) + x_bchw
    x_bchw = _local_interaction(state, f"{key}.lim", _layer_norm(state, f"{key}.norm2", x_bchw)) + x_bchw
    z_bchw = _layer_norm(state, f"{key}.norm3", x_bchw)
    hidden_bnc = _gelu(_linear(state, f"{key}.mlp.fc1", _tokens(z_bchw)))
    return _map(_linear(state, f"{key}.mlp.fc2", hidden_bnc), z_bchw) + x_bchw


def _strip_attention(state: State, key: str, z_bchw: Tensor, heads: int, ratio: int) -> Tensor:
    y_bchw = z_bchw
    if ratio > 1:
        c = z_bchw.shape[1]
        y_bchw = F.conv2d(_padded(z_bchw, ratio), state[f"{key}.sr.weight"], stride=ratio, groups=c)
        y_bchw = _batch_norm(state, f"{key}.sr_bn", y_bchw)
    z_bnc, y_bmc = _tokens(z_bchw), _tokens(y_bchw)
    q_bnh, k_bmh, v_bmc = (_linear(state, f"{key}.{name}", t) for name, t in (("q", z_bnc), ("k", y_bmc), ("v", y_bmc)))
    outputs = []
    for t, v_bmd in enumerate(v_bmc.chunk(heads, dim=2)):
        logits_bnm = q_bnh[:, :, t, None] * k_bmh[:, None, :, t]
        outputs.append(_softmax(logits_bnm) @ v_bmd)
    return _map(_linear(state, f"{key}.proj", torch.cat(outputs, dim=2)), z_bchw)


def _local_interaction(state: State, key: str, z_bchw: Tensor) -> Tensor:
    z_bchw = _gelu(_batch_norm(state, f"{key}.bn", _depthwise(state, f"{key}.dw1", z_bchw)))
    return _depthwise(state, f"{key}.dw2", z_bchw)


# Formulas of layers, and layouts


def _linear(state: State, key: str, x: Tensor) -> Tensor:
    return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]


def _depthwise(state: State, key: str, x_bchw: Tensor) -> Tensor:
    return F.conv2d(x_bchw, state[f"{key}.weight"], state.get(f"{key}.bias"), padding=1, groups=x_bchw.shape[1])


def _padded(x_bchw: Tensor, multiple: int) -> Tensor:
    return F.pad(x_bchw, (0, -x_bchw.shape[3] % multiple, 0, -x_bchw.shape[2] % multiple))


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


def _softmax(logits: Tensor) -> Tensor:
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    return weights / weights.sum(dim=-1, keepdim=True)


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (x / math.sqrt(2)).erf())


def _tokens(x_bchw: Tensor) -> Tensor:
    return x_bchw.flatten(2).transpose(1, 2)


def _map(x_bnc: Tensor, like_bchw: Tensor) -> Tensor:
    return x_bnc.transpose(1, 2).reshape(len(x_bnc), -1, *like_bchw.shape[2:])
