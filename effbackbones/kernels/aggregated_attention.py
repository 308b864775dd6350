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

SPLITS = 32
"""Parts, at most, that the tokens are summed in for the gradients of the pooled map."""


@triton.jit
def _tile(base, channels, columns, length, n_channels):
    """Load (columns, channels) of a matrix whose columns lie side by side; zeros beyond it."""
    inside = (columns[:, None] < length) & (channels[None, :] < n_channels)
    return tl.load(base + channels[None, :] * length + columns[:, None], inside, 0.0)


@triton.jit
def _put(base, values, channels, columns, length, n_channels):
    inside = (columns[:, None] < length) & (channels[None, :] < n_channels)
    tl.store(base + channels[None, :] * length + columns[:, None], values, inside)


@triton.jit
def _cell(base, channels, columns, inside, length, n_channels):
    """Load (columns, channels) of a map where the cells are inside; zeros elsewhere."""
    inside = inside[:, None] & (channels[None, :] < n_channels)
    return tl.load(base + channels[None, :] * length + columns[:, None], inside, 0.0)


@triton.jit
def _neighbour(x, dy, dx, n, height, width):
    """Return the cells that many rows and columns from the tokens, and whether they are inside the map."""
    row, col = x // width + dy, x % width + dx
    return x + dy * width + dx, (x < n) & (row >= 0) & (row < height) & (col >= 0) & (col < width)


@triton.jit
def _beside(unit, tokens_ptr, token_bias_ptr, head, o, c, d):
    """Return the weights of the cells o outside the softmax."""
    token = tl.load(tokens_ptr + (head * d + c) * 9 + o, c < d, 0.0)
    return tl.sum(unit * token[None, :], 1) + tl.load(token_bias_ptr + head * 9 + o)


@triton.jit
def _pool_bias(base, x, z, p, n, width, p_width, s_row, s_col, s_y, s_x):
    """Load the bias (tokens, pooled tokens) from a tensor of any strides."""
    at_x, at_z = (x // width) * s_y + (x % width) * s_x, (z // p_width) * s_row + (z % p_width) * s_col
    return tl.load(base + at_x[:, None] + at_z[None, :], (x[:, None] < n) & (z[None, :] < p), 0.0)


@triton.jit
def _forward(
    q_ptr, unit_ptr, k_ptr, v_ptr, k_pool_ptr, v_pool_ptr, bias_ptr, tokens_ptr, token_bias_ptr, pool_bias_ptr,
    y_ptr, lse_ptr, heads, d, n, p, height, width, p_width, s_head, s_row, s_col, s_y, s_x,
    X: tl.constexpr, Z: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image_head = tl.program_id(0).to(tl.int64)
    head = image_head % heads
    x, c = tl.program_id(1) * X + tl.arange(0, X), tl.arange(0, D)
    map_at, pool_at = image_head * d * n, image_head * d * p
    q, unit = _tile(q_ptr + map_at, c, x, n, d), _tile(unit_ptr + map_at, c, x, n, d)
    top = tl.full((X,), -1e30, tl.float32)
    total = tl.zeros((X,), tl.float32)
    y, outside_softmax = tl.zeros((X, D), tl.float32), tl.zeros((X, D), tl.float32)
    for o in tl.static_range(9):
        cell, inside = _neighbour(x, o // 3 - 1, o % 3 - 1, n, height, width)
        k, v = _cell(k_ptr + map_at, c, cell, inside, n, d), _cell(v_ptr + map_at, c, cell, inside, n, d)
        logits = tl.where(inside, tl.sum(q * k, 1) + tl.load(bias_ptr + head * 9 + o), float("-inf"))
        more = _beside(unit, tokens_ptr, token_bias_ptr, head, o, c, d)
        outside_softmax += more[:, None] * v
        higher = tl.maximum(top, logits)
        shrink, weights = tl.exp(top - higher), tl.exp(logits - higher)
        total = total * shrink + weights
        y = y * shrink[:, None] + weights[:, None] * v
        top = higher
    for start in range(0, p, Z):
        z = start + tl.arange(0, Z)
        k, v = _tile(k_pool_ptr + pool_at, c, z, p, d), _tile(v_pool_ptr + pool_at, c, z, p, d)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits += _pool_bias(pool_bias_ptr + head * s_head, x, z, p, n, width, p_width, s_row, s_col, s_y, s_x)
        logits = tl.where(z[None, :] < p, logits, float("-inf"))
        top, total, y = absorb(top, total, y, logits, v, PRECISION)
    _put(y_ptr + map_at, y / total[:, None] + outside_softmax, c, x, n, d)
    tl.store(lse_ptr + image_head * n + x, top + tl.log(total), x < n)


@triton.jit
def _pool_slopes(
    q, grad, k, v, lse, delta, pool_bias_ptr, x, z, p, n, width, p_width, s_row, s_col, s_y, s_x,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a tile of the weights of pooled tokens and of the gradients of their logits, zeros beyond them."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    logits += _pool_bias(pool_bias_ptr, x, z, p, n, width, p_width, s_row, s_col, s_y, s_x)
    weights = tl.where((x[:, None] < n) & (z[None, :] < p), tl.exp(logits - lse[:, None]), 0.0)
    return weights, slopes_of(weights, v, grad, delta, PRECISION)


@triton.jit
def _gradients_of_tokens(
    q_ptr, unit_ptr, k_ptr, v_ptr, k_pool_ptr, v_pool_ptr, bias_ptr, tokens_ptr, token_bias_ptr, pool_bias_ptr,
    y_ptr, lse_ptr, grad_ptr, delta_ptr, dq_ptr, d_unit_ptr, d_bias_ptr, d_tokens_ptr, d_token_bias_ptr,
    heads, d, n, p, height, width, p_width, s_head, s_row, s_col, s_y, s_x,
    X: tl.constexpr, Z: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image_head = tl.program_id(0).to(tl.int64)
    head = image_head % heads
    x, c = tl.program_id(1) * X + tl.arange(0, X), tl.arange(0, D)
    map_at, pool_at = image_head * d * n, image_head * d * p
    q, unit = _tile(q_ptr + map_at, c, x, n, d), _tile(unit_ptr + map_at, c, x, n, d)
    grad, lse = _tile(grad_ptr + map_at, c, x, n, d), tl.load(lse_ptr + image_head * n + x, x < n, 0.0)
    delta = tl.sum(grad * _tile(y_ptr + map_at, c, x, n, d), 1)
    for o in tl.static_range(9):  # what was added outside the softmax is no part of delta
        cell, inside = _neighbour(x, o // 3 - 1, o % 3 - 1, n, height, width)
        v = _cell(v_ptr + map_at, c, cell, inside, n, d)
        more = _beside(unit, tokens_ptr, token_bias_ptr, head, o, c, d)
        delta -= more * tl.sum(grad * v, 1)
    tl.store(delta_ptr + image_head * n + x, delta, x < n)
    dq, d_unit = tl.zeros((X, D), tl.float32), tl.zeros((X, D), tl.float32)
    part = tl.program_id(1) * tl.num_programs(0) + image_head
    for o in tl.static_range(9):
        cell, inside = _neighbour(x, o // 3 - 1, o % 3 - 1, n, height, width)
        k, v = _cell(k_ptr + map_at, c, cell, inside, n, d), _cell(v_ptr + map_at, c, cell, inside, n, d)
        logits = tl.sum(q * k, 1) + tl.load(bias_ptr + head * 9 + o)
        weights = tl.where(inside, tl.exp(logits - lse), 0.0)
        d_weights = tl.sum(grad * v, 1)
        slopes = weights * (d_weights - delta)
        dq += slopes[:, None] * k
        token = tl.load(tokens_ptr + (head * d + c) * 9 + o, c < d, 0.0)
        d_unit += d_weights[:, None] * token[None, :]
        tl.store(d_bias_ptr + part * 9 + o, tl.sum(slopes, 0))
        tl.store(d_token_bias_ptr + part * 9 + o, tl.sum(d_weights, 0))
        tl.store(d_tokens_ptr + (part * d + c) * 9 + o, tl.sum(unit * d_weights[:, None], 0), c < d)
    for start in range(0, p, Z):
        z = start + tl.arange(0, Z)
        k, v = _tile(k_pool_ptr + pool_at, c, z, p, d), _tile(v_pool_ptr + pool_at, c, z, p, d)
        _, slopes = _pool_slopes(
            q, grad, k, v, lse, delta, pool_bias_ptr + head * s_head, x, z, p, n, width, p_width, s_row, s_col, s_y,
            s_x, PRECISION,
        )  # fmt: skip
        dq += tl.dot(slopes, k, input_precision=PRECISION)
    _put(dq_ptr + map_at, dq, c, x, n, d)
    _put(d_unit_ptr + map_at, d_unit, c, x, n, d)


@triton.jit
def _gradients_of_cells(
    q_ptr, unit_ptr, k_ptr, v_ptr, bias_ptr, tokens_ptr, token_bias_ptr, lse_ptr, grad_ptr, delta_ptr, dk_ptr, dv_ptr,
    heads, d, n, height, width, X: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    image_head = tl.program_id(0).to(tl.int64)
    head, map_at = image_head % heads, image_head * d * n
    x, c = tl.program_id(1) * X + tl.arange(0, X), tl.arange(0, D)
    k, v = _tile(k_ptr + map_at, c, x, n, d), _tile(v_ptr + map_at, c, x, n, d)
    dk, dv = tl.zeros((X, D), tl.float32), tl.zeros((X, D), tl.float32)
    for o in tl.static_range(9):  # the token that has the cell at place o of its window
        at, inside = _neighbour(x, 1 - o // 3, 1 - o % 3, n, height, width)
        q, unit = _cell(q_ptr + map_at, c, at, inside, n, d), _cell(unit_ptr + map_at, c, at, inside, n, d)
        grad = _cell(grad_ptr + map_at, c, at, inside, n, d)
        lse = tl.load(lse_ptr + image_head * n + at, inside, 0.0)
        delta = tl.load(delta_ptr + image_head * n + at, inside, 0.0)
        weights = tl.where(inside, tl.exp(tl.sum(q * k, 1) + tl.load(bias_ptr + head * 9 + o) - lse), 0.0)
        dk += (weights * (tl.sum(grad * v, 1) - delta))[:, None] * q
        more = _beside(unit, tokens_ptr, token_bias_ptr, head, o, c, d)
        dv += (weights + more)[:, None] * grad
    _put(dk_ptr + map_at, dk, c, x, n, d)
    _put(dv_ptr + map_at, dv, c, x, n, d)


@triton.jit
def _queries(q_ptr, grad_ptr, lse_ptr, delta_ptr, image_head, c, x, n, d):
    """Load what the gradients of pooled tokens need of a tile of tokens."""
    q, grad = _tile(q_ptr + image_head * d * n, c, x, n, d), _tile(grad_ptr + image_head * d * n, c, x, n, d)
    lse = tl.load(lse_ptr + image_head * n + x, x < n, 0.0)
    return q, grad, lse, tl.load(delta_ptr + image_head * n + x, x < n, 0.0)


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
        weights, slopes = _pool_slopes(
            q, grad, k, v, lse, delta, pool_bias_ptr + (image_head % heads) * s_head, x, z, p, n, width, p_width,
            s_row, s_col, s_y, s_x, PRECISION,
        )  # fmt: skip
        dk += tl.dot(tl.trans(slopes), q, input_precision=PRECISION)
        dv += tl.dot(tl.trans(weights), grad, input_precision=PRECISION)
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
    total = tl.zeros((X, Z), tl.float32)
    for image in range(images):
        image_head = image * heads + head
        pool_at = image_head * d * p
        q, grad, lse, delta = _queries(q_ptr, grad_ptr, lse_ptr, delta_ptr, image_head, c, x, n, d)
        k, v = _tile(k_pool_ptr + pool_at, c, z, p, d), _tile(v_pool_ptr + pool_at, c, z, p, d)
        _, slopes = _pool_slopes(
            q, grad, k, v, lse, delta, pool_bias_ptr + head * s_head, x, z, p, n, width, p_width, s_row, s_col, s_y,
            s_x, PRECISION,
        )  # fmt: skip
        total += slopes
    _put(d_bias_ptr + head * p * n, total, z, x, n, p)


def aggregated_attention(grid: tuple[int, int], *inputs: Tensor, exact: bool) -> Tensor:
    """Return what `effbackbones.ops.aggregated_attention` returns of its inputs in float32; differentiable once.

    exact: products with pooled tokens in float32; else by tensor cores, with the fraction of float16 (TF32).
    """
    y_bhdn: Tensor = _operator(*inputs, *grid, exact)[0]
    return y_bhdn


@torch.library.custom_op("effbackbones::aggregated_attention", mutates_args=())
def _operator(
    q: Tensor, q_unit: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, bias: Tensor, tokens: Tensor,
    token_bias: Tensor, pool_bias: Tensor, height: int, width: int, exact: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = _laid_out(q, q_unit, k, v, k_pool, v_pool, bias, tokens, token_bias, pool_bias)
    y, lse = torch.empty_like(inputs[0]), q.new_empty(*q.shape[:2], q.shape[3])
    settings = _settings(q, k_pool, exact)
    grid = q.shape[0] * q.shape[1], triton.cdiv(q.shape[3], settings["X"])
    p = k_pool.shape[3]
    _forward[grid](*inputs, y, lse, *_sizes(q), p, height, width, pool_bias.shape[2], *pool_bias.stride(), **settings)
    return y, lse


@_operator.register_fake
def _(
    q: Tensor, q_unit: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, bias: Tensor, tokens: Tensor,
    token_bias: Tensor, pool_bias: Tensor, height: int, width: int, exact: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(*q.shape[:2], q.shape[3])


@torch.library.custom_op("effbackbones::aggregated_attention_backward", mutates_args=())
def _gradients(
    q: Tensor, q_unit: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, bias: Tensor, tokens: Tensor,
    token_bias: Tensor, pool_bias: Tensor, y: Tensor, lse: Tensor, grad: Tensor, height: int, width: int, exact: bool,
) -> list[Tensor]:  # fmt: skip
    inputs = _laid_out(q, q_unit, k, v, k_pool, v_pool, bias, tokens, token_bias, pool_bias)
    q, q_unit, k, v, k_pool, v_pool, bias, tokens, token_bias, pool_bias = inputs
    grad = grad.contiguous()
    settings, p = _settings(q, k_pool, exact), k_pool.shape[3]
    (image_heads, heads), sizes = (q.shape[0] * q.shape[1], q.shape[1]), _sizes(q)
    x_tiles, z_tiles = triton.cdiv(q.shape[3], settings["X"]), triton.cdiv(p, settings["Z"])
    pooled = p, width, pool_bias.shape[2], *pool_bias.stride()
    dq, d_unit, dk, dv, delta = (torch.empty_like(x) for x in (q, q_unit, k, v, lse))
    d_bias, d_tokens, d_token_bias = (x.new_empty(x_tiles, q.shape[0], *x.shape) for x in (bias, tokens, token_bias))
    _gradients_of_tokens[image_heads, x_tiles](
        *inputs, y, lse, grad, delta, dq, d_unit, d_bias, d_tokens, d_token_bias, *sizes, p, height, *pooled[1:],
        **settings,
    )  # fmt: skip
    _gradients_of_cells[image_heads, x_tiles](
        *inputs[:4], bias, tokens, token_bias, lse, grad, delta, dk, dv, *sizes, height, width,
        X=settings["X"], D=settings["D"], num_warps=settings["num_warps"],
    )  # fmt: skip
    splits = min(SPLITS, x_tiles)
    dk_pool, dv_pool = (x.new_empty(splits, *x.shape) for x in (k_pool, v_pool))
    common = q, k_pool, v_pool, pool_bias, lse, grad, delta
    _gradients_of_pool[image_heads, z_tiles, splits](*common, dk_pool, dv_pool, splits, *sizes, *pooled, **settings)
    d_pool_bias = pool_bias.new_empty(pool_bias.shape)
    _gradient_of_pool_bias[heads, x_tiles, z_tiles](*common, d_pool_bias, q.shape[0], *sizes, *pooled, **settings)
    weights = (x.sum((0, 1)) for x in (d_bias, d_tokens, d_token_bias))
    return [dq, d_unit, dk, dv, dk_pool.sum(0), dv_pool.sum(0), *weights, d_pool_bias]


@_gradients.register_fake
def _(
    q: Tensor, q_unit: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, bias: Tensor, tokens: Tensor,
    token_bias: Tensor, pool_bias: Tensor, y: Tensor, lse: Tensor, grad: Tensor, height: int, width: int, exact: bool,
) -> list[Tensor]:  # fmt: skip
    inputs = (q, q_unit, k, v, k_pool, v_pool, bias, tokens, token_bias, pool_bias)
    return [x.new_empty(x.shape) for x in inputs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, height, width, exact = inputs
    ctx.settings = height, width, exact
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(*ctx.saved_tensors, grad, *ctx.settings), None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)


def _laid_out(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the inputs as the kernels read them: all but the bias of the pooled tokens, the last, contiguous."""
    return *(x.contiguous() for x in inputs[:-1]), inputs[-1]


def _sizes(q: Tensor) -> tuple[int, int, int]:
    return q.shape[1], q.shape[2], q.shape[3]


def _settings(q: Tensor, k_pool: Tensor, exact: bool) -> dict[str, Any]:
    """Return what the kernels are compiled for."""
    d, z = (max(16, triton.next_power_of_2(size)) for size in (q.shape[2], k_pool.shape[3]))
    return {"X": 64, "Z": min(64, z), "D": d, "PRECISION": "ieee" if exact else "tf32", "num_warps": 4}


def trial(device: torch.device) -> None:
    """Make a small call and its gradients."""
    shapes = ((1, 1, 8, 4),) * 4 + ((1, 1, 8, 1),) * 2 + ((1, 9), (1, 8, 9), (1, 9), (1, 1, 1, 2, 2))
    inputs = [torch.ones(shape, device=device, requires_grad=True) for shape in shapes]
    aggregated_attention((2, 2), *inputs, exact=True).sum().backward()
