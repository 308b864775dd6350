"""GC ViT: attention within windows, whose queries in every second block are a summary of the whole map.

Paper: "Global Context Vision Transformers", ICML 2023, arXiv 2206.09959.
Written from the paper and a specification of the official release (NVlabs/GCVit, for research or evaluation only),
whose weights (CC BY-NC-SA 4.0) it loads and whose numbers it gives.

Layouts in names: b batch, c channels, h and w rows and columns; of windows, b windows of all images, h heads, n tokens
in raster order, d channels of a head.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from effbackbones.checkpoint import KeyMap
from effbackbones.layers import (
    Linear,
    Mlp,
    RelativePositionBias,
    apply_linear,
    attend,
    fold_scales,
    join_window_heads,
    join_windows,
    layer_scales,
    pad_to_windows,
    resize_table,
    scaled,
    split_window_heads,
    split_windows,
    use_reference,
)
from effbackbones.layers.window import Window
from effbackbones.models._hierarchical import HierarchicalBackbone, Stage, backbone_cfg, create_backbone, init_linear

WINDOW_STRIDES = (32, 32, 16, 32)
"""Pixels of the image per token of a window's side: 7, 7, 14 and 7 tokens at 224 pixels."""

QUERY_POOLS = (3, 2, 0, 0)
"""Poolings that bring the map of a stage down to one such window."""


class SqueezeExcite(nn.Module):
    """Channels weighted by a two-layer MLP, without biases, of their means."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim // 4, bias=False)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(dim // 4, dim, bias=False)

    def forward(self, x_bchw: Tensor) -> Tensor:
        weight_bc = self.fc2(self.act(self.fc1(x_bchw.mean((2, 3))))).sigmoid()
        return x_bchw * weight_bc[:, :, None, None]


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution without bias, computed as a linear layer on the tokens of a map in channels-last memory."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return apply_linear(input.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


class FusedMBConv(nn.Module):
    """Depthwise 3x3 convolution, GELU, squeeze and excitation, 1x1 convolution; the residual is the caller's."""

    def __init__(self, dim: int):
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.act = nn.GELU()
        self.se = SqueezeExcite(dim)
        self.pw = PointwiseConv(dim)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.pw(self.se(self.act(self.dw(x_bchw))))


class Downsample(nn.Module):
    """A convolutional residual between norms, and a 3x3 convolution of stride 2; sizes round up."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.norm1 = LayerNorm2d(in_dim, eps=1e-5)
        self.conv = FusedMBConv(in_dim)
        self.reduction = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False)
        self.norm2 = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bchw = self.norm1(x_bchw)
        return self.norm2(self.reduction(x_bchw + self.conv(x_bchw)))


class Stem(nn.Module):
    """A 3x3 convolution of stride 2 and a downsampling that keeps the width: stride 4.

    It puts the map into channels-last memory, where it stays: the tokens (B, H, W, C) of the blocks are views of it.
    """

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 3, stride=2, padding=1)
        self.down = Downsample(dim, dim)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.down(self.proj(x_bchw.contiguous(memory_format=torch.channels_last)))


class GlobalQuery(nn.Module):
    """The queries of a stage's global blocks: its map, brought down to the size of one window.

    Args:
        dim: Channels of the map.
        heads: Attention heads.
        steps: Convolutional residuals.
        pool: Whether each is followed by a pooling of stride 2, which rounds up.
        window: Rows and columns of the window; what comes out in another size is resized bicubically.
    """

    def __init__(self, dim: int, heads: int, steps: int, pool: bool, window: Window):
        super().__init__()
        self.heads = heads
        self.pool = pool
        self.window = window
        self.steps = nn.ModuleList([FusedMBConv(dim) for _ in range(steps)])

    def forward(self, x_bchw: Tensor) -> Tensor:
        """Return the queries of every image, (B, heads, N, d)."""
        for step in self.steps:
            x_bchw = x_bchw + step(x_bchw)
            if self.pool:
                x_bchw = F.max_pool2d(x_bchw, 3, stride=2, padding=1)
        if x_bchw.shape[2:] != self.window:
            x_bchw = F.interpolate(x_bchw, self.window, mode="bicubic")
        return split_window_heads(x_bchw.permute(0, 2, 3, 1), self.window, 1, self.heads)[0]


class WindowAttention(nn.Module):
    """Attention within windows: of the tokens' own queries, or of queries given from outside.

    Where windows do not divide the map, zeros fill it up at the bottom and the right, in front of the projection; they
    take part as keys and values.

    Args:
        dim: Channels.
        heads: Attention heads.
        window: Rows and columns of a window.
        scale: Factor of the scores.
        own_queries: Whether queries are projected from the tokens.
    """

    def __init__(self, dim: int, heads: int, window: Window, scale: float, own_queries: bool):
        super().__init__()
        self.heads = heads
        self.window = window
        self.scale = scale
        self.parts = 3 if own_queries else 2
        self.qkv = Linear(dim, self.parts * dim)
        self.proj = Linear(dim, dim)
        self.position_bias = RelativePositionBias(window, heads)

    def forward(self, x_bhwc: Tensor, q_bhnd: Tensor | None) -> Tensor:
        """Return the output, (B, H, W, C); `q_bhnd` are the queries of every window, where they are not its own."""
        height, width = x_bhwc.shape[1:3]
        if use_reference() or divides(self.window, height, width):
            y_bhwc = self.qkv(pad_to_windows(x_bhwc, self.window))
        else:  # padding is nothing but the bias after the projection: it need not go through it
            y_bhwc = pad_to_windows(apply_linear(x_bhwc, self.qkv.weight), self.window)
            y_bhwc = y_bhwc + self.qkv.bias.to(y_bhwc.dtype)
        *own, k_bhnd, v_bhnd = split_window_heads(y_bhwc, self.window, self.parts, self.heads)
        out_bhnd = attend(own[0] if q_bhnd is None else q_bhnd, k_bhnd, v_bhnd, self.position_bias(), self.scale)
        out_bhwc = join_window_heads(out_bhnd, self.window, (y_bhwc.shape[1], y_bhwc.shape[2]))
        if use_reference():
            return self.proj(out_bhwc)[:, :height, :width]
        return self.proj(out_bhwc[:, :height, :width])


class Block(nn.Module):
    """Window attention and an MLP, each behind a norm, on tokens (B, H, W, C)."""

    def __init__(self, dim: int, attn: WindowAttention, mlp_ratio: float, drop_path: float, layer_scale: float | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma1, self.gamma2 = layer_scales((dim,), layer_scale)

    def forward(self, x_bhwc: Tensor, q_bhnd: Tensor | None) -> Tensor:
        x = x_bhwc + self.drop_path(scaled(self.attn(self.norm1(x_bhwc), q_bhnd), self.gamma1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))

    def fold(self) -> None:
        fold_scales(self, self.attn.proj, self.mlp.fc2)


class GlobalContextStage(Stage):
    """A stage of local and global blocks in turn; the global ones share the queries made of the stage's first map.

    Args:
        downsample: What is in front of the stage, if anything.
        blocks: The blocks; every second one is global.
        query: Makes the queries; None where there is no global block.
        window: Rows and columns of a window.
    """

    def __init__(
        self, downsample: nn.Module | None, blocks: Sequence[nn.Module], query: GlobalQuery | None, window: Window
    ):
        super().__init__(downsample, blocks)
        self.query = query
        self.window = window

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bchw = self.downsample(x_bchw)
        (h, w), (height, width), dim = self.window, x_bchw.shape[2:], x_bchw.shape[1]
        windows = -(-height // h) * -(-width // w)
        q_bhnd = None
        if self.query is not None:  # image by image, as windows are ordered
            q_bhnd = self.query(x_bchw).unsqueeze(1).expand(-1, windows, -1, -1, -1).flatten(0, 1)

        x_bhwc = x_bchw.permute(0, 2, 3, 1)
        whole = divides(self.window, height, width) and not use_reference()
        if whole:  # one window below the other: to cut the map again, block by block, is a view then
            x_bhwc = split_windows(x_bhwc, self.window).reshape(-1, windows * h, w, dim)
        for j, block in enumerate(self.blocks):
            x_bhwc = self.run(block, x_bhwc, q_bhnd if j % 2 else None)
        if whole:
            x_bhwc = join_windows(x_bhwc.reshape(-1, h * w, dim), self.window, (height, width))
        return x_bhwc.permute(0, 3, 1, 2)


def divides(window: Window, height: int, width: int) -> bool:
    """Return whether windows fill a map without padding."""
    return height % window[0] == 0 and width % window[1] == 0


def native_windows(img_size: int | tuple[int, int]) -> list[Window]:
    """Return the windows of the four stages that belong to an image size, rounded up."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return [(-(-height // stride), -(-width // stride)) for stride in WINDOW_STRIDES]


# The layers of FusedMBConv: the official keys, and the names here.
_MBCONV = r"conv\.(0|2\.fc\.0|2\.fc\.2|3)\."
_MBCONV_NAMES = {"0": "dw", "2.fc.0": "se.fc1", "2.fc.2": "se.fc2", "3": "pw"}


class GCViT(HierarchicalBackbone):
    """GC ViT: four stages of window attention, local and global blocks in turn.

    Takes images of any size from 32 pixels up; maps round up. Where windows do not divide a map it is padded with
    zeros, and queries that are not of a window's size are resized. At sizes that the official classifier takes neither
    happens.

    Args:
        depths: Blocks of the four stages.
        dim: Channels of the first stage, doubled from stage to stage.
        num_heads: Attention heads of the four stages.
        mlp_ratio: Hidden width of an MLP over its width.
        layer_scale: Initial layer scale; None for none.
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for none.
        global_pool: Pooling of the classifier, by timm's name.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last block; from 0 it grows linearly over the blocks.
        img_size: Size of the image that the classifier's windows are made for; None for `pretrain_size`. Position
            biases of other windows are resized when they are loaded. In dense mode nothing depends on it.
        dense: Dense-prediction mode: windows of 24 unless told otherwise, an output norm on every map, no classifier.
        window_size: Side of a window in tokens, of all stages or of each, instead of the above. Dense mode at
            multiples of 512 pixels needs no padding with 16 or (16, 16, 32, 16), for fewer multiply-adds than with 24.
        pretrain_size: Side of the image the weights were trained at. In dense mode the queries of stage 2 are pooled
            unless its window is the one that belongs to that size.

    Raises:
        ValueError: `num_heads` do not divide the widths, or `window_size` is neither a positive int nor four.
    """

    official_keys: ClassVar[KeyMap] = (
        (r"\.relative_position_index$", None),
        (rf"^patch_embed\.conv_down\.{_MBCONV}", lambda m: f"stem.down.conv.{_MBCONV_NAMES[m[1]]}."),
        (
            rf"^levels\.(\d)\.downsample\.{_MBCONV}",
            lambda m: f"stages.{int(m[1]) + 1}.downsample.conv.{_MBCONV_NAMES[m[2]]}.",
        ),
        (
            rf"^levels\.(\d)\.q_global_gen\.to_q_global\.(\d)\.{_MBCONV}",
            lambda m: f"stages.{m[1]}.query.steps.{m[2]}.{_MBCONV_NAMES[m[3]]}.",
        ),
        (r"^patch_embed\.conv_down\.", "stem.down."),
        (r"^patch_embed\.", "stem."),
        (r"^levels\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
        (r"^levels\.(.*)\.relative_position_bias_table$", r"stages.\1.position_bias.table"),
        (r"^levels\.", "stages."),
        (r"^norm(\d)\.", r"norms.\1."),
        (r"^head\.(?!fc\.)", "head.fc."),
    )

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 19, 5),
        dim: int = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
        dense: bool = False,
        window_size: int | Sequence[int] | None = None,
        pretrain_size: int = 224,
    ):
        dims = [dim * 2**i for i in range(4)]
        if any(c % heads for c, heads in zip(dims, num_heads, strict=True)):
            raise ValueError(f"num_heads={num_heads} do not divide the widths {dims} of the four stages")
        if window_size is None and dense:
            window_size = 24
        if window_size is None:
            windows = native_windows(img_size or pretrain_size)
        else:
            sides = [window_size] * 4 if isinstance(window_size, int) else list(window_size)
            if len(sides) != 4 or min(sides) < 1:
                raise ValueError(f"window_size={window_size}: expected a positive number of tokens, or four")
            windows = [(side, side) for side in sides]

        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (c, heads, window) in enumerate(zip(dims, num_heads, windows, strict=True)):
            # The official classifier holds the scale in float32, its detection backbone does not.
            scale = (c // heads) ** -0.5 if dense else float(np.float32((c // heads) ** -0.5))
            blocks = [
                Block(c, WindowAttention(c, heads, window, scale, j % 2 == 0), mlp_ratio, rate, layer_scale)
                for j, rate in enumerate(rates[i])
            ]
            pool = QUERY_POOLS[i] > 0 or (dense and i == 2 and window != native_windows(pretrain_size)[2])
            query = GlobalQuery(c, heads, QUERY_POOLS[i] or 1, pool, window) if len(blocks) > 1 else None
            stages.append(GlobalContextStage(Downsample(dims[i - 1], c) if i else None, blocks, query, window))
        super().__init__(
            Stem(in_chans, dim),
            stages,
            dims,
            norm=LayerNorm2d(dims[-1], eps=1e-5),
            output_norms=[LayerNorm2d(c, eps=1e-5) for c in dims] if dense else None,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_linear)

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        tables = {f"{name}.table": m for name, m in self.named_modules() if isinstance(m, RelativePositionBias)}
        return weights | {key: resize_table(weights[key], m.window) for key, m in tables.items() if key in weights}


_cfg = partial(
    backbone_cfg,
    first_conv="stem.proj",
    license="cc-by-nc-sa-4.0",
    paper_ids="arXiv:2206.09959",
    paper_name="Global Context Vision Transformers",
    origin_url="https://github.com/NVlabs/GCVit",
)


default_cfgs = generate_default_cfgs(
    {
        "gc_vit_xxtiny.in1k": _cfg(crop_pct=1.0),
        "gc_vit_xtiny.in1k": _cfg(),
        "gc_vit_tiny.in1k": _cfg(crop_pct=1.0),
        "gc_vit_tiny2.in1k": _cfg(),
        "gc_vit_small.in1k": _cfg(),
        "gc_vit_small2.in1k": _cfg(),
        "gc_vit_base.in1k": _cfg(crop_pct=1.0),
        "gc_vit_large.in1k": _cfg(crop_pct=1.0),
        "gc_vit_large_224_21k.in21k_ft_in1k": _cfg(crop_pct=1.0),
        "gc_vit_large_384_21k.in21k_ft_in1k": _cfg(
            input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, crop_mode="squash"
        ),
        "gc_vit_large_512_21k.in21k_ft_in1k": _cfg(
            input_size=(3, 512, 512), pool_size=(16, 16), crop_pct=1.0, crop_mode="squash"
        ),
    }
)

_SMALL = {"dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0, "layer_scale": 1e-5}
_BASE = {"dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "layer_scale": 1e-5}
_LARGE = {"dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2.0, "layer_scale": 1e-5}


_create = partial(create_backbone, GCViT)


@register_model
def gc_vit_xxtiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-XXT."""
    return _create("gc_vit_xxtiny", pretrained, {"depths": (2, 2, 6, 2)}, kwargs)


@register_model
def gc_vit_xtiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-XT."""
    return _create("gc_vit_xtiny", pretrained, {"depths": (3, 4, 6, 5)}, kwargs)


@register_model
def gc_vit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-T."""
    return _create("gc_vit_tiny", pretrained, {}, kwargs)


@register_model
def gc_vit_tiny2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-T2."""
    return _create("gc_vit_tiny2", pretrained, {"depths": (3, 4, 29, 5)}, kwargs)


@register_model
def gc_vit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-S."""
    return _create("gc_vit_small", pretrained, _SMALL, kwargs)


@register_model
def gc_vit_small2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-S2."""
    return _create("gc_vit_small2", pretrained, {**_SMALL, "depths": (3, 4, 23, 5), "mlp_ratio": 3.0}, kwargs)


@register_model
def gc_vit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-B."""
    return _create("gc_vit_base", pretrained, _BASE, kwargs)


@register_model
def gc_vit_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-L."""
    return _create("gc_vit_large", pretrained, _LARGE, kwargs)


@register_model
def gc_vit_large_224_21k(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-L pre-trained on ImageNet-21K, for 224 px."""
    return _create("gc_vit_large_224_21k", pretrained, _LARGE, kwargs)


@register_model
def gc_vit_large_384_21k(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-L pre-trained on ImageNet-21K, with windows for 384 px."""
    return _create("gc_vit_large_384_21k", pretrained, {**_LARGE, "pretrain_size": 384}, kwargs)


@register_model
def gc_vit_large_512_21k(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GC ViT-L pre-trained on ImageNet-21K, with windows for 512 px."""
    return _create("gc_vit_large_512_21k", pretrained, {**_LARGE, "pretrain_size": 512}, kwargs)
