"""The kernels of `effbackbones.ops.aggregated_attention`, which states what is computed.

No logit outlives its tile: the forward pass keeps the logarithm of each token's sum, from which the backward pass gets
the weights back. What a cell of the map gets is gathered from the nine tokens whose windows it is in, so that nothing
is added up by atomics, and gradients are the same in every run.

Legend: b batch, h heads, d channels of a head, n tokens, p pooled tokens, o cells of a window; x and z tiles of tokens
and of pooled tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbackbones.kernels.softmax import absorb, slopes_of

PROGRAMS = 1024
"""Programs, about, that the gradients of the pooled map are computed by: its tokens are summed in parts for that."""


@triton.jit
def _cell(base, channels, columns, inside, length, n_channels):
    """Load (columns, channels) of a map where the cells are inside, in float32; zeros elsewhere."""
    inside = inside[:, None] & (channels[None, :] < n_channels)
    return tl.load(base + channels[None, :] * length + columns[:, None], inside, 0.0).to(tl.float32)


@triton.jit
def _tile(base, channels, columns, length, n_channels):
    """Load (columns, channels) of a matrix whose columns lie side by side, in float32; zeros beyond it."""
    return _cell(base, channels, columns, columns < length, length, n_channels)


@triton.jit
def _put(base, values, channels, columns, length, n_channels):
    inside = (columns[:, None] < length) & (channels[None, :] < n_channels)
    tl.store(base + channels[None, :] * length + columns[:, None], values, inside)


@triton.jit
def _neighbour(x, dy, dx, n, height, width):
    """Return the cells that many rows and columns from the tokens, and whether they are inside the map."""
    row, col = x // width + dy, x % width + dx
    return x + dy * width + dx, (x < n) & (row >= 0) & (row < height) & (col >= 0) & (col < width)


@triton.jit
def _pool_bias(base, x, z, p, n, width, p_width, s_row, s_col, s_y, s_x):
    """Load the bias (tokens, pooled tokens) from a tensor of any strides; the tokens are those side by side."""
    at_x, at_z = (x // width) * s_y + (x % width) * s_x, (z // p_width).to(tl.int64) * s_row + (z % p_width) * s_col
    bias = tl.load(base + at_z[:, None] + at_x[None, :], (z[:, None] < p) & (x[None, :] < n), 0.0)
    return tl.trans(bias.to(tl.float32))


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, k_pool_ptr, v_pool_ptr, bias_ptr, more_ptr, pool_bias_ptr, y_ptr, y_softmax_ptr, lse_ptr,
    v_image, heads, d, n, p, height, width, p_width, s_head, s_row, s_col, s_y, s_x,
    X: tl.constexpr, Z: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image_head = tl.program_id(0).to(tl.int64)
    head = image_head % heads
    x, c = tl.program_id(1) * X + tl.arange(0, X), tl.arange(0, D)
    map_at, pool_at = image_head * d * n, image_head * d * p
    v_at = image_head // heads * v_image + head * d * n
    q = _tile(q_ptr + map_at, c, x, n, d)
    top = tl.full((X,), -1e30, tl.float32)
    total, y = tl.zeros((X,), tl.float32), tl.zeros((X, D), tl.float32)
    for start in range(0, p, Z):
        z = start + tl.arange(0, Z)
        k_pool, v_pool = _tile(k_pool_ptr + pool_at, c, z, p, d), _tile(v_pool_ptr + pool_at, c, z, p, d)
        logits_xz = tl.dot(q, tl.trans(k_pool), input_precision=PRECISION)
        logits_xz += _pool_bias(pool_bias_ptr + head * s_head, x, z, p, n, width, p_width, s_row, s_col, s_y, s_x)
        logits_xz = tl.where(z[None, :] < p, logits_xz, float("-inf"))
        top, total, y = absorb(top, total, y, logits_xz, v_pool, PRECISION)
    outside_softmax = tl.zeros((X, D), tl.float32)
    for o in range(9):
        cell, inside = _neighbour(x, o // 3 - 1, o % 3 - 1, n, height, width)
        k, v = _cell(k_ptr + map_at, c, cell, inside, n, d), _cell(v_ptr + v_at, c, cell, inside, n, d)
        logits = tl.where(inside, tl.sum(q * k, 1) + tl.load(bias_ptr + head * 9 + o), float("-inf"))
        more = tl.load(more_ptr + (image_head * 9 + o) * n + x, x < n, 0.0)
        outside_softmax += more[:, None] * v
        higher = tl.maximum(top, logits)
        shrink, weights = tl.exp(top - higher), tl.exp(logits - higher)
        total = total * shrink + weights
        y = y * shrink[:, None] + weights[:, None] * v
        top = higher
    y = y / total[:, None]
    _put(y_softmax_ptr + map_at, y, c, x, n, d)
    _put(y_ptr + map_at, y + outside_softmax, c, x, n, d)
    tl.store(lse_ptr + image_head * n + x, top + tl.log(total), x < n)


@triton.jit
def _gradient_of_more(
    v_ptr, y_softmax_ptr, grad_ptr, d_more_ptr, delta_ptr, v_image, heads, d, n, height, width,
    X: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of all weights of the window, and the product of the softmax's output and its gradient."""
    image_head = tl.program_id(0).to(tl.int64)
    x, c = tl.program_id(1) * X + tl.arange(0, X), tl.arange(0, D)
    map_at, v_at = image_head * d * n, image_head // heads * v_image + image_head % heads * d * n
    grad = _tile(grad_ptr + map_at, c, x, n, d)
    delta = tl.sum(grad * _tile(y_softmax_ptr + map_at, c, x, n, d), 1)
    tl.store(delta_ptr + image_head * n + x, delta, x < n)
    for o in range(9):
        cell, inside = _neighbour(x, o // 3 - 1, o % 3 - 1, n, height, width)
        d_more = tl.sum(grad * _cell(v_ptr + v_at, c, cell, inside, n, d), 1)
        tl.store(d_more_ptr + (image_head * 9 + o) * n + x, d_more, x < n)


@triton.jit
def _queries(q_ptr, grad_ptr, lse_ptr, delta_ptr, image_head, c, x, n, d):
    """Load what the gradients of pooled logits need of a tile of tokens."""
    q, grad = _tile(q_ptr + image_head * d * n, c, x, n, d), _tile(grad_ptr + image_head * d * n, c, x, n, d)
    lse = tl.load(lse_ptr + image_head * n + x, x < n, 0.0)
    return q, grad, lse, tl.load(delta_ptr + image_head * n + x, x < n, 0.0)


@triton.jit
def _pool_slopes(
    q, grad, k, v, lse, delta, pool_bias_ptr, x, z, p, n, width, p_width, s_row, s_col, s_y, s_x,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a tile of the weights of pooled tokens and of the gradients of their logits, zeros beyond them."""
    logits_xz = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    logits_xz += _pool_bias(pool_bias_ptr, x, z, p, n, width, p_width, s_row, s_col, s_y, s_x)
    weights_xz = tl.where((x[:, None] < n) & (z[None, :] < p), tl.exp(logits_xz - lse[:, None]), 0.0)
    return weights_xz, slopes_of(weights_xz, v, grad, delta, PRECISION)


@triton.jit
def _gradient_of_queries(
    q_ptr, k_ptr, k_pool_ptr, v_pool_ptr, bias_ptr, pool_bias_ptr, lse_ptr, grad_ptr, d_more_ptr, delta_ptr,
    dq_ptr, d_bias_ptr, heads, d, n, p, height, width, p_width, s_head, s_row, s_col, s_y, s_x,
    X: tl.constexpr, Z: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image_head = tl.program_id(0).to(tl.int64)
    head = image_head % heads
    x, c = tl.program_id(1) * X + tl.arange(0, X), tl.arange(0, D)
    map_at, pool_at = image_head * d * n, image_head * d * p
    q, grad, lse, delta = _queries(q_ptr, grad_ptr, lse_ptr, delta_ptr, image_head, c, x, n, d)
    dq = tl.zeros((X, D), tl.float32)
    for start in range(0, p, Z):
        z = start + tl.arange(0, Z)
        k_pool, v_pool = _tile(k_pool_ptr + pool_at, c, z, p, d), _tile(v_pool_ptr + pool_at, c, z, p, d)
        _, slopes_xz = _pool_slopes(
            q, grad, k_pool, v_pool, lse, delta, pool_bias_ptr + head * s_head, x, z, p, n, width, p_width, s_row,
            s_col, s_y, s_x, PRECISION,
        )  # fmt: skip
        dq += tl.dot(slopes_xz, k_pool, input_precision=PRECISION)
    part = tl.program_id(1) * tl.num_programs(0) + image_head
    for o in range(9):
        cell, inside = _neighbour(x, o // 3 - 1, o % 3 - 1, n, height, width)
        k = _cell(k_ptr + map_at, c, cell, inside, n, d)
        logits = tl.sum(q * k, 1) + tl.load(bias_ptr + head * 9 + o)
        weights = tl.where(inside, tl.exp(logits - lse), 0.0)
        slopes = weights * (tl.load(d_more_ptr + (image_head * 9 + o) * n + x, x < n, 0.0) - delta)
        dq += slopes[:, None] * k
        tl.store(d_bias_ptr + part * 9 + o, tl.sum(slopes, 0))
    _put(dq_ptr + map_at, dq, c, x, n, d)


@triton.jit
def _gradients_of_cells(
    q_ptr, k_ptr, bias_ptr, more_ptr, lse_ptr, grad_ptr, d_more_ptr, delta_ptr, dk_ptr, dv_ptr,
    heads, d, n, height, width, X: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    image_head = tl.program_id(0).to(tl.int64)
    head, map_at = image_head % heads, image_head * d * n
    x, c = tl.program_id(1) * X + tl.arange(0, X), tl.arange(0, D)
    k = _tile(k_ptr + map_at, c, x, n, d)
    dk, dv = tl.zeros((X, D), tl.float32), tl.zeros((X, D), tl.float32)
    for o in range(9):  # the token that has the cell at place o of its window
        token, inside = _neighbour(x, 1 - o // 3, 1 - o % 3, n, height, width)
        q, grad = _cell(q_ptr + map_at, c, token, inside, n, d), _cell(grad_ptr + map_at, c, token, inside, n, d)
        lse = tl.load(lse_ptr + image_head * n + token, inside, 0.0)
        delta = tl.load(delta_ptr + image_head * n + token, inside, 0.0)
        weights = tl.where(inside, tl.exp(tl.sum(q * k, 1) + tl.load(bias_ptr + head * 9 + o) - lse), 0.0)
        at = (image_head * 9 + o) * n + token
        dk += (weights * (tl.load(d_more_ptr + at, inside, 0.0) - delta))[:, None] * q
        dv += (weights + tl.load(more_ptr + at, inside, 0.0))[:, None] * grad
    _put(dk_ptr + map_at, dk, c, x, n, d)
    _put(dv_ptr + map_at, dv, c, x, n, d)


@triton.jit
def _gradients_of_pool(
    q_ptr, k_pool_ptr, v_pool_ptr, pool_bias_ptr, lse_ptr, grad_ptr, delta_ptr, dk_ptr, dv_ptr,
    splits, heads, d, n, p, width, p_width, s_head, s_row, s_col, s_y, s_x,
    X: tl.constexpr, Z: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image_head, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    pool_at = image_head * d * p
    z, c = tl.program_id(1) * Z + tl.arange(0, Z), tl.arange(0, D)
    k, v = _tile(k_pool_ptr + pool_at, c, z, p, d), _tile(v_pool_ptr + pool_at, c, z, p, d)
    dk, dv = tl.zeros((Z, D), tl.float32), tl.zeros((Z, D), tl.float32)
    for start in range(split * X, n, splits * X):
        x = start + tl.arange(0, X)
        q, grad, lse, delta = _queries(q_ptr, grad_ptr, lse_ptr, delta_ptr, image_head, c, x, n, d)
        weights_xz, slopes_xz = _pool_slopes(
            q, grad, k, v, lse, delta, pool_bias_ptr + (image_head % heads) * s_head, x, z, p, n, width, p_width,
            s_row, s_col, s_y, s_x, PRECISION,
        )  # fmt: skip
        dk += tl.dot(tl.trans(slopes_xz), q, input_precision=PRECISION)
        dv += tl.dot(tl.trans(weights_xz), grad, input_precision=PRECISION)
    part_at = split.to(tl.int64) * tl.num_programs(0) * d * p + pool_at
    _put(dk_ptr + part_at, dk, c, z, p, d)
    _put(dv_ptr + part_at, dv, c, z, p, d)


@triton.jit
def _gradient_of_pool_bias(
    q_ptr, k_pool_ptr, v_pool_ptr, pool_bias_ptr, lse_ptr, grad_ptr, delta_ptr, d_bias_ptr,
    images, heads, d, n, p, width, p_width, s_head, s_row, s_col, s_y, s_x,
    X: tl.constexpr, Z: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    x, z, c = (
        tl.program_id(1) * X + tl.arange(0, X),
        tl.program_id(2) * Z + tl.arange(0, Z),
        tl.arange(0, D),
    )
    total_xz = tl.zeros((X, Z), tl.float32)
    for image in range(images):
        image_head = image * heads + head
        pool_at = image_head * d * p
        q, grad, lse, delta = _queries(q_ptr, grad_ptr, lse_ptr, delta_ptr, image_head, c, x, n, d)
        k, v = _tile(k_pool_ptr + pool_at, c, z, p, d), _tile(v_pool_ptr + pool_at, c, z, p, d)
        _, slopes_xz = _pool_slopes(
            q, grad, k, v, lse, delta, pool_bias_ptr + head * s_head, x, z, p, n, width, p_width, s_row, s_col, s_y,
            s_x, PRECISION,
        )  # fmt: skip
        total_xz += slopes_xz
    _put(d_bias_ptr + head * p * n, total_xz, z.to(tl.int64), x, n, p)


def aggregated_attention(
    q_bhdn: Tensor, k_bhdn: Tensor, v_bhdn: Tensor, k_pool_bhdp: Tensor, v_pool_bhdp: Tensor, bias_ho: Tensor,
    more_bhon: Tensor, pool_bias: Tensor, grid: tuple[int, int], *, exact: bool,
) -> Tensor:  # fmt: skip
    """Return what `effbackbones.ops.aggregated_attention` returns, in the dtype of the values; differentiable once.

    Arguments are as there, of 16 or 32 bits, but for two:

    Args:
        more_bhon: Weights of the window's cells outside the softmax, (b, h, 9, n), in place of what they come from.
        exact: Whether products with pooled tokens are as precise as in float32; else by tensor cores, with the
            fraction of float16 (TF32).
    """
    inputs = q_bhdn, k_bhdn, v_bhdn, k_pool_bhdp, v_pool_bhdp, bias_ho, more_bhon, pool_bias
    y_bhdn: Tensor = _operator(*inputs, *grid, exact)[0]
    return y_bhdn


@torch.library.custom_op("effbackbones::aggregated_attention", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, bias: Tensor, more: Tensor, pool_bias: Tensor,
    height: int, width: int, exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, k_pool, v_pool, bias, more = (x.contiguous() for x in (q, k, k_pool, v_pool, bias, more))
    v = _by_images(v)
    y, y_softmax, lse = v.new_empty(v.shape), v.new_empty(v.shape), _sums(q)
    settings = _settings(q, k_pool, exact)
    grid = q.shape[0] * q.shape[1], triton.cdiv(q.shape[3], settings["X"])
    _forward[grid](
        q, k, v, k_pool, v_pool, bias, more, pool_bias, y, y_softmax, lse, v.stride(0), *q.shape[1:], k_pool.shape[3],
        height, width, pool_bias.shape[2], *pool_bias.stride(), **settings,
    )  # fmt: skip
    return y, y_softmax, lse


@_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, bias: Tensor, more: Tensor, pool_bias: Tensor,
    height: int, width: int, exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return v.new_empty(v.shape), v.new_empty(v.shape), _sums(q)


@torch.library.custom_op("effbackbones::aggregated_attention_backward", mutates_args=())
def _gradients(
    q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, bias: Tensor, more: Tensor, pool_bias: Tensor,
    y_softmax: Tensor, lse: Tensor, grad: Tensor, height: int, width: int, exact: bool,
) -> list[Tensor]:  # fmt: skip
    q, k, k_pool, v_pool, bias, more, grad = (x.contiguous() for x in (q, k, k_pool, v_pool, bias, more, grad))
    v = _by_images(v)
    settings, (images, heads, d, n), p = _settings(q, k_pool, exact), q.shape, k_pool.shape[3]
    of_tokens = {name: settings[name] for name in ("X", "D", "num_warps")}
    image_heads, x_tiles, z_tiles = images * heads, triton.cdiv(n, settings["X"]), triton.cdiv(p, settings["Z"])
    strides = width, pool_bias.shape[2], *pool_bias.stride()

    d_more, delta = torch.empty_like(more), torch.empty_like(lse)
    _gradient_of_more[image_heads, x_tiles](
        v, y_softmax, grad, d_more, delta, v.stride(0), heads, d, n, height, width, **of_tokens
    )
    dq, d_bias = torch.empty_like(q), lse.new_empty(x_tiles, images, *bias.shape)
    _gradient_of_queries[image_heads, x_tiles](
        q, k, k_pool, v_pool, bias, pool_bias, lse, grad, d_more, delta, dq, d_bias, heads, d, n, p, height, *strides,
        **settings,
    )  # fmt: skip
    dk, dv = torch.empty_like(k), v.new_empty(v.shape)
    _gradients_of_cells[image_heads, x_tiles](
        q, k, bias, more, lse, grad, d_more, delta, dk, dv, heads, d, n, height, width, **of_tokens
    )
    splits = min(x_tiles, triton.cdiv(PROGRAMS, image_heads * z_tiles))
    dk_pool, dv_pool = (lse.new_empty(splits, *x.shape) for x in (k_pool, v_pool))
    common = q, k_pool, v_pool, pool_bias, lse, grad, delta
    _gradients_of_pool[image_heads, z_tiles, splits](
        *common, dk_pool, dv_pool, splits, heads, d, n, p, *strides, **settings
    )
    d_pool_bias = pool_bias.new_empty(pool_bias.shape)
    _gradient_of_pool_bias[heads, x_tiles, z_tiles](*common, d_pool_bias, images, heads, d, n, p, *strides, **settings)
    of_pool = (parts.sum(0).to(x.dtype) for parts, x in ((dk_pool, k_pool), (dv_pool, v_pool)))
    return [dq, dk, dv, *of_pool, d_bias.sum((0, 1)).to(bias.dtype), d_more, d_pool_bias]


@_gradients.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, bias: Tensor, more: Tensor, pool_bias: Tensor,
    y_softmax: Tensor, lse: Tensor, grad: Tensor, height: int, width: int, exact: bool,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(x.shape) for x in (q, k, v, k_pool, v_pool, bias, more, pool_bias)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, height, width, exact = inputs
    ctx.settings = height, width, exact
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(*ctx.saved_tensors, grad, *ctx.settings), None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)


def _by_images(v_bhdn: Tensor) -> Tensor:
    """Return the values as the kernels read them: an image's contiguous, whatever lies between images."""
    return v_bhdn if v_bhdn[:1].is_contiguous() else v_bhdn.contiguous()


def _sums(q_bhdn: Tensor) -> Tensor:
    return q_bhdn.new_empty(*q_bhdn.shape[:2], q_bhdn.shape[3], dtype=torch.float32)


def _settings(q: Tensor, k_pool: Tensor, exact: bool) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    d, z = (max(16, triton.next_power_of_2(size)) for size in (q.shape[2], k_pool.shape[3]))
    return {"X": 64, "Z": min(64, z), "D": d, "PRECISION": "tf32x3" if exact else "tf32", "num_warps": 4}


def trial(device: torch.device) -> None:
    """Make a small call and its gradients."""

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=device, requires_grad=True)

    x, pooled, more = ones(1, 1, 8, 4), ones(1, 1, 8, 1), ones(1, 1, 9, 4)
    y = aggregated_attention(x, x, x, pooled, pooled, ones(1, 9), more, ones(1, 1, 1, 2, 2), (2, 2), exact=True)
    y.sum().backward()
