"""SG-Former: attention over the whole image whose keys are few where the image matters little, many where it matters.

Paper: "SG-Former: Self-guided Transformer with Evolving Token Reallocation", arXiv 2308.12216.
Written from the paper and a specification of the official release (OliverRensu/SG-Former, published without a
licence), whose weights it loads and whose numbers it gives.

Layouts in names: b batch, c channels, h and w rows and columns, n tokens in raster order, m keys, d channels of a head;
in attention, h stands for heads: q_bhnd.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from effbackbones.checkpoint import KeyMap
from effbackbones.layers import (
    Cached,
    DepthwiseResidual,
    Linear,
    attend,
    constant,
    join_window_heads,
    join_windows,
    recomputed,
    split_window_heads,
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
from effbackbones.ops import token_merging

WINDOW = 7  # side of the windows of local attention, tokens
REDUCTIONS = (8, 4, 2, 1)  # stage by stage, the side of the square of tokens that global attention has one key for
RUNS = {8: (196, 56, 28), 4: (49, 14, 7), 2: (2, 1)}  # by reduction, tokens merged to one: the least significant first

STORED = 2**19  # weights of a head that are kept for the backward pass, and so computed once
CHUNK = 2**20  # weights of a head that are computed at a time where there are more


class Stem(Cached):
    """Three 3x3 convolutions, two of them of stride 2, a layer norm, and a learned table of positions.

    The table is of `grid` tokens (rows, columns); maps of another size get it resized bicubically.
    """

    def __init__(self, in_chans: int, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(1, dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(1, dim)
        self.conv3 = nn.Conv2d(dim, dim, 3, stride=2, padding=1, bias=False)
        self.norm3 = nn.GroupNorm(1, dim)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.pos_embed = nn.Parameter(sine_table(grid, dim))

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bchw = x_bchw.contiguous(memory_format=torch.channels_last)
        x_bchw = self.act(self.norm1(self.conv1(x_bchw)))
        x_bchw = self.act(self.norm2(self.conv2(x_bchw)))
        x_bhwc = self.norm(self.norm3(self.conv3(x_bchw)).permute(0, 2, 3, 1))
        size = (x_bhwc.shape[1], x_bhwc.shape[2])
        table_1hwc: Tensor = self.pos_embed
        if table_1hwc.shape[1:3] != size:
            table_1hwc = self.kept(size, [self.pos_embed], lambda: resize_table(self.pos_embed, size))
        return (x_bhwc + table_1hwc).permute(0, 3, 1, 2)


def sine_table(grid: tuple[int, int], dim: int) -> Tensor:
    """Return sines and cosines of column and row, a quarter of the channels each: (1, rows, columns, dim)."""
    rows, cols = (torch.arange(n, dtype=torch.float64) for n in grid)
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    waves = [f(p[:, None] * frequencies) for p in (cols, rows) for f in (torch.sin, torch.cos)]
    columnwise, rowwise = torch.cat(waves[:2], 1), torch.cat(waves[2:], 1)
    table = torch.cat([columnwise.expand(grid[0], -1, -1), rowwise[:, None].expand(-1, grid[1], -1)], -1)
    return table[None].to(torch.get_default_dtype())


def resize_table(table_1hwc: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a table of positions resized to a map of `size`."""
    table_1chw = table_1hwc.permute(0, 3, 1, 2)
    if table_1hwc.dtype in (torch.float16, torch.bfloat16):
        table_1chw = table_1chw.float()
    resized_1chw = F.interpolate(table_1chw, size, mode="bicubic", align_corners=False)
    return resized_1chw.permute(0, 2, 3, 1).to(table_1hwc.dtype).contiguous()


class Downsample(nn.Module):
    """A pointwise convolution, a depthwise one of stride 2 and a pointwise one, each with a norm over the sample."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.norm1 = nn.GroupNorm(1, dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim, bias=False)
        self.norm2 = nn.GroupNorm(1, dim)
        self.conv3 = nn.Conv2d(dim, dim, 1, bias=False)
        self.norm3 = nn.GroupNorm(1, dim)
        self.act = nn.GELU()

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bchw = self.act(self.norm1(self.conv1(x_bchw)))
        x_bchw = self.act(self.norm2(self.conv2(x_bchw)))
        return self.norm3(self.conv3(x_bchw))


class ConvMlp(nn.Module):
    """Two linear layers; between them a residual depthwise convolution, and the activation after it."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.dwconv = DepthwiseResidual(4 * dim)
        self.act = nn.GELU()
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        x_bchw = self.dwconv(self.fc1(x_bhwc).permute(0, 3, 1, 2))
        return recomputed(lambda y_bhwc: self.fc2(self.act(y_bhwc)), x_bchw.permute(0, 2, 3, 1))


def attend_and_count(q_bhnd: Tensor, k_bhmd: Tensor, v_bhmd: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention's output, and what each key gets of it: (B, M), weights added up over queries, mean over heads.

    The latter has no gradient. Its weights are computed in float32 at least, under autocast too: tokens are sorted by
    it, and ties and rounding change the order.
    """
    dtype = torch.float64 if q_bhnd.dtype == torch.float64 else torch.float32
    heads, m, d = k_bhmd.shape[1:]
    with without_autocast(q_bhnd.device):
        k_bhdm = (k_bhmd.to(dtype) * d**-0.5).transpose(2, 3)
        if use_reference() or q_bhnd.shape[2] * m <= STORED:
            weights_bhnm = (q_bhnd.to(dtype) @ k_bhdm).softmax(-1)
            return weights_bhnm.to(v_bhmd.dtype) @ v_bhmd, weights_bhnm.detach().sum((1, 2)) / heads
        k_bhdm = k_bhdm.detach()
        chunks = q_bhnd.detach().split(max(1, CHUNK // m), 2)
        counts = [(chunk.to(dtype) @ k_bhdm).softmax(-1).sum((1, 2)) for chunk in chunks]
    return attend(q_bhnd, k_bhmd, v_bhmd), torch.stack(counts).sum(0) / heads


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast, which tensors of no data have none of to begin with."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Attention(nn.Module):
    """What the three kinds of attention share: a depthwise branch for positions, and the projection.

    All take a channels-last map and the significance of its tokens (B, N), and return the map and the significance
    that the next block is guided by; None where there is none.
    """

    official_parts: ClassVar[Mapping[str, Mapping[str, int]]]
    """Parts that the release has of each joined projection, in order, and their shares of its rows."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.lepe_linear = Linear(dim, dim)
        self.lepe_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = Linear(dim, dim)

    def project(self, x_bhwc: Tensor, out_bhwc: Tensor) -> Tensor:
        """Return the projection of the heads' output and of the depthwise branch of the input."""
        lepe_bchw = self.lepe_conv(self.lepe_linear(x_bhwc).permute(0, 3, 1, 2))
        return self.proj(out_bhwc + lepe_bchw.permute(0, 2, 3, 1))


class FullAttention(Attention):
    """Every token attends to every token."""

    official_parts: ClassVar = {"qkv": {"q": 1, "kv": 2}}

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.qkv = Linear(dim, 3 * dim)

    def forward(self, x_bhwc: Tensor, significance_bn: None) -> tuple[Tensor, None]:
        q_bhnd, k_bhnd, v_bhnd = split_heads(self.qkv(x_bhwc).flatten(1, 2), 3, self.heads)
        out_bnhd = attend(q_bhnd, k_bhnd, v_bhnd).transpose(1, 2)
        return self.project(x_bhwc, out_bnhd.reshape(x_bhwc.shape)), None


class HybridAttention(Attention):
    """Half of the heads attend to the image reduced by strided convolution, half within windows of 7 x 7.

    The significance of a token is the attention it gets: its mean over the global heads and all queries, of the reduced
    token that covers it, plus its mean over the local heads and the queries of its window. Windows at the right and
    lower border are cut off by it; their means are over 49 queries as well.
    """

    official_parts: ClassVar = {"qkv": {"q1": 1, "q2": 1, "kv2": 2}, "kv": {"kv1": 1}}

    def __init__(self, dim: int, heads: int, reduction: int):
        super().__init__(dim, heads)
        self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.act = nn.GELU()
        self.qkv = Linear(dim, 2 * dim)  # global queries; local queries, keys and values
        self.kv = Linear(dim, dim)  # of the reduced image

    def forward(self, x_bhwc: Tensor, significance_bn: None) -> tuple[Tensor, Tensor]:
        c = x_bhwc.shape[3]
        q_bhwc, local_bhwc = self.qkv(x_bhwc).split([c // 2, 3 * c // 2], -1)
        global_bhwc, global_bn = self._global(x_bhwc, q_bhwc)
        local_bhwc, local_bn = self._local(local_bhwc)
        out_bhwc = self.project(x_bhwc, torch.cat([global_bhwc, local_bhwc], -1))
        return out_bhwc, global_bn + local_bn

    def _global(self, x_bhwc: Tensor, q_bhwc: Tensor) -> tuple[Tensor, Tensor]:
        h, w = x_bhwc.shape[1:3]
        z_bhwc = self.sr(x_bhwc.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        z_bmc = self.act(self.norm(z_bhwc)).flatten(1, 2)
        k_bhmd, v_bhmd = split_heads(self.kv(z_bmc), 2, self.heads // 2)
        (q_bhnd,) = split_heads(q_bhwc.flatten(1, 2), 1, self.heads // 2)
        out_bhnd, count_bm = attend_and_count(q_bhnd, k_bhmd, v_bhmd)
        cover_n = covering((h, w), (z_bhwc.shape[1], z_bhwc.shape[2]), x_bhwc.device)
        return out_bhnd.transpose(1, 2).reshape(q_bhwc.shape), count_bm.index_select(1, cover_n) / (h * w)

    def _local(self, qkv_bhwc: Tensor) -> tuple[Tensor, Tensor]:
        heads = self.heads // 2
        rows = []
        for band_bhwc, h in cells(qkv_bhwc, 1):
            row = []
            for part_bhwc, w in cells(band_bhwc, 2):
                size = (part_bhwc.shape[1], part_bhwc.shape[2])
                out, count_bn = attend_and_count(*split_window_heads(part_bhwc, (h, w), 3, heads))
                row.append((join_window_heads(out, (h, w), size), join_windows(count_bn.unsqueeze(-1), (h, w), size)))
            rows.append([joined(parts, 2) for parts in zip(*row, strict=True)])
        out_bhwc, count_bhwc = (joined(parts, 1) for parts in zip(*rows, strict=True))
        return out_bhwc, count_bhwc.flatten(1) / WINDOW**2


def cells(x_bhwc: Tensor, dim: int) -> list[tuple[Tensor, int]]:
    """Return the parts of a map, along `dim`, of whole windows and of the window that the border cuts off.

    With each goes the length of its windows.
    """
    n = x_bhwc.shape[dim]
    rest = n % WINDOW
    parts = [(x_bhwc.narrow(dim, 0, n - rest), WINDOW), (x_bhwc.narrow(dim, n - rest, rest), rest)]
    return [(part, length) for part, length in parts if part.shape[dim]]


def joined(parts: tuple[Tensor, ...], dim: int) -> Tensor:
    """Return the parts in one tensor; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def split_heads(x_bnc: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Return `parts` tensors (B, heads, N, d) of channels ordered part, head, d."""
    return x_bnc.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


@constant
def covering(size: tuple[int, int], reduced: tuple[int, int], device: torch.device) -> Tensor:
    """Return the token of the `reduced` map that stands for each token of a map of `size`: (N,), in raster order."""
    rows, cols = (torch.arange(n, device=device) * m // n for n, m in zip(size, reduced, strict=True))
    return (rows[:, None] * reduced[1] + cols).flatten()


class GuidedAttention(Attention):
    """Every token attends to few: tokens sorted by significance are merged, the least significant most.

    `order`, where it is set, takes the place of sorting: the tokens of each image from the least significant one on,
    (B, N) or (1, N). The network is not continuous in its weights and images, as rounding swaps tokens of about equal
    significance: a fixed order is for comparisons in low precision, exports and deterministic runs.
    """

    official_parts: ClassVar = {"kv": {"kv1": 1, "kv2": 1}}
    order: Tensor | None

    def __init__(self, dim: int, heads: int, runs: Sequence[int]):
        super().__init__(dim, heads)
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.f1 = nn.Linear(runs[0], 1)
        self.f2 = nn.Linear(runs[1], 1)
        self.f3 = nn.Linear(runs[2], 1) if len(runs) == 3 else None
        self.register_buffer("order", None, persistent=False)

    def forward(self, x_bhwc: Tensor, significance_bn: Tensor) -> tuple[Tensor, None]:
        x_bnc = x_bhwc.flatten(1, 2)
        n = x_bnc.shape[1]
        order_bn = ascending(significance_bn) if self.order is None else self.order.expand(x_bnc.shape[0], -1)
        if order_bn.shape[1] != n:
            raise ValueError(f"order is of {order_bn.shape[1]} tokens, expected {n} at this image size")
        merges = [f for f in (self.f1, self.f2, self.f3) if f is not None]
        tiers = (n // 2, n - n // 2) if self.f3 is None else (n // 4, 2 * (n // 4), n - 3 * (n // 4))
        merged_bmc = token_merging(x_bnc, order_bn, tiers, [f.weight for f in merges], [f.bias for f in merges])
        k_bhmd, v_bhmd = split_heads(self.kv(merged_bmc), 2, self.heads)
        (q_bhnd,) = split_heads(self.q(x_bnc), 1, self.heads)
        out_bnhd = attend(q_bhnd, k_bhmd, v_bhmd).transpose(1, 2)
        return self.project(x_bhwc, out_bnhd.reshape(x_bhwc.shape)), None


def ascending(x_bn: Tensor) -> Tensor:
    """Return the order that sorts each row, equal values by their index."""
    # ONNX has no translation of a sort that asks to be stable; its own, and torch's on CPU, are.
    return x_bn.argsort() if torch.compiler.is_exporting() else x_bn.argsort(stable=True)


class Block(nn.Module):
    """Attention and MLP on a channels-last map, each a pre-norm residual."""

    def __init__(self, dim: int, attn: Attention, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_bhwc: Tensor, significance_bn: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y_bhwc, significance_bn = self.attn(self.norm1(x_bhwc), significance_bn)
        x_bhwc = x_bhwc + self.drop_path(y_bhwc)
        return x_bhwc + self.drop_path(self.mlp(self.norm2(x_bhwc))), significance_bn


class GuidingStage(Stage):
    """A stage whose blocks pass the significance of tokens on, and whose output is normed for whatever follows."""

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module], dim: int):
        super().__init__(downsample, blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bhwc = self.downsample(x_bchw).permute(0, 2, 3, 1)
        significance_bn = None
        for block in self.blocks:
            x_bhwc, significance_bn = self.run(block, x_bhwc, significance_bn)
        return self.norm(x_bhwc).permute(0, 3, 1, 2)


class SGFormer(HierarchicalBackbone):
    """SG-Former: hybrid and guided attention in turn in the first three stages, full attention in the last.

    Takes images of any size from 32 pixels up; every halving rounds up. Tokens are sorted by significance and norms
    are over whole samples: what an image's maps are depends on its padding. Cost is quadratic in the area of the image.

    Args:
        depths: Blocks of the four stages, even in the first three.
        dims: Channels of the four stages.
        heads: Attention heads of the four stages, even in the first three.
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for none.
        global_pool: Pooling of the classifier, by timm's name.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last block; from 0 it grows linearly over the blocks.
        img_size: Side or (height, width) of the images whose positions are learned, pixels; the table of positions is
            resized for others.
        dense: Dense-prediction mode: the classifier's maps, no classifier.

    Raises:
        ValueError: Depths or heads of the first three stages are odd, heads do not divide dims, the first width is no
            multiple of 4, or images have less than 32 pixels a side.
    """

    official_keys: ClassVar[KeyMap] = (
        (r"^pos_embed$", "stem.pos_embed"),
        (r"^patch_embed1\.conv\.([024])\.c\.", lambda m: f"stem.conv{int(m[1]) // 2 + 1}."),
        (r"^patch_embed1\.conv\.([024])\.bn\.", lambda m: f"stem.norm{int(m[1]) // 2 + 1}."),
        (r"^patch_embed1\.norm\.", "stem.norm."),
        (r"^patch_embed(\d)\.conv(\d)\.c\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.conv{m[2]}."),
        (r"^patch_embed(\d)\.conv(\d)\.bn\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.norm{m[2]}."),
        (r"^block(\d)\.(\d+)\.mlp\.dwconv\.dwconv\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.mlp.dwconv."),
        (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
        (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
        (r"^head\.(?!fc\.)", "head.fc."),
    )

    continuous: ClassVar[bool] = False  # the order of tokens
    official_ema: ClassVar[bool] = True

    def __init__(
        self,
        depths: Sequence[int] = (2, 4, 16, 1),
        dims: Sequence[int] = (64, 128, 256, 512),
        heads: Sequence[int] = (2, 4, 8, 16),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] = 224,
        dense: bool = False,
    ):
        if any(depth % 2 for depth in depths[:3]):
            raise ValueError(f"depths={tuple(depths)}: those of stages 0 to 2 must be even, for pairs of blocks")
        if any(n % 2 for n in heads[:3]) or any(dim % n for dim, n in zip(dims, heads, strict=True)) or dims[0] % 4:
            raise ValueError(
                f"dims={tuple(dims)}, heads={tuple(heads)}: heads must divide dims and be even in stages 0 to 2, and "
                "the first width must be a multiple of 4"
            )
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        check_size(height, width)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                Block(dim, make_attention(dim, heads[i], REDUCTIONS[i], guided=j % 2 == 1), rate)
                for j, rate in enumerate(rates[i])
            ]
            stages.append(GuidingStage(Downsample(dims[i - 1], dim) if i else None, blocks, dim))
        super().__init__(
            Stem(in_chans, dims[0], (height // 4, width // 4)),
            stages,
            dims,
            norm=nn.Identity(),
            output_norms=[nn.Identity() for _ in dims] if dense else None,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_linear)
        self.apply(init_conv)

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Join the projections that the release has apart, and resize the table of positions."""
        weights = dict(weights)
        if "stem.pos_embed" in weights:
            weights["stem.pos_embed"] = fit_table(weights["stem.pos_embed"], self.get_parameter("stem.pos_embed"))
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                join_parts(weights, name, module)
        return weights

    def iter_maps(self, x_bchw: Tensor) -> Iterator[Tensor]:
        check_size(x_bchw.shape[2], x_bchw.shape[3])
        return super().iter_maps(x_bchw)


def make_attention(dim: int, heads: int, reduction: int, guided: bool) -> Attention:
    """Return the attention of a block: full where nothing is reduced, else hybrid or guided."""
    if reduction == 1:
        return FullAttention(dim, heads)
    return GuidedAttention(dim, heads, RUNS[reduction]) if guided else HybridAttention(dim, heads, reduction)


def check_size(height: int, width: int) -> None:
    """Raise ValueError for images of less than 32 pixels a side."""
    if min(height, width) < 32:
        raise ValueError(f"images of {height} x {width} pixels: SG-Former takes 32 a side at least")


def fit_table(table: Tensor, own_1hwc: Tensor) -> Tensor:
    """Return a table of positions, ours or the flat one of a square that the release has, for the grid of `own_1hwc`.

    It is returned as it is where it is neither.
    """
    _, h, w, c = own_1hwc.shape
    grid = table
    if table.ndim == 3:
        side = math.isqrt(table.shape[1])
        grid = table.unflatten(1, (side, side)) if side * side == table.shape[1] else table
    if grid.ndim != 4 or grid.shape[::3] != (1, c):
        return table
    return grid if grid.shape[1:3] == (h, w) else resize_table(grid, (h, w))


def join_parts(weights: dict[str, Tensor], name: str, attn: Attention) -> None:
    """Replace the parts that the release has of a projection by the whole, in place; only where all of them fit."""
    for joined, parts in attn.official_parts.items():
        for kind in ("weight", "bias"):
            own = attn.get_parameter(f"{joined}.{kind}")
            unit = len(own) // sum(parts.values())
            shapes = {f"{name}.{part}.{kind}": (share * unit, *own.shape[1:]) for part, share in parts.items()}
            if all(key in weights and weights[key].shape == shape for key, shape in shapes.items()):
                whole = torch.cat([weights.pop(key) for key in shapes])
                if isinstance(attn, GuidedAttention):  # keys and values of each half of the heads: all keys go first
                    whole = whole.unflatten(0, (2, 2, -1)).transpose(0, 1).flatten(0, 2)
                weights[f"{name}.{joined}.{kind}"] = whole


_cfg = partial(
    backbone_cfg,
    crop_pct=0.9,
    first_conv="stem.conv1",
    paper_ids="arXiv:2308.12216",
    paper_name="SG-Former: Self-guided Transformer with Evolving Token Reallocation",
    origin_url="https://github.com/OliverRensu/SG-Former",
)


default_cfgs = generate_default_cfgs({"sgformer_s.in1k": _cfg(), "sgformer_m.in1k": _cfg(), "sgformer_b.in1k": _cfg()})

_create = partial(create_backbone, SGFormer)


@register_model
def sgformer_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SG-Former-S."""
    return _create("sgformer_s", pretrained, {"depths": (2, 4, 16, 1)}, kwargs)


@register_model
def sgformer_m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SG-Former-M."""
    return _create("sgformer_m", pretrained, {"depths": (2, 6, 28, 2)}, kwargs)


@register_model
def sgformer_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SG-Former-B, whose heads in stage 0 have 24 channels."""
    args = {"depths": (4, 6, 24, 2), "dims": (96, 192, 384, 768), "heads": (4, 6, 12, 24)}
    return _create("sgformer_b", pretrained, args, kwargs)
