"""S2AFormer: strip self-attention, whose queries and keys have one channel per head.

Paper: "S2AFormer: Strip Self-Attention for Efficient Vision Transformer", arXiv 2505.22195.
Written from what is publicly said of the paper; its authors have released neither code nor weights. The docstring of
:class:`S2AFormer` says what is theirs, what follows from their figures, and what is our choice.

Layouts in names: b batch, c channels, h and w rows and columns, n tokens in raster order, m tokens of the reduced map,
h and d heads and the channels of one where they come together.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from effbackbones.layers import (
    DepthwiseResidual,
    Linear,
    Mlp,
    ProjectionHead,
    attend,
    fold_norm,
    laid_out,
    pad_to_windows,
    use_reference,
)
from effbackbones.models._hierarchical import (
    HierarchicalBackbone,
    Stage,
    backbone_cfg,
    create_backbone,
    init_conv,
    init_linear,
)


class StemLayer(nn.Module):
    """A 3x3 convolution, a batch norm, a GELU."""

    def __init__(self, in_dim: int, dim: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return F.gelu(self.bn(self.conv(x_bchw)))

    def fold(self) -> None:
        fold_norm(self, "bn", self.conv)


class Stem(nn.Sequential):
    """Three 3x3 convolutions, the first of stride 2. From here on maps lie in memory channels last.

    The reference path copies those of convolutions to channels first.
    """

    def __init__(self, in_chans: int, dim: int):
        super().__init__(StemLayer(in_chans, dim, 2), StemLayer(dim, dim, 1), StemLayer(dim, dim, 1))

    def forward(self, x_bchw: Tensor) -> Tensor:
        return super().forward(laid_out(x_bchw))


class PatchEmbed(nn.Module):
    """Patches of 2x2 and a layer norm; zeros at the bottom and the right fill the last ones of an odd size."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 2, stride=2)
        self.norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bhwc = pad_to_windows(x_bchw.permute(0, 2, 3, 1), (2, 2))
        return self.norm(self.conv(x_bhwc.permute(0, 3, 1, 2)))


class StripAttention(nn.Module):
    """Attention of all tokens to a spatially reduced map, with queries and keys of one channel per head.

    A logit is a single product, q times k, that no scale makes smaller: it stays in float32 under autocast.
    """

    def __init__(self, dim: int, heads: int, sr_ratio: int):
        super().__init__()
        self.heads = heads
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, groups=dim, bias=False)
            self.sr_bn = nn.BatchNorm2d(dim)
        self.q = nn.Linear(dim, heads)
        self.k = nn.Linear(dim, heads)
        self.v = Linear(dim, dim)
        self.proj = Linear(dim, dim)

    def _reduced(self, x_bhwc: Tensor) -> Tensor:
        """Return the tokens that keys and values are made of, (B, M, C)."""
        if self.sr_ratio > 1:
            x_bchw = pad_to_windows(x_bhwc, (self.sr_ratio, self.sr_ratio)).permute(0, 3, 1, 2)
            x_bhwc = self.sr_bn(self.sr(laid_out(x_bchw))).permute(0, 2, 3, 1)
        return x_bhwc.flatten(1, 2)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        x_bnc, y_bmc = x_bhwc.flatten(1, 2), self._reduced(x_bhwc)
        v_bmc = self.v(y_bmc)
        early = self.heads == 1 and not use_reference()
        if early:
            v_bmc = self.proj(v_bmc)  # rows of attention weights sum to 1, so it may as well come first: M <= N
        v_bhmd = v_bmc.unflatten(2, (self.heads, -1)).transpose(1, 2)
        with nullcontext() if x_bhwc.is_meta else torch.autocast(x_bhwc.device.type, enabled=False):
            out_bhnd = strip_attention(strip(x_bnc, self.q), strip(y_bmc, self.k), v_bhmd)
        out_bhwc = out_bhnd.transpose(1, 2).reshape(x_bhwc.shape)
        return out_bhwc if early else self.proj(out_bhwc)

    def fold(self) -> None:
        if self.sr_ratio > 1:
            fold_norm(self, "sr_bn", self.sr)


def strip(x_bnc: Tensor, layer: nn.Linear) -> Tensor:
    """Return the queries or keys of tokens, one channel for each head: (B, heads, N, 1), at least in float32."""
    dtype = torch.promote_types(x_bnc.dtype, torch.float32)
    x_bnh = F.linear(x_bnc.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
    return x_bnh.transpose(1, 2).unsqueeze(-1)


def strip_attention(q_bhn1: Tensor, k_bhm1: Tensor, v_bhmd: Tensor) -> Tensor:
    """Return softmax(q k^T) v, (B, heads, N, d), in v's dtype; it is computed in that of q and k."""
    return attend(q_bhn1, k_bhm1, v_bhmd.to(q_bhn1.dtype), scale=1.0).to(v_bhmd.dtype)


class LocalInteraction(nn.Module):
    """Two 3x3 depthwise convolutions with a batch norm and a GELU between, on maps (B, H, W, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dw1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)
        self.dw2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        x_bchw = F.gelu(self.bn(self.dw1(laid_out(x_bhwc.permute(0, 3, 1, 2)))))
        return self.dw2(x_bchw).permute(0, 2, 3, 1)

    def fold(self) -> None:
        fold_norm(self, "bn", self.dw1)


class Block(nn.Module):
    """Hybrid perception block: a depthwise residual, strip self-attention, local interaction, an MLP."""

    def __init__(self, dim: int, heads: int, sr_ratio: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.lpu = DepthwiseResidual(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = StripAttention(dim, heads, sr_ratio)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.lim = LocalInteraction(dim)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x = self.lpu(laid_out(x_bchw)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.lim(self.norm2(x)))
        x = x + self.drop_path(self.mlp(self.norm3(x)))
        return x.permute(0, 3, 1, 2)


class S2AFormer(HierarchicalBackbone):
    """S2AFormer: every block has strip self-attention and a local interaction module. Our reading of the paper.

    There is no official code and there are no official weights, so this is no port of the authors' models:

    - Said of the paper: a stem of three 3x3 convolutions, the first of stride 2; four stages, each a patch embedding of
      stride 2 and hybrid perception blocks (depthwise convolution, strip self-attention, local interaction module, MLP,
      each a residual, the last three after a layer norm); keys and values from a map that a depthwise convolution
      reduces; queries and keys compressed in channels, values not; no position embedding is mentioned.
    - Inferred from its tables: a wide projection before the classifier, as no other head reaches the published pairs of
      parameters and multiply-adds; multiply-adds that leave the attention products out.
    - Our choice: widths, depths, heads and the width of the head, such that all published parameters and multiply-adds
      come out to the last digit given; one query and key channel per head, and no scale on their product; the
      reduction ratios and the batch norm after the reduction; the inside of the local interaction module; patches of
      2x2; kernels, norms, activations, biases, MLP ratio, initialisation, padding and the output norms.

    Published accuracies belong to the authors' models. Takes images of any size; every stride of 2 rounds up.

    Args:
        depths: Blocks of the four stages.
        dims: Channels of the four stages.
        num_heads: Attention heads of the four stages; a checkpoint's shapes tell them.
        sr_ratios: By how much keys and values are reduced in rows and in columns, of the four stages; 1 for not at all.
        stem_width: Channels of the stem.
        mlp_ratio: Hidden width of an MLP over its width.
        head_hidden_size: Channels of the projection before the classifier.
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for none, the projection stays.
        global_pool: Pooling of the classifier, by timm's name.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last block; from 0 it grows linearly over the blocks.
        img_size: Taken for uniformity; nothing depends on it.
        dense: Dense-prediction mode: an output norm on every map, no projection and no classifier.

    Raises:
        ValueError: `num_heads` does not divide `dims`.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 11, 3),
        dims: Sequence[int] = (32, 56, 112, 280),
        num_heads: Sequence[int] = (1, 1, 2, 7),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        stem_width: int = 16,
        mlp_ratio: float = 4.0,
        head_hidden_size: int = 1280,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
        dense: bool = False,
    ):
        if any(dim % heads for dim, heads in zip(dims, num_heads, strict=True)):
            raise ValueError(f"num_heads={tuple(num_heads)} does not divide dims={tuple(dims)} stage by stage")
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (in_dim, dim) in enumerate(zip((stem_width, *dims), dims, strict=False)):
            blocks = [Block(dim, num_heads[i], sr_ratios[i], mlp_ratio, rate) for rate in rates[i]]
            stages.append(Stage(PatchEmbed(in_dim, dim), blocks))
        head = (
            None
            if dense
            else ProjectionHead(
                dims[-1],
                head_hidden_size,
                num_classes,
                nn.GELU(),
                bias=False,
                pool_type=global_pool,
                drop_rate=drop_rate,
            )
        )
        super().__init__(
            Stem(in_chans, stem_width),
            stages,
            dims,
            norm=nn.Identity(),
            output_norms=[LayerNorm2d(dim, eps=1e-6) for dim in dims] if dense else None,
            head=head,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    init_linear(module)
    init_conv(module)
    if isinstance(module, StripAttention):  # after its layers
        for layer in (module.q, module.k):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # strips of variance 1
    elif isinstance(module, Block):
        # Its output meets no norm before it adds to the map, whose variance it would multiply by 3, block after block.
        trunc_normal_(module.lpu.weight, std=0.02)


_cfg = partial(
    backbone_cfg,
    crop_pct=0.9,
    first_conv="stem.0.conv",
    license="apache-2.0",
    paper_ids="arXiv:2505.22195",
    paper_name="S2AFormer: Strip Self-Attention for Efficient Vision Transformer",
    origin_url="https://arxiv.org/abs/2505.22195",
)


default_cfgs = generate_default_cfgs(
    {
        "s2aformer_mini.untrained": _cfg(),
        "s2aformer_t.untrained": _cfg(),
        "s2aformer_xs.untrained": _cfg(),
        "s2aformer_s.untrained": _cfg(),
        "s2aformer_m.untrained": _cfg(),
    }
)


_create = partial(create_backbone, S2AFormer)


@register_model
def s2aformer_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S2AFormer-mini."""
    args = {"depths": (1, 1, 3, 4), "dims": (32, 64, 160, 240), "num_heads": (1, 2, 5, 6)}
    return _create("s2aformer_mini", pretrained, args, kwargs)


@register_model
def s2aformer_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S2AFormer-T."""
    args = {"depths": (3, 3, 11, 3), "dims": (32, 56, 112, 280), "num_heads": (1, 1, 2, 7)}
    return _create("s2aformer_t", pretrained, args, kwargs)


@register_model
def s2aformer_xs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S2AFormer-XS."""
    args = {"depths": (2, 3, 7, 3), "dims": (32, 80, 160, 288), "num_heads": (1, 2, 4, 6)}
    return _create("s2aformer_xs", pretrained, args, kwargs)


@register_model
def s2aformer_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S2AFormer-S."""
    args = {"depths": (2, 2, 12, 3), "dims": (40, 96, 192, 352), "num_heads": (1, 2, 4, 11)}
    return _create("s2aformer_s", pretrained, args, kwargs)


@register_model
def s2aformer_m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """S2AFormer-M."""
    args = {
        "depths": (3, 3, 12, 3),
        "dims": (72, 160, 320, 528),
        "num_heads": (1, 2, 5, 6),
        "stem_width": 32,
    }
    return _create("s2aformer_m", pretrained, args, kwargs)
