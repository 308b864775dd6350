"""The kernels of `effbackbones.ops.super_tokens`, which states what is computed.

`associate` makes the weights of pixels for the super tokens around them, without scores in memory; `gather` sums pixels
into super tokens by them, `spread` brings super tokens back to the pixels. These two are each other's transposes, and
so each other's gradients; weights are constants to the gradient.

Legend: b batch, h and w rows and columns of cells, c channels, g cells (all of a batch, row by row), n pixels of a
cell, k its nine neighbours, row by row; x a tile of pixels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 64
"""Channels of a tile, at most."""


@triton.jit
def _around(cell, k, height, width):
    """Return the cells around one, and whether they are inside the grid: k = 0..8, row by row."""
    row, col = cell % (height * width) // width + k // 3 - 1, cell % width + k % 3 - 1
    inside = (k < 9) & (row >= 0) & (row < height) & (col >= 0) & (col < width)
    return cell + (k // 3 - 1) * width + k % 3 - 1, inside


@triton.jit
def _associate(
    s_ptr, x_ptr, q_ptr, total_ptr, scale, height, width, n, c,
    X: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, 16)
    others, inside = _around(cell, k, height, width)
    total = tl.zeros((16,), tl.float32)
    for first in range(0, n, X):
        x = first + tl.arange(0, X)
        scores = tl.zeros((X, 16), tl.float32)
        for start in range(0, c, C):
            channels = start + tl.arange(0, C)
            at = (cell * n + x[:, None]) * c + channels[None, :]
            pixels = tl.load(x_ptr + at, (x[:, None] < n) & (channels[None, :] < c), 0.0)
            at = others[None, :] * c + channels[:, None]
            tokens = tl.load(s_ptr + at, inside[None, :] & (channels[:, None] < c), 0.0)
            scores += tl.dot(pixels, tokens.to(pixels.dtype), input_precision=PRECISION)
        scores = tl.where(k[None, :] < 9, scores * scale, float("-inf"))
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        weights = tl.where(x[:, None] < n, weights / tl.sum(weights, 1)[:, None], 0.0)
        total += tl.sum(weights, 0)
        at = cell * 9 * n + k[None, :] * n + x[:, None]
        tl.store(q_ptr + at, weights, (x[:, None] < n) & (k[None, :] < 9))
    tl.store(total_ptr + cell * 9 + k, total, k < 9)


@triton.jit
def _sum_cells(q_ptr, x_ptr, part_ptr, n, c, X: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Sum a cell's pixels for each of the super tokens around it."""
    cell = tl.program_id(0).to(tl.int64)
    channels, k = tl.program_id(1) * C + tl.arange(0, C), tl.arange(0, 16)
    total = tl.zeros((16, C), tl.float32)
    for first in range(0, n, X):
        x = first + tl.arange(0, X)
        weights = tl.load(q_ptr + (cell * 9 + k[:, None]) * n + x[None, :], (k[:, None] < 9) & (x[None, :] < n), 0.0)
        pixels_at = (cell * n + x[:, None]) * c + channels[None, :]
        pixels = tl.load(x_ptr + pixels_at, (x[:, None] < n) & (channels[None, :] < c), 0.0)
        total += tl.dot(weights, pixels.to(weights.dtype), input_precision=PRECISION)
    at = (cell * 9 + k[:, None]) * c + channels[None, :]
    tl.store(part_ptr + at, total, (k[:, None] < 9) & (channels[None, :] < c))


@triton.jit
def _collect(part_ptr, s_ptr, height, width, c, C: tl.constexpr):
    """Sum what the cells around a super token have for it."""
    cell = tl.program_id(0).to(tl.int64)
    channels, k = tl.program_id(1) * C + tl.arange(0, C), tl.arange(0, 16)
    others, inside = _around(cell, k, height, width)
    at = (others[:, None] * 9 + 8 - k[:, None]) * c + channels[None, :]  # to them, this cell is neighbour 8 - k
    parts = tl.load(part_ptr + at, inside[:, None] & (channels[None, :] < c), 0.0)
    tl.store(s_ptr + cell * c + channels, tl.sum(parts, 0), channels < c)


@triton.jit
def _spread(
    q_ptr, s_ptr, y_ptr, height, width, n, c, X: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64)
    channels, k = tl.program_id(1) * C + tl.arange(0, C), tl.arange(0, 16)
    others, inside = _around(cell, k, height, width)
    tokens_at = others[:, None] * c + channels[None, :]
    tokens = tl.load(s_ptr + tokens_at, inside[:, None] & (channels[None, :] < c), 0.0)
    for first in range(0, n, X):
        x = first + tl.arange(0, X)
        at = cell * 9 * n + k[None, :] * n + x[:, None]
        weights = tl.load(q_ptr + at, (x[:, None] < n) & (k[None, :] < 9), 0.0)
        pixels = tl.dot(weights, tokens.to(weights.dtype), input_precision=PRECISION)
        at = (cell * n + x[:, None]) * c + channels[None, :]
        tl.store(y_ptr + at, pixels, (x[:, None] < n) & (channels[None, :] < c))


@torch.library.custom_op("effbackbones::associate", mutates_args=())
def associate(s_bhwc: Tensor, x_gnc: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of pixels for their super tokens (g, 9, n), and each cell's sums of these, in float32 (g, 9).

    Args:
        s_bhwc: Super tokens, (b, h, w, c).
        x_gnc: Pixels, (b h w, n, c), of 16 or 32 bits.
    """
    s_bhwc, x_gnc = s_bhwc.contiguous(), x_gnc.contiguous()
    (cells, n, c), (height, width) = x_gnc.shape, s_bhwc.shape[1:3]
    q_gkn, total_gk = x_gnc.new_empty(cells, 9, n), x_gnc.new_empty(cells, 9, dtype=torch.float32)
    _associate[(cells,)](
        s_bhwc, x_gnc, q_gkn, total_gk, c**-0.5, height, width, n, c, **_settings(x_gnc), PRECISION=_precision(x_gnc)
    )
    return q_gkn, total_gk


@associate.register_fake
def _(s_bhwc: Tensor, x_gnc: Tensor) -> tuple[Tensor, Tensor]:
    cells, n, _ = x_gnc.shape
    return x_gnc.new_empty(cells, 9, n), x_gnc.new_empty(cells, 9, dtype=torch.float32)


@torch.library.custom_op("effbackbones::gather", mutates_args=())
def gather(q_gkn: Tensor, x_gnc: Tensor, height: int, width: int) -> Tensor:
    """Return the weighted sums of pixels for each super token, (b, h, w, c) in float32; differentiable in pixels.

    Args:
        q_gkn: Weights of pixels for the super tokens around them, (b h w, 9, n).
        x_gnc: Pixels, (b h w, n, c).
        height, width: Rows and columns of cells.
    """
    q_gkn, x_gnc = q_gkn.contiguous(), x_gnc.contiguous()
    cells, n, c = x_gnc.shape
    s_bhwc = x_gnc.new_empty(cells // (height * width), height, width, c, dtype=torch.float32)
    part_gkc, settings = s_bhwc.new_empty(cells, 9, c), _settings(x_gnc)
    grid = cells, triton.cdiv(c, settings["C"])
    _sum_cells[grid](q_gkn, x_gnc, part_gkc, n, c, **settings, PRECISION=_precision(q_gkn))
    _collect[grid](part_gkc, s_bhwc, height, width, c, C=settings["C"], num_warps=1)
    return s_bhwc


@gather.register_fake
def _(q_gkn: Tensor, x_gnc: Tensor, height: int, width: int) -> Tensor:
    return x_gnc.new_empty(x_gnc.shape[0] // (height * width), height, width, x_gnc.shape[2], dtype=torch.float32)


@torch.library.custom_op("effbackbones::spread", mutates_args=())
def spread(q_gkn: Tensor, s_bhwc: Tensor) -> Tensor:
    """Return what super tokens give to pixels, (b h w, n, c) in the dtype of the weights; differentiable in tokens.

    Args:
        q_gkn: Weights of pixels for the super tokens around them, (b h w, 9, n).
        s_bhwc: Super tokens, (b, h, w, c).
    """
    q_gkn, s_bhwc = q_gkn.contiguous(), s_bhwc.contiguous()
    height, width, c = s_bhwc.shape[1:]
    y_gnc = q_gkn.new_empty(q_gkn.shape[0], q_gkn.shape[2], c)
    settings = _settings(y_gnc)
    _spread[y_gnc.shape[0], triton.cdiv(c, settings["C"])](
        q_gkn, s_bhwc, y_gnc, height, width, y_gnc.shape[1], c, **settings, PRECISION=_precision(q_gkn)
    )
    return y_gnc


@spread.register_fake
def _(q_gkn: Tensor, s_bhwc: Tensor) -> Tensor:
    return q_gkn.new_empty(q_gkn.shape[0], q_gkn.shape[2], s_bhwc.shape[3])


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.dtype = inputs[1].dtype


def _differentiate_gather(ctx: Any, grad_bhwc: Tensor) -> tuple[Tensor | None, ...]:
    return None, spread(*ctx.saved_tensors, grad_bhwc).to(ctx.dtype), None, None


def _save_spread(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.grid, ctx.dtype = inputs[1].shape[1:3], inputs[1].dtype


def _differentiate_spread(ctx: Any, grad_gnc: Tensor) -> tuple[Tensor | None, ...]:
    return None, gather(*ctx.saved_tensors, grad_gnc, *ctx.grid).to(ctx.dtype)


gather.register_autograd(_differentiate_gather, setup_context=_save_gather)
spread.register_autograd(_differentiate_spread, setup_context=_save_spread)


def _settings(x_gnc: Tensor) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    x, c = (max(16, triton.next_power_of_2(size)) for size in x_gnc.shape[1:])
    return {"X": min(64, x), "C": min(CHANNELS, c), "num_warps": 4}


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def trial(device: torch.device) -> None:
    """Make a small call and its gradients."""
    s_bhwc, x_gnc = (torch.ones(*shape, device=device, requires_grad=True) for shape in ((1, 1, 1, 8), (1, 4, 8)))
    q_gkn, _ = associate(s_bhwc.detach(), x_gnc.detach())
    spread(q_gkn, gather(q_gkn, x_gnc, 1, 1)).sum().backward()
