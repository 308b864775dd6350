"""TransNeXt: every token attends to its 3x3 window and to a pooled map, in one softmax.

Paper: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132.
Written from the paper and a specification of the official release (DaiShiResearch/TransNeXt, Apache-2.0), whose weights
it loads and whose numbers it gives.

Layouts in names: b batch, c channels, h and w rows and columns, n tokens in raster order, p pooled tokens in raster
order from the last to the first, d channels of a head. Channels come before tokens in the attention, so that the
products with a window's cells run along whole maps; they come last everywhere else.
"""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effbackbones.checkpoint import KeyMap
from effbackbones.layers import (
    Cached,
    Linear,
    aligned_bias,
    apply_linear,
    apply_linear_bcn,
    attend,
    constant,
    recomputed,
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
from effbackbones.ops import ResizedBias, aggregated_attention

Grid = tuple[int, int]


class PatchEmbed(nn.Module):
    """Overlapping patches and a layer norm; a map of n rows becomes one of n / stride, rounded up."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride=stride, padding=kernel // 2)
        self.norm = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.norm(self.proj(x_bchw))


class ConvGlu(nn.Module):
    """An MLP gated by itself: one half goes through a depthwise 3x3 convolution and a GELU, and scales the other."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, 2 * hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        if use_reference():
            x, gate = self.fc1(x_bhwc).chunk(2, -1)
            x = self.dwconv(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
            return self.fc2(F.gelu(x.contiguous()) * gate)
        # One product for each half: the halves of one product would have to be copied apart.
        weights, biases = self.fc1.weight.chunk(2), self.fc1.bias.chunk(2)
        x, gate = (apply_linear(x_bhwc, weight, bias) for weight, bias in zip(weights, biases, strict=True))
        x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return recomputed(lambda y: self.fc2(F.gelu(y) * gate), x)


class LogPositionBias(Cached):
    """A bias of attention by the offset between query and key, from an MLP of its logarithms.

    A key is the mean of a bin of the map: offsets are multiples of one half. The MLP runs on a table, once for every
    offset along the rows and along the columns, instead of for every pair of tokens.

    Args:
        heads: Attention heads.
        pretrain_grid: Side of this stage's map at the size of the pretraining, the unit of offsets.
        trained: Map and pooled map of the size that the model was trained at: the bias is computed for these and
            resized. None: it is computed for the map at hand.
        flat: Return it as (1, heads, N, P), aligned, keys from the first to the last; else as (heads, pH, pW, H, W),
            keys from the last row and column to the first, or where that is large and resized, as what it is made of.
    """

    _CHUNK = 2**21
    """Hidden values of the MLP that exist at a time."""
    _COMPILED_CHUNKS = 4
    """Parts that the hidden values are computed in under torch.compile."""
    _KEPT = 2**24
    """Size of a bias that is kept; of a larger one its table is."""

    def __init__(self, heads: int, pretrain_grid: int, trained: tuple[Grid, Grid] | None, flat: bool):
        super().__init__()
        self.unit = max(1, pretrain_grid - 1)
        self.trained = trained
        self.flat = flat
        self.fc1 = nn.Linear(2, 512)
        self.fc2 = nn.Linear(512, heads)

    def forward(self, grid: Grid, pool: Grid) -> Tensor | ResizedBias:
        """Return the bias of a map of `grid` (H, W) over keys pooled to `pool` (pH, pW)."""
        if use_reference():
            bias = self._reference(grid, pool)
            return bias.unsqueeze(0) if self.flat else bias.mT.unflatten(2, grid).unflatten(1, pool).flip(1, 2)
        sources = list(self.parameters())
        table = partial(self._table, *(self.trained or (grid, pool)))
        if torch.compiler.is_compiling():
            return self._laid_out(table(), grid, pool)
        if math.prod((*grid, *pool)) * self.fc2.out_features > self._KEPT:
            large = self.kept(("table", grid, pool), sources, table)
            return self._laid_out(large, grid, pool) if self.flat else self._spread(large, grid, pool)
        return self.kept(("bias", grid, pool), sources, lambda: self._laid_out(table(), grid, pool))

    def _reference(self, grid: Grid, pool: Grid) -> Tensor:
        """Return the bias (heads, N, P), keys from the first to the last: pair by pair, then resized."""
        trained, trained_pool = self.trained or (grid, pool)
        offsets, index = _unique_offsets(trained, trained_pool, self.fc1.weight.device)
        offsets = _logarithms(offsets, self.unit).to(self.fc1.weight.dtype)
        bias = self.fc2(self.fc1(offsets).relu())[index].T.unflatten(1, (math.prod(trained), math.prod(trained_pool)))
        if (trained, trained_pool) == (grid, pool):
            return bias
        bias = F.interpolate(bias.unflatten(2, trained_pool), pool, mode="bilinear").flatten(2)
        return F.interpolate(bias.mT.unflatten(2, trained), grid, mode="bilinear").flatten(2).mT

    def _table(self, grid: Grid, pool: Grid) -> Tensor:
        """Return the bias of all pairs of offsets, (heads, offsets along the rows, along the columns)."""
        weight = self.fc1.weight
        y, x = (_log_offsets(n, m, self.unit, weight.device).to(weight.dtype) for n, m in zip(grid, pool, strict=True))
        y = y.unsqueeze(-1) * weight[:, 0] + self.fc1.bias
        x = x.unsqueeze(-1) * weight[:, 1]
        if torch.compiler.is_compiling():  # for all sizes into as many
            chunks = y.tensor_split(self._COMPILED_CHUNKS)
        else:
            chunks = y.split(max(1, self._CHUNK // x.numel()))
        if torch.is_grad_enabled() and not torch.compiler.is_exporting():
            # Hidden values are more than the table by a hundred times: the backward pass computes them again.
            outer: Callable[..., Tensor] = partial(
                checkpoint, self._outer, use_reentrant=False, preserve_rng_state=False
            )
        else:
            outer = self._outer
        return torch.cat([outer(chunk, x) for chunk in chunks], 1).unflatten(1, (-1, x.shape[0]))

    def _outer(self, y: Tensor, x: Tensor) -> Tensor:
        hidden = (y.unsqueeze(1) + x).relu().flatten(0, 1)
        return torch.addmm(self.fc2.bias.unsqueeze(-1), self.fc2.weight, hidden.T)

    def _laid_out(self, table: Tensor, grid: Grid, pool: Grid) -> Tensor:
        spread = self._spread(table, grid, pool)
        bias = spread.laid_out().contiguous() if isinstance(spread, ResizedBias) else spread
        return aligned_bias(bias.flip(1, 2).flatten(3).flatten(1, 2).mT.unsqueeze(0)) if self.flat else bias

    def _spread(self, table: Tensor, grid: Grid, pool: Grid) -> Tensor | ResizedBias:
        """Return what the table has for every key and query, (heads, pH, pW, H, W), or what that is made of."""
        if self.trained in (None, (grid, pool)) and grid[0] % pool[0] == 0 and grid[1] % pool[1] == 0:
            # The offsets to the next key are those to this one, moved on by the width of a bin: a view of the table.
            return table.unfold(1, grid[0], grid[0] // pool[0]).unfold(2, grid[1], grid[1] // pool[1])
        if self.trained in (None, (grid, pool)):
            y, x = (_offsets(n, m, table.device) for n, m in zip(grid, pool, strict=True))
            bias = table.index_select(1, y.flatten()).index_select(2, x.flatten())
            return bias.unflatten(2, x.shape).unflatten(1, y.shape).transpose(2, 3).contiguous()
        trained, sizes = zip(*self.trained, strict=True), zip(grid, pool, strict=True)
        y, x = (_resizing(*axis, table.device).to(table.dtype) for axis in zip(trained, sizes, strict=True))
        return ResizedBias(table, y, x)


@functools.lru_cache(maxsize=64)  # the release has them as buffers
def _unique_offsets(grid: Grid, pool: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the offsets (U, 2) that occur between queries and keys, and which one every pair has, (N P,)."""
    with torch.inference_mode(False):
        axes = []
        for n, m in zip(grid, pool, strict=True):
            positions = torch.arange(n, dtype=torch.float32, device=device)
            axes.append(positions[:, None] - F.adaptive_avg_pool1d(positions[None], m))
        y, x = torch.broadcast_tensors(axes[0][:, None, :, None], axes[1][None, :, None, :])
        offsets, index = torch.stack([y, x], -1).flatten(0, 3).unique(dim=0, return_inverse=True)
        return offsets, index


# Positions along one axis. A key is at the centre of its bin: all is counted in halves.


def _halves(n: int, m: int) -> tuple[int, int, int]:
    """Return twice the offsets of n queries to m keys as a range: the first, the end, the step.

    Twice the centre of bin j of an adaptive pooling is the sum of its first and last cell.
    """
    end = 2 * n - -(-n // m)
    return 1 - end, end, 2 if n % m == 0 else 1  # in even bins all are odd, or all are even


@constant
def _log_offsets(n: int, m: int, unit: int, device: torch.device) -> Tensor:
    """Return the logarithms of the offsets of n queries to m keys; in float32, as the release computes them."""
    offsets = torch.arange(*_halves(n, m), device=device, dtype=torch.float32) / 2
    return _logarithms(offsets, unit)


def _logarithms(offsets: Tensor, unit: int) -> Tensor:
    scaled = offsets / unit * 8
    return scaled.sign() * (scaled.abs() + 1).log2() / 3


@constant
def _offsets(n: int, m: int, device: torch.device) -> Tensor:
    """Return which offset that of query j to key i is, (m, n), keys from the last to the first."""
    first, _, step = _halves(n, m)
    j = torch.arange(m - 1, -1, -1, device=device).unsqueeze(-1)
    centres = j * n // m - -(j + 1) * n // m - 1
    return (2 * torch.arange(n, device=device) - centres - first) // step


@constant
def _resizing(trained: Grid, size: Grid, device: torch.device) -> Tensor:
    """Return how much of every offset of the `trained` (queries, keys) is in those resized linearly to `size`.

    The result is (keys, queries, offsets), keys from the last to the first.
    """
    every = torch.arange(len(range(*_halves(*trained))), device=device)
    chosen = (_offsets(*trained, device).unsqueeze(-1) == every).double()
    queries, keys = (_linear(*sizes, device) for sizes in zip(trained, size, strict=True))
    chosen = (keys.flip(0, 1) @ chosen.flatten(1)).unflatten(1, chosen.shape[1:])
    return queries @ chosen


def _linear(n: int, m: int, device: torch.device) -> Tensor:
    """Return the matrix (m, n) that resizes n values linearly to m."""
    identity = torch.eye(n, device=device, dtype=torch.float64).unsqueeze(0)
    return F.interpolate(identity, m, mode="linear", align_corners=False)[0].T


def _unit(x: Tensor, dim: int) -> Tensor:
    """Return x divided by its length along a dim, or by 1e-12 where that is more; in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x * x).sum(dim, keepdim=True).clamp_min(1e-24).rsqrt()


class Attention(nn.Module):
    """Self-attention by cosine, over all tokens of a map; sharper where there are more.

    Args:
        dim: Channels.
        head_dim: Channels of an attention head.
        pretrain_grid: As in :class:`LogPositionBias`.
        trained: As in :class:`LogPositionBias`.
        exact_length: Whether the logarithm of the number of tokens is in full precision, as in the official classifier;
            its dense backbones round it to float32.
    """

    def __init__(self, dim: int, head_dim: int, pretrain_grid: int, trained: Grid | None, *, exact_length: bool):
        super().__init__()
        heads = dim // head_dim
        self.head_dim = head_dim
        self.exact_length = exact_length
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.query_embedding = nn.Parameter(torch.empty(heads, 1, head_dim))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.cpb = LogPositionBias(heads, pretrain_grid, trained and (trained, trained), flat=True)
        trunc_normal_(self.query_embedding, std=0.02)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        grid = (x_bhwc.shape[1], x_bhwc.shape[2])
        qkv = self.qkv(x_bhwc.flatten(1, 2)).unflatten(-1, (3, -1, self.head_dim))
        q_bhnd, k_bhnd, v_bhnd = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        sharpness = F.softplus(self.temperature) * _log_length(grid, self.exact_length, x_bhwc.device)
        q_bhnd = (_unit(q_bhnd, -1) + self.query_embedding) * sharpness
        y_bhnd = attend(q_bhnd, _unit(k_bhnd, -1), v_bhnd, self.cpb(grid, grid), scale=1.0)
        return self.proj(y_bhnd.transpose(1, 2).reshape(x_bhwc.shape))


class AggregatedAttention(Cached):
    """Attention to the 3x3 window around a token and to the map pooled `ratio` times, in one softmax.

    The window's cells get weights outside the softmax too: products of the query with learned tokens.

    Args:
        dim: Channels.
        head_dim: Channels of an attention head.
        ratio: How many rows and columns a pooled one stands for, about.
        pool_size: Side of the pooled map whatever the map; None: by `ratio`.
        pretrain_grid: As in :class:`LogPositionBias`.
        trained: As in :class:`LogPositionBias`.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        ratio: int,
        pool_size: int | None,
        pretrain_grid: int,
        trained: Grid | None,
    ):
        super().__init__()
        heads = dim // head_dim
        self.head_dim = head_dim
        self.ratio = ratio
        self.pool_size = pool_size
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.query_embedding = nn.Parameter(torch.empty(heads, 1, head_dim))
        self.relative_pos_bias_local = nn.Parameter(torch.empty(heads, 9))
        self.learnable_tokens = nn.Parameter(torch.empty(heads, head_dim, 9))
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, 9))
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.proj = Linear(dim, dim)
        self.cpb = LogPositionBias(
            heads, pretrain_grid, trained and (trained, _pooled_grid(trained, ratio)), flat=False
        )
        trunc_normal_(self.query_embedding, std=0.02)
        trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)

    def _projected(self, x_bhwc: Tensor) -> tuple[Tensor, ...]:
        """Return the four linear functions of the map, all (B, C, N): queries, keys, values, and what is pooled."""
        if use_reference():
            kv_bnc = self.kv(x_bhwc).flatten(1, 2)
            return (
                self.q(x_bhwc).flatten(1, 2).mT,
                *kv_bnc.mT.chunk(2, 1),
                self.sr(x_bhwc.permute(0, 3, 1, 2)).flatten(2),
            )
        # One product for all that reads x; its other operand is x as it lies, so that channels come first at no cost.
        sources = [p for layer in (self.q, self.kv, self.sr) for p in layer.parameters()]
        weight, bias = self.kept("weights", sources, self._joined)
        return apply_linear_bcn(x_bhwc.flatten(1, 2), weight, bias).chunk(4, 1)

    def _joined(self) -> tuple[Tensor, Tensor]:
        weight = torch.cat([self.q.weight, self.kv.weight, self.sr.weight.flatten(1)])
        biases: list[Any] = [self.q.bias, self.kv.bias, self.sr.bias]
        return weight, torch.cat(biases)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        grid = (x_bhwc.shape[1], x_bhwc.shape[2])
        pool = (self.pool_size, self.pool_size) if self.pool_size else _pooled_grid(grid, self.ratio)
        q_bhdn, k_bhdn, v_bhdn, z_bhdn = (x.unflatten(1, (-1, self.head_dim)) for x in self._projected(x_bhwc))

        z_bpc = _pool(F.gelu(z_bhdn).flatten(1, 2).unflatten(2, grid), pool).flip(2, 3).flatten(2).mT
        kv_bpc = apply_linear(self.norm(z_bpc), self.kv.weight, self.kv.bias)
        k_pool_bhdp, v_pool_bhdp = kv_bpc.mT.unflatten(1, (2, -1, self.head_dim)).unbind(1)

        q_bhdn = _unit(q_bhdn, 2)
        sharpness = F.softplus(self.temperature) * _log_lengths(grid, pool, x_bhwc.device).to(self.temperature.dtype)
        y_bhdn = aggregated_attention(
            (q_bhdn + self.query_embedding.mT) * sharpness,
            q_bhdn,
            _unit(k_bhdn, 2),
            v_bhdn,
            _unit(k_pool_bhdp, 2),
            v_pool_bhdp,
            self.relative_pos_bias_local,
            self.learnable_tokens,
            self.learnable_bias.squeeze(1),
            self.cpb(grid, pool),
            grid,
        )
        return self.proj(y_bhdn.flatten(1, 2).mT).reshape(x_bhwc.shape)


def _pooled_grid(grid: Grid, ratio: int) -> Grid:
    return max(1, grid[0] // ratio), max(1, grid[1] // ratio)


@constant
def _log_length(grid: Grid, exact: bool, device: torch.device) -> Tensor:
    """Return the logarithm of how many tokens a map has, in float64, or rounded to float32."""
    length = torch.full((), grid[0] * grid[1], dtype=torch.float64, device=device).log()
    return length if exact else length.float()


@constant
def _log_lengths(grid: Grid, pool: Grid, device: torch.device) -> Tensor:
    """Return the logarithm of how many keys every token has, (N,); in float32, as the release computes it."""
    rows, cols = (
        (i + 1).clamp_max(n - 1) - (i - 1).clamp_min(0) + 1
        for i, n in ((torch.arange(n, device=device), n) for n in grid)
    )
    return (rows.unsqueeze(-1) * cols + pool[0] * pool[1]).flatten().float().log()


def _pool(x_bchw: Tensor, pool: Grid) -> Tensor:
    """Return the means of the bins of an adaptive pooling; it exports, whether or not the bins are even."""
    grid = (x_bchw.shape[2], x_bchw.shape[3])
    if grid[0] % pool[0] == 0 and grid[1] % pool[1] == 0:
        return F.avg_pool2d(x_bchw, (grid[0] // pool[0], grid[1] // pool[1]))
    rows, cols = (_bins(n, m, x_bchw.device).to(x_bchw.dtype) for n, m in zip(grid, pool, strict=True))
    return rows @ x_bchw @ cols.T


@constant
def _bins(n: int, m: int, device: torch.device) -> Tensor:
    """Return the matrix (m, n) of an adaptive pooling of n cells to m bins."""
    cell, j = torch.arange(n, device=device), torch.arange(m, device=device).unsqueeze(-1)
    inside = ((cell >= j * n // m) & (cell < -(-(j + 1) * n // m))).double()
    return inside / inside.sum(1, keepdim=True)


class Block(nn.Module):
    """Attention and a gated MLP, each with a norm in front and a residual around."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvGlu(dim, int(2 * dim * mlp_ratio / 3))
        self.drop_path = DropPath(drop_path)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x = x_bchw.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class TransNeXtStage(Stage):
    """A stage that ends with a layer norm: what the next stage reads is what the stage gives out."""

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module], dim: int):
        super().__init__(downsample, blocks)
        self.norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.norm(super().forward(x_bchw))


class TransNeXt(HierarchicalBackbone):
    """TransNeXt: aggregated attention, or attention over all tokens where the pooled map would be the map itself.

    Takes images of any size from 32 pixels up; maps round up. Weights fit every size and mode.

    Args:
        depths: Blocks of the four stages.
        dims: Channels of the four stages.
        head_dim: Channels of an attention head.
        mlp_ratios: Hidden width of the MLP over its width, before it is cut by a third for the gate.
        pool_ratios: How many rows and columns of a map a pooled one stands for, rounded down; 1: no pooling.
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for none.
        global_pool: Pooling of the classifier, by timm's name.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last block; from 0 it grows linearly over the blocks.
        img_size: Image size of the training, pixels, (height, width) or one for both: where the position bias is
            interpolated, from here. None: `pretrain_size`.
        dense: Dense-prediction mode: no classifier; the maps are those of the classifier but for `bias_mode`.
        bias_mode: Position bias of a map: extrapolate computes it for the map, interpolate for that of `img_size`, and
            resizes it. None is interpolate in dense mode, else extrapolate.
        pretrain_size: Image size of the pretraining, pixels: the unit of positions, whatever the image.
        fixed_pool_size: Side of the pooled maps, in cells, whatever the image: the cost is linear in its area then.
            None: by `pool_ratios`.

    Raises:
        ValueError: `bias_mode` is unknown, `fixed_pool_size` is not positive, or `head_dim` does not divide the widths.
    """

    official_keys: ClassVar[KeyMap] = (
        (r"^patch_embed1\.", "stem."),
        (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
        (r"^block(\d)\.(\d+)\.mlp\.dwconv\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.mlp."),
        (r"^block(\d)\.(\d+)\.attn\.cpb_", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.attn.cpb."),
        (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
        (r"^norm(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
        (r"^head\.(?!fc\.)", "head.fc."),
    )

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 15, 2),
        dims: Sequence[int] = (48, 96, 192, 384),
        head_dim: int = 24,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        pool_ratios: Sequence[int] = (8, 4, 2, 1),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
        dense: bool = False,
        bias_mode: Literal["extrapolate", "interpolate"] | None = None,
        pretrain_size: int = 224,
        fixed_pool_size: int | None = None,
    ):
        bias_mode = bias_mode or ("interpolate" if dense else "extrapolate")
        if bias_mode not in ("extrapolate", "interpolate"):
            raise ValueError(f"bias_mode={bias_mode!r}: expected extrapolate or interpolate")
        if fixed_pool_size is not None and fixed_pool_size < 1:
            raise ValueError(f"fixed_pool_size={fixed_pool_size}: expected a positive number of cells, or None")
        if any(dim % head_dim for dim in dims):
            raise ValueError(f"head_dim={head_dim} does not divide dims {tuple(dims)}")
        img_size = pretrain_size if img_size is None else img_size
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            stride = 4 * 2**i
            attention: Callable[..., nn.Module] = partial(Attention, exact_length=not dense)
            if pool_ratios[i] != 1:
                attention = partial(AggregatedAttention, ratio=pool_ratios[i], pool_size=fixed_pool_size)
            attention = partial(
                attention,
                dim=dim,
                head_dim=head_dim,
                pretrain_grid=pretrain_size // stride,
                trained=_pooled_grid(sides, stride) if bias_mode == "interpolate" else None,
            )
            blocks = [Block(dim, attention(), mlp_ratios[i], rate) for rate in rates[i]]
            stages.append(TransNeXtStage(PatchEmbed(dims[i - 1], dim, 3, 2) if i else None, blocks, dim))
        super().__init__(
            PatchEmbed(in_chans, dims[0], 7, 4),
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

    def no_weight_decay(self) -> set[str]:
        parts = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
        return {key for key, _ in self.named_parameters() if any(part in key for part in parts)}


_cfg = partial(
    backbone_cfg,
    first_conv="stem.proj",
    license="apache-2.0",
    paper_ids="arXiv:2311.17132",
    paper_name="TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
    origin_url="https://github.com/DaiShiResearch/TransNeXt",
)

_AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0, "crop_mode": "squash"}

default_cfgs = generate_default_cfgs(
    {
        "transnext_micro.in1k": _cfg(),
        "transnext_tiny.in1k": _cfg(),
        "transnext_small.in1k": _cfg(),
        "transnext_small.ft_in1k_384": _cfg(**_AT_384),
        "transnext_base.in1k": _cfg(),
        "transnext_base.ft_in1k_384": _cfg(**_AT_384),
        "transnext_micro_AAAA.in1k": _cfg(input_size=(3, 256, 256), pool_size=(8, 8)),
    }
)


_create = partial(create_backbone, TransNeXt)


@register_model
def transnext_micro(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TransNeXt-Micro."""
    return _create("transnext_micro", pretrained, {}, kwargs)


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TransNeXt-Tiny."""
    return _create("transnext_tiny", pretrained, {"dims": (72, 144, 288, 576)}, kwargs)


@register_model
def transnext_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TransNeXt-Small."""
    args = {"depths": (5, 5, 22, 5), "dims": (72, 144, 288, 576)}
    return _create("transnext_small", pretrained, args, kwargs)


@register_model
def transnext_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TransNeXt-Base."""
    args = {"depths": (5, 5, 23, 5), "dims": (96, 192, 384, 768)}
    return _create("transnext_base", pretrained, args, kwargs)


@register_model
def transnext_micro_AAAA(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TransNeXt-Micro with aggregated attention in all four stages, made for 256 pixels."""
    args = {"pool_ratios": (16, 8, 4, 2), "pretrain_size": 256}
    return _create("transnext_micro_AAAA", pretrained, args, kwargs)
