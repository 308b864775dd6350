"""STViT-R: a Swin transformer whose third stage works on a few semantic tokens, and gives all tokens back.

Paper: "Making Vision Transformers Efficient from A Token Sparsification View", arXiv 2303.08685 (CVPR 2023).
Written from the paper and a specification of the official releases (changsn/STViT-R and its detection fork, both MIT),
whose weights it loads and whose numbers it gives. Not to be confused with Super Token Sampling, also called STViT.

Stage 2 consists of units of six blocks:

    0        a Swin block, without shift
    1, 2     make 3 x 3 semantic tokens for each window of image tokens, pooled at first, by attention to image tokens
    3, 4     mix semantic tokens: those of a window, then all of them
    5        give the image tokens back: each attends to semantic tokens

In the classifier, attention of blocks 2 and 5 is global. In dense mode each window attends to the patch around it.

Layouts in names: b batch, c channels, h and w rows and columns, n and m tokens, d channels of a head. Semantic tokens
(B, N, C) are ordered window by window, image tokens in raster order.
"""

import logging
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from effbackbones.checkpoint import CheckpointError, KeyMap
from effbackbones.layers import (
    Cached,
    Linear,
    Mlp,
    RelativePositionBias,
    aligned_bias,
    attend,
    constant,
    fold_norm,
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
from effbackbones.models._hierarchical import HierarchicalBackbone, Stage, backbone_cfg, create_backbone, init_linear

_logger = logging.getLogger(__name__)

UNIT = 6  # blocks of a unit
SIDE = 3  # rows and columns of a window's semantic tokens
TOKENS = SIDE * SIDE
PATCH = 10  # side of a window's patch of image tokens, in block 1 of the classifier
REACHES = {1: 14, 2: 21, 5: 27}  # side of the patch around a window, in dense mode, by the block's place in its unit
WHOLE = 8  # a map of up to so many patches is attended to whole, patches of larger ones are copied; measured on a CPU

PadMask = Literal["official", "exact"]
Size = tuple[int, int]


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with a batch norm and a hardswish; the image is padded to fit."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(dim // 2)
        self.act = nn.Hardswish()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(dim)

    def forward(self, x_bchw: Tensor) -> Tensor:
        pad_h, pad_w = -x_bchw.shape[2] % 4, -x_bchw.shape[3] % 4
        if pad_h or pad_w:
            x_bchw = F.pad(x_bchw, (0, pad_w, 0, pad_h))
        x_bchw = self.act(self.norm1(self.conv1(x_bchw)))
        return self.act(self.norm2(self.conv2(x_bchw)))

    def fold(self) -> None:
        fold_norm(self, "norm1", self.conv1)
        fold_norm(self, "norm2", self.conv2)


# Swin


class WindowAttention(Cached):
    """Self-attention of a map (B, H, W, C) within windows, cyclically shifted, with a relative position bias.

    The map is padded with zeros, at the bottom and the right, to whole windows; padding takes part as keys.
    """

    def __init__(self, dim: int, head_dim: int, window: int):
        super().__init__()
        self.window = (window, window)
        self.heads = dim // head_dim
        self.qkv = Linear(dim, 3 * dim)
        self.rel_pos = RelativePositionBias(self.window, self.heads)
        self.proj = Linear(dim, dim)

    def forward(self, x_bhwc: Tensor, shift: int) -> Tensor:
        height, width = x_bhwc.shape[1:3]
        x_bhwc = pad_to_windows(x_bhwc, self.window)  # projecting zeros costs less than padding what is projected
        padded = (x_bhwc.shape[1], x_bhwc.shape[2])
        if shift:
            y_bhnd = self._shifted(x_bhwc.roll((-shift, -shift), (1, 2)), padded, shift)
        else:
            qkv = self.qkv(split_windows(x_bhwc, self.window))
            q_bhnd, k_bhnd, v_bhnd = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            y_bhnd = attend(q_bhnd, k_bhnd, v_bhnd, self.rel_pos())
        y_bhwc = join_window_heads(y_bhnd, self.window, padded)
        if shift:
            y_bhwc = y_bhwc.roll((shift, shift), (1, 2))
        return self.proj(y_bhwc[:, :height, :width].contiguous())

    def _shifted(self, x_bhwc: Tensor, size: Size, shift: int) -> Tensor:
        """Attend within windows of a shifted map: their masks differ, so those of an image stand beside the heads."""

        def masked() -> Tensor:
            bias_bhnn = self.rel_pos()
            mask_bhnn = shift_mask(size, self.window, shift, bias_bhnn.device)
            return aligned_bias((bias_bhnn + mask_bhnn).flatten(0, 1)[None])

        bias_bhnn = self.kept((size, shift), [self.rel_pos.table], masked)
        q_bhnd, k_bhnd, v_bhnd = split_window_heads(self.qkv(x_bhwc), self.window, 3, self.heads)
        shape = (-1, bias_bhnn.shape[1], *q_bhnd.shape[2:])
        y_bhnd = attend(q_bhnd.reshape(shape), k_bhnd.reshape(shape), v_bhnd.reshape(shape), bias_bhnn)
        return y_bhnd.reshape(q_bhnd.shape)


@constant
def shift_mask(size: Size, window: Size, shift: int, device: torch.device) -> Tensor:
    """Return -100 for each pair of tokens of a window, of a shifted map of `size`, that do not belong together.

    The shape is (windows, 1, N, N).
    """
    rows, cols = (
        (torch.arange(n, device=device) >= n - w).long() + (torch.arange(n, device=device) >= n - shift).long()
        for n, w in zip(size, window, strict=True)
    )
    labels = split_windows((3 * rows[:, None] + cols)[None, :, :, None], window)
    return -100.0 * (labels != labels.transpose(1, 2)).float().unsqueeze(1)


class SwinBlock(nn.Module):
    """Attention within windows, shifted by `shift`, and an MLP, on a map (B, H, W, C).

    Unless `always_shift`, a map that is one window high or wide, or less, is not shifted.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        mlp_ratio: float,
        drop_path: float,
        *,
        window: int,
        shift: int,
        always_shift: bool,
        layer_scale: float | None,
    ):
        super().__init__()
        self.window, self.shift, self.always_shift = window, shift, always_shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, head_dim, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma1, self.gamma2 = layer_scales((dim,), layer_scale)

    def forward(self, x_bhwc: Tensor) -> Tensor:
        shift = self.shift if self.always_shift or min(x_bhwc.shape[1:3]) > self.window else 0
        x = x_bhwc + self.drop_path(scaled(self.attn(self.norm1(x_bhwc), shift), self.gamma1))
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))

    def fold(self) -> None:
        fold_scales(self, self.attn.proj, self.mlp.fc2)


class SwinStage(Stage):
    """A stage of Swin blocks: maps are channels last between its layers."""

    def forward(self, x_bchw: Tensor) -> Tensor:
        x_bhwc = self.downsample(x_bchw.permute(0, 2, 3, 1).contiguous())
        return self.run_blocks(x_bhwc).permute(0, 3, 1, 2)

    def run_blocks(self, x_bhwc: Tensor) -> Tensor:
        for block in self.blocks:
            x_bhwc = self.run(block, x_bhwc)
        return x_bhwc


# Units: blocks of semantic tokens


class CrossAttention(nn.Module):
    """Multi-head attention of tokens (B, N, C) to others (B, M, C), without a position bias."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def forward(
        self, x_bnc: Tensor, keys_bmc: Tensor, bias: Tensor | None = None, patches: Tensor | None = None
    ) -> Tensor:
        """Return (B, N, C).

        Args:
            x_bnc: Queries.
            keys_bmc: Keys and values; projected once, however many patches they are in, but on the reference path.
            bias: Added to the scores, (1, 1, N, M); with patches (W, 1, keys).
            patches: Keys of each window by number, (W, keys), where the queries are those of W windows in turn.
        """
        if patches is not None and use_reference():
            windows_gnc = x_bnc.reshape(len(x_bnc) * len(patches), -1, x_bnc.shape[2])
            bias = None if bias is None else bias.unsqueeze(1).repeat(len(x_bnc), 1, 1, 1)
            return self(windows_gnc, keys_bmc[:, patches].flatten(0, 1), bias).reshape(x_bnc.shape)
        q_bhnd = self.q(x_bnc).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        kv_bhmd = self.kv(keys_bmc).unflatten(2, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        if patches is None:
            y_bhnd = attend(q_bhnd, kv_bhmd[0], kv_bhmd[1], bias)
        else:  # the windows of an image stand beside the heads
            heads, windows = q_bhnd.shape[1], len(patches)
            q_bhnd = q_bhnd.unflatten(2, (windows, -1)).flatten(1, 2)
            kv_bhmd = kv_bhmd.contiguous().index_select(3, patches.flatten()).unflatten(3, patches.shape).flatten(2, 3)
            bias = None if bias is None else bias.repeat(heads, 1, 1)[None]
            y_bhnd = attend(q_bhnd, kv_bhmd[0], kv_bhmd[1], bias).unflatten(1, (heads, windows)).flatten(2, 3)
        return self.proj(y_bhnd.transpose(1, 2).reshape(x_bnc.shape))


class SemanticBlock(nn.Module):
    """Attention from tokens to tokens and an MLP, both with layer scale: what blocks 1 to 5 of a unit have in common.

    Args:
        dim: Width.
        head_dim: Channels of a head.
        mlp_ratio: Hidden width of the MLP over its width.
        drop_path: Rate of stochastic depth.
        window: Side of a window of image tokens.
    """

    def __init__(self, dim: int, head_dim: int, mlp_ratio: float, drop_path: float, *, window: int):
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma1, self.gamma2 = layer_scales((dim,), 1e-5)

    def attention(self, x_bnc: Tensor, keys_bmc: Tensor | None = None, *how: Tensor | None) -> Tensor:
        """Return the branch of attention to others, or to themselves; all tokens go through the one norm."""
        y_bnc = self.norm1(x_bnc)
        return scaled(self.attn(y_bnc, y_bnc if keys_bmc is None else self.norm1(keys_bmc), *how), self.gamma1)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return the tokens after the MLP."""
        return x + self.drop_path(scaled(self.mlp(self.norm2(x)), self.gamma2))

    def fold(self) -> None:
        fold_scales(self, self.attn.proj, self.mlp.fc2)


class GenerateBlock(SemanticBlock):
    """Block 1 of the classifier: pooled tokens attend to those of their window and to a patch of the image tokens.

    The pooled tokens are not added to what attention gives.
    """

    def forward(self, s_bnc: Tensor, x_bhwc: Tensor) -> Tensor:
        bias = near_bias((x_bhwc.shape[1], x_bhwc.shape[2]), self.window, x_bhwc.dtype, x_bhwc.device)
        keys_bmc = torch.cat([s_bnc, x_bhwc.flatten(1, 2)], 1)
        if use_reference():
            seen_wm = bias[0, 0, ::TOKENS] == 0
            patches = seen_wm.nonzero()[:, 1].reshape(len(seen_wm), -1)  # as many in each window
            return self.feed_forward(self.attention(s_bnc, keys_bmc, None, patches))
        return self.feed_forward(self.attention(s_bnc, keys_bmc, bias))


class RefineBlock(SemanticBlock):
    """Block 2 of the classifier: semantic tokens attend to all tokens of both kinds.

    A learned offset may come on top of the queries, and stays there.
    """

    def forward(self, s_bnc: Tensor, x_bhwc: Tensor, offset_1nc: Tensor | None) -> Tensor:
        keys_bmc = torch.cat([s_bnc, x_bhwc.flatten(1, 2)], 1)
        s_bnc = s_bnc if offset_1nc is None else s_bnc + offset_1nc
        return self.feed_forward(s_bnc + self.drop_path(self.attention(s_bnc, keys_bmc)))


class MixBlock(SemanticBlock):
    """Blocks 3 and 4: self-attention of semantic tokens, of each window or of all."""

    def __init__(self, *args: Any, local: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.local = local

    def forward(self, s_bnc: Tensor) -> Tensor:
        group_bnc = s_bnc.reshape(-1, TOKENS, s_bnc.shape[2]) if self.local else s_bnc
        y_bnc = self.attention(group_bnc).reshape(s_bnc.shape)
        return self.feed_forward(s_bnc + self.drop_path(y_bnc))


class RecoverBlock(SemanticBlock):
    """Block 5 of the classifier: image tokens attend to all semantic tokens."""

    def forward(self, x_bhwc: Tensor, s_bnc: Tensor) -> Tensor:
        y_bnc = self.attention(x_bhwc.flatten(1, 2), s_bnc)
        return self.feed_forward(x_bhwc + self.drop_path(y_bnc.reshape(x_bhwc.shape)))


# Units: dense mode. A zero token behind the keys stands for all that lie outside the map: its norm is the norm's bias.


class DenseBlock(SemanticBlock):
    """Attention from the tokens of each window to a patch around it, of `reach` tokens a side.

    Where the map of the keys is not many times a patch, this is attention to all of it under a bias: no key is copied.
    The reference path copies always.
    """

    def __init__(self, *args: Any, reach: int, pad_mask: PadMask, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reach, self.pad_mask = reach, pad_mask

    def patches_attention(self, x_bnc: Tensor, keys_bmc: Tensor, size: Size, semantic: bool) -> Tensor:
        """Return the branch of attention from windows in turn to their patches, copied, of a map of `size`."""
        where = (size, self.window, self.reach, semantic, self.pad_mask)
        patches, _ = patches_of(*where, x_bnc.device)
        return self.attention(x_bnc, keys_bmc, patch_bias(*where, x_bnc.dtype, x_bnc.device), patches)


class DenseGenerateBlock(DenseBlock):
    """Blocks 1 and 2 of dense mode: semantic tokens attend to the patch of image tokens around their window."""

    def forward(self, s_bnc: Tensor, x_bhwc: Tensor) -> Tensor:
        size = (x_bhwc.shape[1], x_bhwc.shape[2])
        keys_bmc = F.pad(x_bhwc.flatten(1, 2), (0, 0, 0, 1))
        if keys_bmc.shape[1] <= WHOLE * self.reach**2 and not use_reference():
            bias_wm = map_bias(size, self.window, self.reach, False, self.pad_mask, x_bhwc.dtype, x_bhwc.device)
            bias_nm = bias_wm.unsqueeze(1).expand(-1, TOKENS, -1).flatten(0, 1)
            y_bnc = self.attention(s_bnc, keys_bmc, bias_nm[None, None])
        else:
            y_bnc = self.patches_attention(s_bnc, keys_bmc, size, False)
        y_bnc = self.drop_path(y_bnc.reshape(-1, TOKENS, y_bnc.shape[2])).reshape(s_bnc.shape)  # window by window
        return self.feed_forward(s_bnc + y_bnc)


class DenseRecoverBlock(DenseBlock):
    """Block 5 of dense mode: image tokens attend to the patch of semantic tokens around their window."""

    def forward(self, x_bhwc: Tensor, s_bnc: Tensor) -> Tensor:
        size = (x_bhwc.shape[1], x_bhwc.shape[2])
        keys_bmc = F.pad(s_bnc, (0, 0, 0, 1))
        if use_reference():
            return self.feed_forward(x_bhwc + self._windows(x_bhwc, keys_bmc))
        windows_n = window_of_token(size, self.window, x_bhwc.device)
        bias_wm = map_bias(size, self.window, self.reach, True, self.pad_mask, x_bhwc.dtype, x_bhwc.device)
        bias_nm = bias_wm.index_select(0, windows_n)
        y_bnc = self.attention(x_bhwc.flatten(1, 2), keys_bmc, bias_nm[None, None])
        if self.training:  # stochastic depth window by window
            factors = self.drop_path(x_bhwc.new_ones(x_bhwc.shape[0] * len(bias_wm), 1)).reshape(-1, len(bias_wm), 1)
            y_bnc = y_bnc * factors.index_select(1, windows_n)
        return self.feed_forward(x_bhwc + y_bnc.reshape(x_bhwc.shape))

    def _windows(self, x_bhwc: Tensor, keys_bmc: Tensor) -> Tensor:
        """Return the branch of attention from windows of image tokens to patches that are copied, (B, H, W, C)."""
        height, width = x_bhwc.shape[1:3]
        padded_bhwc = pad_to_windows(x_bhwc, (self.window, self.window))
        x_gnc = split_windows(padded_bhwc, (self.window, self.window))
        x_bnc = x_gnc.reshape(len(x_bhwc), -1, x_bhwc.shape[3])
        y_bnc = self.patches_attention(x_bnc, keys_bmc, (height, width), True)
        y_gnc = self.drop_path(y_bnc.reshape(x_gnc.shape))
        y_bhwc = join_windows(y_gnc, (self.window, self.window), (padded_bhwc.shape[1], padded_bhwc.shape[2]))
        return y_bhwc[:, :height, :width]


# Units: geometry


def grid_of(size: Size, window: int) -> Size:
    """Return the rows and columns of windows that cover a map of `size`."""
    return -(-size[0] // window), -(-size[1] // window)


def max_pool_axis(x: Tensor, dim: int, bins: int) -> Tensor:
    """Return adaptive max pooling of one axis to `bins`, by slices: the adaptive kernels are not exported."""
    periods = math.gcd(x.shape[dim], bins)  # the bins' pattern repeats
    length, n = x.shape[dim] // periods, bins // periods
    x = x.unflatten(dim, (periods, length))
    dim += 1
    edges = [(i * length // n, -(-(i + 1) * length // n)) for i in range(n)]
    return torch.stack([x.narrow(dim, lo, hi - lo).amax(dim) for lo, hi in edges], dim).flatten(dim - 1, dim)


def pool_tokens(x_bhwc: Tensor, grid: Size) -> Tensor:
    """Return 3 x 3 semantic tokens for each of a grid of windows, (B, N, C), maxima of the map."""
    for i in (0, 1):
        x_bhwc = max_pool_axis(x_bhwc, 1 + i, SIDE * grid[i])
    return split_windows(x_bhwc, (SIDE, SIDE)).reshape(-1, TOKENS * grid[0] * grid[1], x_bhwc.shape[3])


def seen_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 for each key that is seen, -inf for one that is not."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)


@constant
def near_bias(size: Size, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return which keys semantic tokens see in block 1 of the classifier, as a bias (1, 1, N, N + H W) of 0 and -inf.

    Those of their own window, then the image tokens of a patch of 10 x 10. With two windows of 7 a side the patches
    start at rows and columns 0 and 4, as in the release; elsewhere too half a window ahead of theirs, within the map.
    """
    grid = grid_of(size, window)
    axes = []
    for n, windows in zip(size, grid, strict=True):
        starts = [min(max(i * n // windows - window // 2, 0), max(n - PATCH, 0)) for i in range(windows)]
        distance = torch.arange(n, device=device) - torch.tensor(starts, device=device)[:, None]
        axes.append((distance >= 0) & (distance < PATCH))
    image_wm = (axes[0][:, None, :, None] & axes[1][None, :, None, :]).reshape(grid[0] * grid[1], size[0] * size[1])
    own_wm = torch.eye(len(image_wm), dtype=torch.bool, device=device).repeat_interleave(TOKENS, 1)
    seen_nm = torch.cat([own_wm, image_wm], 1).repeat_interleave(TOKENS, 0)
    return seen_bias(seen_nm, dtype)[None, None]


@constant
def window_of_token(size: Size, window: int, device: torch.device) -> Tensor:
    """Return the number of each image token's window, (H W,)."""
    rows, cols = (torch.arange(n, device=device) // window for n in size)
    return (rows[:, None] * grid_of(size, window)[1] + cols).flatten()


@constant
def patches_of(
    size: Size, window: int, reach: int, semantic: bool, pad_mask: PadMask, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the keys of the patch around each window, by number, and which of them count, both (W, reach reach).

    Keys are tokens of the image map of `size`, or semantic ones; what lies outside has the number behind the last.

    The official mask hides what is in a padded row and in a padded column. It takes all rows for padded where none
    are (columns alike), and counts padding in image tokens for the semantic map too. What lies outside the padded map
    is hidden, but a patch of which all is hidden counts whole. The exact mask hides what lies outside the padded map
    and what no image token has gone into.
    """
    side = SIDE if semantic else window
    exact = pad_mask == "exact"
    axes = []
    for length, windows in zip(size, grid_of(size, window), strict=True):
        rows = torch.arange(windows, device=device)[:, None] * side - (reach - side) // 2
        rows = rows + torch.arange(reach, device=device)
        pad = windows * window - length
        if exact and semantic:
            pad = sum(window * i // SIDE >= window - pad for i in range(SIDE))
        inside = (rows >= 0) & (rows < windows * side)
        padded = rows >= windows * side - pad if pad or exact else inside
        exists = inside if semantic else inside & (rows < length)
        axes.append((rows, inside, padded, exists))
    rows, inside_h, padded_h, exists_h = (t[:, None, :, None] for t in axes[0])
    cols, inside_w, padded_w, exists_w = (t[None, :, None, :] for t in axes[1])
    hidden = padded_h | padded_w if exact else padded_h & padded_w
    seen_wm = (inside_h & inside_w & ~hidden).reshape(-1, reach * reach)
    seen_wm = seen_wm | ~seen_wm.any(1, keepdim=True)
    if semantic:
        number = (rows // SIDE * len(axes[1][0]) + cols // SIDE) * TOKENS + rows % SIDE * SIDE + cols % SIDE
        last = TOKENS * len(seen_wm)
    else:
        number, last = rows * size[1] + cols, size[0] * size[1]
    return torch.where(exists_h & exists_w, number, last).reshape(seen_wm.shape), seen_wm


@constant
def patch_bias(
    size: Size, window: int, reach: int, semantic: bool, pad_mask: PadMask, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Return the bias of attention to patches, (W, 1, reach reach), of 0 and -inf; None where every key counts."""
    if pad_mask == "official" and size[0] % window == size[1] % window == 0:
        return None
    _, seen_wm = patches_of(size, window, reach, semantic, pad_mask, device)
    return seen_bias(seen_wm, dtype).unsqueeze(1)


@constant
def map_bias(
    size: Size, window: int, reach: int, semantic: bool, pad_mask: PadMask, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the bias that makes attention to all keys and a zero token attention to the patches, (W, M + 1).

    A key that counts k times in a patch has log k there, -inf if not at all.
    """
    numbers_wm, seen_wm = patches_of(size, window, reach, semantic, pad_mask, device)
    keys = TOKENS * len(seen_wm) if semantic else size[0] * size[1]
    counts = torch.zeros(len(seen_wm), keys + 1, dtype=torch.long, device=device)
    return counts.scatter_add(1, numbers_wm, seen_wm.long()).to(dtype).log()


class SemanticStage(SwinStage):
    """The stage of units: the map goes on from unit to unit, semantic tokens live within one.

    Args:
        downsample: As in :class:`Stage`.
        blocks: Blocks of whole units.
        window: Side of a window.
        dense: Dense mode.
        global_dim: Width of the learned offset of semantic tokens in the first unit; None for none. It is a map of
            6 x 6, resized to the semantic map.
    """

    def __init__(
        self, downsample: nn.Module, blocks: Sequence[nn.Module], window: int, dense: bool, global_dim: int | None
    ):
        super().__init__(downsample, blocks)
        self.window = window
        self.dense = dense
        self.global_token = None
        if global_dim is not None:
            self.global_token = nn.Parameter(torch.empty(1, 36, global_dim))
            trunc_normal_(self.global_token, std=0.02)

    def run_blocks(self, x_bhwc: Tensor) -> Tensor:
        window = (self.window, self.window)
        grid = grid_of((x_bhwc.shape[1], x_bhwc.shape[2]), self.window)
        for i in range(0, len(self.blocks), UNIT):
            swin, generate, refine, local, overall, recover = self.blocks[i : i + UNIT]
            x_bhwc = self.run(swin, x_bhwc)
            s_bnc = pool_tokens(pad_to_windows(x_bhwc, window) if self.dense else x_bhwc, grid)
            s_bnc = self.run(generate, s_bnc, x_bhwc)
            if self.dense:
                s_bnc = self.run(refine, s_bnc, x_bhwc)
            else:
                s_bnc = self.run(refine, s_bnc, x_bhwc, None if i else self._offset(grid))
            s_bnc = self.run(overall, self.run(local, s_bnc))
            x_bhwc = self.run(recover, x_bhwc, s_bnc)
        return x_bhwc

    def _offset(self, grid: Size) -> Tensor | None:
        """Return the learned offset of the semantic tokens, (1, N, C)."""
        if self.global_token is None:
            return None
        x_bchw = self.global_token.transpose(1, 2).unflatten(2, (6, 6))
        if grid != (2, 2):
            x_bchw = F.interpolate(x_bchw, (SIDE * grid[0], SIDE * grid[1]), mode="bilinear", align_corners=False)
        return split_windows(x_bchw.permute(0, 2, 3, 1), (SIDE, SIDE)).reshape(1, -1, x_bchw.shape[1])


class STViTR(HierarchicalBackbone):
    """STViT-R on Swin: Swin stages 0, 1 and 3, and a stage 2 of units of semantic tokens.

    Takes images of any size from 32 pixels up; they are padded to multiples of 4 with zeros, and maps round up (n / 4,
    then n / 2). The official classifier takes 224 pixels with windows of 7 and 256 with windows of 8 alone; at other
    sizes windows keep their side, the last ones are filled up, and tokens are pooled from the map as it is.

    Args:
        depths: Blocks of the four stages; that of stage 2 a multiple of 6.
        dims: Channels of the four stages.
        head_dim: Channels of an attention head.
        mlp_ratio: Hidden width of an MLP over its width.
        window_size: Side of a window, in tokens.
        use_global: Give the semantic tokens of the first unit a learned offset. The releases have none.
        use_layer_scale: Give the Swin blocks of stages 0, 1 and 3 layer scale. The releases have none.
        in_chans: Channels of the image.
        num_classes: Width of the classifier; 0 for none.
        global_pool: Pooling of the classifier, by timm's name.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last block; from 0 it grows linearly over the blocks.
        img_size: Taken for uniformity; nothing depends on it.
        dense: Dense-prediction mode: an output norm on every map, no classifier, and the attention of stage 2 in
            patches, as in the official detector: another function of the same weights.
        pad_mask: Which keys of a patch count in dense mode. `official` gives the release's numbers: what it hides
            depends on whether the window divides the sides of stage 2's map. `exact` hides padding, all of it, and
            nothing else; for new training.

    Raises:
        ValueError: The depth of stage 2 is not a multiple of 6, `head_dim` does not divide a width, `pad_mask` is
            unknown, or `use_global` is asked for in dense mode.
    """

    official_keys: ClassVar[KeyMap] = (
        (r"^patch_embed\.proj\.0\.c\.", "stem.conv1."),
        (r"^patch_embed\.proj\.0\.bn\.", "stem.norm1."),
        (r"^patch_embed\.proj\.2\.c\.", "stem.conv2."),
        (r"^patch_embed\.proj\.2\.bn\.", "stem.norm2."),
        (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
        (r"^layers\.2\.semantic_token2$", "stages.2.global_token"),
        (r"^layers\.(.*)\.layer_scale_([12])$", r"stages.\1.gamma\2"),
        (r"^layers\.(.*)\.relative_position_bias_table$", r"stages.\1.rel_pos.table"),
        (r"^layers\.", "stages."),
        (r"^norm(\d)\.", r"norms.\1."),
        (r"^head\.(?!fc\.)", "head.fc."),
    )

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        window_size: int = 7,
        use_global: bool = False,
        use_layer_scale: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
        dense: bool = False,
        pad_mask: PadMask = "official",
    ):
        if depths[2] % UNIT:
            raise ValueError(f"depths={tuple(depths)}: expected a multiple of {UNIT} blocks in stage 2, units of six")
        if any(dim % head_dim for dim in dims):
            raise ValueError(f"head_dim={head_dim} does not divide each of dims={tuple(dims)}")
        if pad_mask not in ("official", "exact"):
            raise ValueError(f"pad_mask={pad_mask!r}: expected official or exact")
        if use_global and dense:
            raise ValueError("use_global=True: a dense model has no learned offset of semantic tokens; leave it out")
        self.window_size = window_size
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def block(i: int, j: int) -> nn.Module:
            args: dict[str, Any] = {"drop_path": rates[i][j], "window": window_size}
            shape = (dims[i], head_dim, mlp_ratio)
            place = j % UNIT if i == 2 else 0
            if not place:
                shift = j % 2 * (window_size // 2) if i != 2 else 0
                layer_scale = 1e-5 if use_layer_scale and i != 2 else None
                return SwinBlock(*shape, **args, shift=shift, always_shift=dense, layer_scale=layer_scale)
            if place in (3, 4):
                return MixBlock(*shape, **args, local=place == 3)
            if dense:
                kind = DenseRecoverBlock if place == 5 else DenseGenerateBlock
                return kind(*shape, **args, reach=REACHES[place], pad_mask=pad_mask)
            return {1: GenerateBlock, 2: RefineBlock, 5: RecoverBlock}[place](*shape, **args)

        stages: list[nn.Module] = []
        for i, dim in enumerate(dims):
            down: Any = PatchMerging(dims[i - 1], dim) if i else None
            blocks = [block(i, j) for j in range(depths[i])]
            if i == 2:
                stages.append(SemanticStage(down, blocks, window_size, dense, dim if use_global else None))
            else:
                stages.append(SwinStage(down, blocks))
        super().__init__(
            ConvStem(in_chans, dims[0]),
            stages,
            dims,
            norm=LayerNorm2d(dims[-1], eps=1e-5),
            output_norms=[LayerNorm2d(dim, eps=1e-5) for dim in dims] if dense else None,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        return {key for key, _ in self.named_parameters() if key.endswith(".rel_pos.table")}

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        adapted = {}
        for key, value in weights.items():
            if re.match(r"stages\.\d\.blocks\.\d+\.(attn\.relative_position_index|attn_mask)$", key):
                check_constant(key, value)
            elif key == "stages.2.global_token" and self.dense:
                _logger.info("In the checkpoint, not in dense models: %s", key)
            elif key.endswith(".rel_pos.table"):
                adapted[key] = resize_table(value, (self.window_size, self.window_size))
            else:
                adapted[key] = value
        return adapted


def check_constant(key: str, value: Tensor) -> None:
    """Raise an error where an index table (N, N) or a shift mask (windows, N, N) of the releases is not as made here.

    Their windows and maps are square, so its shape says of which it is.

    Raises:
        CheckpointError: It is another; the message names it.
    """
    w, side = (math.isqrt(n) for n in ((value.shape[-1], value.shape[0]) if value.ndim > 1 else (1, 1)))
    if key.endswith("attn_mask"):
        expected = shift_mask((side * w, side * w), (w, w), w // 2, torch.device("cpu")).squeeze(1)
    else:
        rows, cols = (t[:, None] - t + w - 1 for t in (torch.arange(w * w) // w, torch.arange(w * w) % w))
        expected = rows * (2 * w - 1) + cols
    if not torch.equal(value.to(expected), expected):
        raise CheckpointError(f"{key}: not the constant of square windows; is it a checkpoint of another kind?")


_cfg = partial(
    backbone_cfg,
    first_conv="stem.conv1",
    license=None,  # of the weights; the code they come from is MIT
    paper_ids="arXiv:2303.08685",
    paper_name="Making Vision Transformers Efficient from A Token Sparsification View",
    origin_url="https://github.com/changsn/STViT-R",
)


default_cfgs = generate_default_cfgs(
    {
        "stvit_r_swin_tiny.untrained": _cfg(),
        "stvit_r_swin_small.in1k": _cfg(),
        "stvit_r_swin_base.in1k": _cfg(),
    }
)


_create = partial(create_backbone, STViTR)


@register_model
def stvit_r_swin_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """STViT-R on Swin-T: one unit. The release has its configuration alone, no weights and no results."""
    return _create("stvit_r_swin_tiny", pretrained, {}, kwargs)


@register_model
def stvit_r_swin_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """STViT-R on Swin-S: three units."""
    return _create("stvit_r_swin_small", pretrained, {"depths": (2, 2, 18, 2)}, kwargs)


@register_model
def stvit_r_swin_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """STViT-R on Swin-B: three units."""
    args = {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024)}
    return _create("stvit_r_swin_base", pretrained, args, kwargs)
