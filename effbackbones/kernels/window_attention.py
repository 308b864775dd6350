"""Attention of many windows that share a bias: softmax(scale q k^T + bias) v.

Library kernels take such a bias, but return its gradient window by window, B N M numbers of every head, to be summed
afterwards. Here a program goes through the windows and keeps the sum.

Legend: B windows, h heads, N queries, M keys, d channels of q and k, d_v of v; i and j tiles of queries and keys.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbackbones.kernels.softmax import absorb, slopes_of

PROGRAMS = 1024
"""Programs, about, that the bias's gradient is computed by: the windows are summed in parts for that."""


@triton.jit
def _tile(base, rows, columns, row_stride, n_rows, n_columns):
    """Load a tile (rows, columns) of a matrix whose columns lie side by side; zeros beyond it."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], inside, 0.0)


@triton.jit
def _put(base, values, rows, columns, n_rows, n_columns):
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    tl.store(base + rows[:, None] * n_columns + columns[None, :], values, inside)


@triton.jit
def _two(a_ptr, b_ptr, window_head, rows, n_rows, d, d_v, D: tl.constexpr, D_V: tl.constexpr):
    """Load the same rows of two tensors of a window and head, one of d channels and one of d_v: q and grad, k and v."""
    a = _tile(a_ptr + window_head * n_rows * d, rows, tl.arange(0, D), d, n_rows, d)
    return a, _tile(b_ptr + window_head * n_rows * d_v, rows, tl.arange(0, D_V), d_v, n_rows, d_v)


@triton.jit
def _window(
    q_ptr, k_ptr, v_ptr, grad_ptr, window_head, i, j, n, m, d, d_v, D: tl.constexpr, D_V: tl.constexpr
):  # fmt: skip
    """Load what gradients need of a window and head: q and grad of some queries, k and v of some keys."""
    q, grad = _two(q_ptr, grad_ptr, window_head, i, n, d, d_v, D, D_V)
    k, v = _two(k_ptr, v_ptr, window_head, j, m, d, d_v, D, D_V)
    return q, grad, k, v


@triton.jit
def _delta(y_ptr, grad, window_head, i, n, d_v, D_V: tl.constexpr):
    """Return the products of the outputs and their gradients."""
    y = _tile(y_ptr + window_head * n * d_v, i, tl.arange(0, D_V), d_v, n, d_v)
    return tl.sum(grad.to(tl.float32) * y.to(tl.float32), 1)


@triton.jit
def _scores(q, k, bias, j, m, scale, PRECISION: tl.constexpr):
    """Return a tile of the scores; minus infinity beyond the keys."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    return tl.where(j[None, :] < m, scores, float("-inf"))


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, bias_ptr, y_ptr, lse_ptr, scale, heads, n, m, d, d_v,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    window_head = tl.program_id(0).to(tl.int64)
    i, c, c_v = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, D), tl.arange(0, D_V)
    q = _tile(q_ptr + window_head * n * d, i, c, d, n, d)
    bias = bias_ptr + (window_head % heads) * n * m
    top = tl.full((N,), float("-inf"), tl.float32)
    total = tl.zeros((N,), tl.float32)
    y = tl.zeros((N, D_V), tl.float32)
    for start in range(0, m, M):
        j = start + tl.arange(0, M)
        k, v = _two(k_ptr, v_ptr, window_head, j, m, d, d_v, D, D_V)
        scores = _scores(q, k, _tile(bias, i, j, m, n, m).to(tl.float32), j, m, scale, PRECISION)
        top, total, y = absorb(top, total, y, scores, v, PRECISION)
    _put(y_ptr + window_head * n * d_v, y / total[:, None], i, c_v, n, d_v)
    tl.store(lse_ptr + window_head * n + i, top + tl.log(total), i < n)


@triton.jit
def _weights_and_slopes(
    q, k, v, grad, bias, lse, delta, i, j, n, m, scale, PRECISION: tl.constexpr
):  # fmt: skip
    """Return a tile of the weights and of the gradients of the scores, zeros beyond them."""
    scores = _scores(q, k, bias, j, m, scale, PRECISION)
    weights = tl.where(i[:, None] < n, tl.exp(scores - lse[:, None]), 0.0)
    return weights, slopes_of(weights, v, grad, delta, PRECISION)


@triton.jit
def _gradients_of_windows(
    q_ptr, k_ptr, v_ptr, bias_ptr, y_ptr, lse_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr, part_ptr, scale,
    windows, splits, heads, n, m, d, d_v,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of windows that are one tile each."""
    head, split = tl.program_id(0) % heads, tl.program_id(0) // heads
    i, j, c, c_v = tl.arange(0, N), tl.arange(0, M), tl.arange(0, D), tl.arange(0, D_V)
    bias = _tile(bias_ptr + head * n * m, i, j, m, n, m).to(tl.float32)
    total = tl.zeros((N, M), tl.float32)
    for window in range(split, windows, splits):
        window_head = (window * heads + head).to(tl.int64)
        q, grad, k, v = _window(q_ptr, k_ptr, v_ptr, grad_ptr, window_head, i, j, n, m, d, d_v, D, D_V)
        delta = _delta(y_ptr, grad, window_head, i, n, d_v, D_V)
        lse = tl.load(lse_ptr + window_head * n + i, i < n, 0.0)
        weights, slopes = _weights_and_slopes(q, k, v, grad, bias, lse, delta, i, j, n, m, scale, PRECISION)
        total += slopes
        slopes = slopes.to(q.dtype)
        dq = tl.dot(slopes, k, input_precision=PRECISION) * scale
        dk = tl.dot(tl.trans(slopes), q, input_precision=PRECISION) * scale
        dv = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision=PRECISION)
        _put(dq_ptr + window_head * n * d, dq, i, c, n, d)
        _put(dk_ptr + window_head * m * d, dk, j, c, m, d)
        _put(dv_ptr + window_head * m * d_v, dv, j, c_v, m, d_v)
    _put(part_ptr + (split * heads + head).to(tl.int64) * n * m, total, i, j, n, m)


@triton.jit
def _gradient_of_queries(
    q_ptr, k_ptr, v_ptr, bias_ptr, y_ptr, lse_ptr, grad_ptr, delta_ptr, dq_ptr, scale, heads, n, m, d, d_v,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    window_head = tl.program_id(0).to(tl.int64)
    i, c = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, D)
    q, grad = _two(q_ptr, grad_ptr, window_head, i, n, d, d_v, D, D_V)
    delta = _delta(y_ptr, grad, window_head, i, n, d_v, D_V)
    tl.store(delta_ptr + window_head * n + i, delta, i < n)
    lse = tl.load(lse_ptr + window_head * n + i, i < n, 0.0)
    bias_at = (window_head % heads) * n * m
    dq = tl.zeros((N, D), tl.float32)
    for start in range(0, m, M):
        j = start + tl.arange(0, M)
        k, v = _two(k_ptr, v_ptr, window_head, j, m, d, d_v, D, D_V)
        bias = _tile(bias_ptr + bias_at, i, j, m, n, m).to(tl.float32)
        _, slopes = _weights_and_slopes(q, k, v, grad, bias, lse, delta, i, j, n, m, scale, PRECISION)
        dq += tl.dot(slopes.to(k.dtype), k, input_precision=PRECISION)
    _put(dq_ptr + window_head * n * d, dq * scale, i, c, n, d)


@triton.jit
def _gradients_of_keys(
    q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, grad_ptr, delta_ptr, dk_ptr, dv_ptr, scale, heads, n, m, d, d_v,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    window_head = tl.program_id(0).to(tl.int64)
    j, c, c_v = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, D), tl.arange(0, D_V)
    k, v = _two(k_ptr, v_ptr, window_head, j, m, d, d_v, D, D_V)
    bias_at = (window_head % heads) * n * m
    dk, dv = tl.zeros((M, D), tl.float32), tl.zeros((M, D_V), tl.float32)
    for start in range(0, n, N):
        i = start + tl.arange(0, N)
        q, grad = _two(q_ptr, grad_ptr, window_head, i, n, d, d_v, D, D_V)
        lse = tl.load(lse_ptr + window_head * n + i, i < n, 0.0)
        delta = tl.load(delta_ptr + window_head * n + i, i < n, 0.0)
        bias = _tile(bias_ptr + bias_at, i, j, m, n, m).to(tl.float32)
        weights, slopes = _weights_and_slopes(q, k, v, grad, bias, lse, delta, i, j, n, m, scale, PRECISION)
        dk += tl.dot(tl.trans(slopes.to(q.dtype)), q, input_precision=PRECISION)
        dv += tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision=PRECISION)
    _put(dk_ptr + window_head * m * d, dk * scale, j, c, m, d)
    _put(dv_ptr + window_head * m * d_v, dv, j, c_v, m, d_v)


@triton.jit
def _gradient_of_bias(
    q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, grad_ptr, delta_ptr, part_ptr, scale, windows, splits, heads, n, m, d, d_v,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0) % heads, tl.program_id(0) // heads
    i, j = tl.program_id(1) * N + tl.arange(0, N), tl.program_id(2) * M + tl.arange(0, M)
    bias = _tile(bias_ptr + head * n * m, i, j, m, n, m).to(tl.float32)
    total = tl.zeros((N, M), tl.float32)
    for window in range(split, windows, splits):
        window_head = (window * heads + head).to(tl.int64)
        q, grad, k, v = _window(q_ptr, k_ptr, v_ptr, grad_ptr, window_head, i, j, n, m, d, d_v, D, D_V)
        lse = tl.load(lse_ptr + window_head * n + i, i < n, 0.0)
        delta = tl.load(delta_ptr + window_head * n + i, i < n, 0.0)
        _, slopes = _weights_and_slopes(q, k, v, grad, bias, lse, delta, i, j, n, m, scale, PRECISION)
        total += slopes
    _put(part_ptr + (split * heads + head).to(tl.int64) * n * m, total, i, j, n, m)


def window_attention(q_bhnd: Tensor, k_bhmd: Tensor, v_bhmd: Tensor, bias_1hnm: Tensor, scale: float) -> Tensor:
    """Return softmax(scale q k^T + bias) v, (B, h, N, d_v), in the dtype of v; differentiable once.

    Args:
        q_bhnd: Queries, of 16 or 32 bits; k and v are of their dtype.
        k_bhmd: Keys.
        v_bhmd: Values, (B, h, M, d_v).
        bias_1hnm: The bias of all windows, (1, h, N, M), of any dtype.
        scale: What the products of queries and keys are multiplied by.
    """
    y_bhnd: Tensor = _operator(q_bhnd, k_bhmd, v_bhmd, bias_1hnm, scale)[0]
    return y_bhnd


@torch.library.custom_op("effbackbones::window_attention", mutates_args=())
def _operator(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v, bias = (x.contiguous() for x in (q, k, v, bias))
    y = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tiles, settings = _settings(q, k, v)
    _forward[q.shape[0] * q.shape[1], tiles[0]](q, k, v, bias, y, lse, scale, *_sizes(q, k, v), **settings)
    return y, lse


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("effbackbones::window_attention_backward", mutates_args=())
def _gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, y: Tensor, lse: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, bias, grad = (x.contiguous() for x in (q, k, v, bias, grad))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    (windows, heads), sizes = q.shape[:2], _sizes(q, k, v)
    (i_tiles, j_tiles), settings = _settings(q, k, v)
    splits = min(windows, triton.cdiv(PROGRAMS, heads * i_tiles * j_tiles))
    part = q.new_empty(splits, *bias.shape[1:], dtype=torch.float32)
    common = q, k, v, bias
    if i_tiles == j_tiles == 1:
        _gradients_of_windows[(heads * splits,)](
            *common, y, lse, grad, dq, dk, dv, part, scale, windows, splits, *sizes, **settings
        )
    else:
        delta = torch.empty_like(lse)
        _gradient_of_queries[windows * heads, i_tiles](*common, y, lse, grad, delta, dq, scale, *sizes, **settings)
        _gradients_of_keys[windows * heads, j_tiles](*common, lse, grad, delta, dk, dv, scale, *sizes, **settings)
        _gradient_of_bias[heads * splits, i_tiles, j_tiles](
            *common, lse, grad, delta, part, scale, windows, splits, *sizes, **settings
        )
    return dq, dk, dv, part.sum(0, keepdim=True).to(bias.dtype)


@_gradients.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, y: Tensor, lse: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, d_bias = (x.new_empty(x.shape) for x in (q, k, v, bias))
    return dq, dk, dv, d_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(*ctx.saved_tensors, grad, ctx.scale), None


_operator.register_autograd(_differentiate, setup_context=_save)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return q.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]


def _settings(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return how many tiles of queries and keys there are, and what the kernels are compiled for."""
    i, j = (min(64, max(16, triton.next_power_of_2(x.shape[2]))) for x in (q, k))
    d, d_v = (max(16, triton.next_power_of_2(x.shape[3])) for x in (q, v))
    precision, warps = ("tf32x3", 8) if q.dtype == torch.float32 else ("tf32", 4)
    tiles = triton.cdiv(q.shape[2], i), triton.cdiv(k.shape[2], j)
    return tiles, {"N": i, "M": j, "D": d, "D_V": d_v, "PRECISION": precision, "num_warps": warps}


def trial(device: torch.device) -> None:
    """Make a small call and its gradients."""
    q, k, v, bias = (
        torch.ones(*shape, device=device, requires_grad=True) for shape in ((2, 1, 9, 8),) * 3 + ((1, 1, 9, 9),)
    )
    window_attention(q, k, v, bias, 1.0).sum().backward()
