"""Aggregated attention: each token attends to the 3 x 3 window around it and to a pooled map, in one softmax.

Paper: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132, section 3.

Layouts in names and shapes: b batch, h heads, d channels of a head, H and W rows and columns of the map, n = H W tokens
in raster order (those of a stripe of rows in the fast path), pH and pW rows and columns of the pooled map, p = pH pW
pooled tokens, o = 0..8 the cells of the window, row by row.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effbackbones.layers.cached import constant
from effbackbones.layers.reference import use_kernels, use_reference

Pair = tuple[int, int]


class ResizedBias(NamedTuple):
    """A bias of pooled tokens, `rows table cols^T` in every head, that need not exist as a whole.

    It is linear in its table, which may have a gradient; rows and cols are constants.

    Attributes:
        table: (h, Y, X).
        rows: (pH, H, Y).
        cols: (pW, W, X).
    """

    table: Tensor
    rows: Tensor
    cols: Tensor

    def laid_out(self, first: int = 0, end: int | None = None) -> Tensor:
        """Return the bias (h, pH, pW, H, W), or from one row of the map to another."""
        rows = self.rows[:, first:end]
        bias = rows.flatten(0, 1) @ self.table @ self.cols.flatten(0, 1).T
        return bias.unflatten(2, self.cols.shape[:2]).unflatten(1, rows.shape[:2]).transpose(2, 3)

    def gradient(self, grad: Tensor, first: int, end: int) -> Tensor:
        """Return the gradient of the table from that of `laid_out`, given as (h, p, H, W)."""
        rows, grad = self.rows[:, first:end], grad.unflatten(1, (self.rows.shape[0], -1)).transpose(2, 3)
        return rows.flatten(0, 1).T @ (grad.flatten(3).flatten(1, 2) @ self.cols.flatten(0, 1))


def aggregated_attention(
    q_bhdn: Tensor,
    q_unit_bhdn: Tensor,
    k_bhdn: Tensor,
    v_bhdn: Tensor,
    k_pool_bhdp: Tensor,
    v_pool_bhdp: Tensor,
    bias_ho: Tensor,
    tokens_hdo: Tensor,
    token_bias_ho: Tensor,
    pool_bias: Tensor | ResizedBias,
    grid: Pair,
) -> Tensor:
    """Return what every token gathers from its window and from the pooled map, (b, h, d, n).

    A token has the logits `q k + bias` of the nine cells of its window and `q k_pool + pool_bias` of the pooled tokens;
    one softmax goes over all of them. To the weights of the window it then adds `q_unit tokens + token_bias`. Cells
    outside the map have no logit, and the value zero. Logits are not scaled. It computes in float32 at least, whatever
    autocast says, and returns the dtype of `v_bhdn`.

    Args:
        q_bhdn: Queries of the softmax.
        q_unit_bhdn: Queries of the weights outside it.
        k_bhdn: Keys of the map.
        v_bhdn: Values of the map.
        k_pool_bhdp: Keys of the pooled map, in any order.
        v_pool_bhdp: Values of the pooled map, in that order.
        bias_ho: Bias of the window's cells.
        tokens_hdo: Keys of the window's cells outside the softmax.
        token_bias_ho: Their bias.
        pool_bias: Bias of the pooled tokens, (h, pH, pW, H, W), of any strides: a view of a smaller table will do; or
            what it is made of.
        grid: Rows and columns of the map, (H, W).
    """
    dtype = torch.promote_types(v_bhdn.dtype, torch.float32)
    maps = (q_bhdn, q_unit_bhdn, k_bhdn, v_bhdn, k_pool_bhdp, v_pool_bhdp)
    with _without_autocast(v_bhdn):
        by_kernels = dtype == torch.float32 and use_kernels("aggregated_attention", v_bhdn.device)
        resizing: list[Tensor] = []
        if isinstance(pool_bias, ResizedBias):
            if by_kernels or use_reference():
                pool_bias = pool_bias.laid_out()
            else:
                pool_bias, *resizing = (x.to(dtype) for x in pool_bias)
        biases = (bias_ho, tokens_hdo, token_bias_ho, pool_bias)
        if by_kernels:
            return _by_kernels(grid, *maps, *biases)
        inputs = [x.to(dtype) for x in (*maps, *biases)]
        y_bhdn = _reference(grid, *inputs) if use_reference() else _Aggregation.apply(grid, resizing, *inputs)
        return y_bhdn.to(v_bhdn.dtype)


def _by_kernels(grid: Pair, *inputs: Tensor) -> Tensor:
    """Compute the operator by Triton kernels, which read any dtype and compute in float32."""
    from effbackbones.kernels.aggregated_attention import aggregated_attention as kernel

    q_bhdn, q_unit_bhdn, k_bhdn, v_bhdn, k_pool_bhdp, v_pool_bhdp, *biases = inputs
    bias_ho, tokens_hdo, token_bias_ho, pool_bias = biases
    more_bhon = tokens_hdo.float().mT @ q_unit_bhdn.float() + token_bias_ho.float().unsqueeze(-1)
    maps = q_bhdn, k_bhdn, v_bhdn, k_pool_bhdp, v_pool_bhdp
    y_bhdn: Tensor = kernel(*maps, bias_ho, more_bhon, pool_bias, grid, exact=v_bhdn.dtype == torch.float32)
    return y_bhdn


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    device = x.device.type
    autocasts = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if autocasts else nullcontext()


# ---- reference


def _reference(grid: Pair, *inputs: Tensor) -> Tensor:
    q_bhdn, q_unit_bhdn, k_bhdn, v_bhdn, k_pool_bhdp, v_pool_bhdp, *biases = inputs
    bias_ho, tokens_hdo, token_bias_ho, pool_bias = biases

    def windows(x_bhdn: Tensor) -> Tensor:
        unfolded = F.unfold(x_bhdn.flatten(1, 2).unflatten(-1, grid), 3, padding=1)
        return unfolded.reshape(*x_bhdn.shape[:3], 9, x_bhdn.shape[3])

    outside_on = windows(torch.ones_like(k_bhdn[:1, :1, :1]))[0, 0, 0] == 0
    logits_bhon = torch.einsum("bhdn,bhdon->bhon", q_bhdn, windows(k_bhdn)) + bias_ho.unsqueeze(-1)
    logits_bhpn = torch.einsum("bhdn,bhdp->bhpn", q_bhdn, k_pool_bhdp) + pool_bias.flatten(3).flatten(1, 2)
    weights = torch.cat([logits_bhon.masked_fill(outside_on, -torch.inf), logits_bhpn], 2).softmax(2)
    more_bhon = torch.einsum("bhdn,hdo->bhon", q_unit_bhdn, tokens_hdo) + token_bias_ho.unsqueeze(-1)
    local_bhdn = torch.einsum("bhon,bhdon->bhdn", weights[:, :, :9] + more_bhon, windows(v_bhdn))
    return local_bhdn + torch.einsum("bhpn,bhdp->bhdn", weights[:, :, 9:], v_pool_bhdp)


# ---- fast path
#
# In the flat raster a cell of the window is at one distance from its token, whatever the token: with a row and a cell
# of zeros at either end, nine slices of one flat map are the nine cells of all tokens, and nothing is unfolded. At the
# left and the right border a slice runs into the next row; masks of the window take that out of logits and weights.

_STRIPE = 2**19
"""Logits of a stripe of rows, about, in all heads and images: what belongs to one stays in the cache of a CPU."""


class _Aggregation(torch.autograd.Function):
    """The operator with a backward pass that keeps the inputs alone, and computes the weights again.

    The last input is the bias of the pooled tokens, or with what resizes it, its table.
    """

    @staticmethod
    def forward(ctx: Any, grid: Pair, resizing: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.grid, ctx.resizing = grid, resizing
        ctx.save_for_backward(*inputs)
        return _forward(grid, *inputs[:-1], _pool_bias(inputs[-1], resizing))

    @staticmethod
    def backward(ctx: Any, grad_bhdn: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, pool_bias = ctx.saved_tensors
        with _without_autocast(grad_bhdn):
            gradients = _gradients(ctx.grid, grad_bhdn, *inputs, _pool_bias(pool_bias, ctx.resizing))
        return None, None, *gradients


def _pool_bias(tensor: Tensor, resizing: list[Tensor]) -> Any:
    return ResizedBias(tensor, *resizing) if resizing else tensor


def _forward(grid: Pair, *inputs: Any) -> Tensor:
    q_bhdn, q_unit_bhdn, k_bhdn, v_bhdn, k_pool_bhdp, v_pool_bhdp, *biases = inputs
    k_flat, v_flat = _flat(k_bhdn, grid), _flat(v_bhdn, grid)
    stripes = []
    for rows in _stripes(grid, q_bhdn, k_pool_bhdp):
        q, q_unit = _tokens(q_bhdn, rows, grid), _tokens(q_unit_bhdn, rows, grid)
        weights, local_bhon = _weights(q, q_unit, _cells(k_flat, rows, grid), k_pool_bhdp, biases, rows, grid)
        y_bhdn = torch.zeros_like(q)
        for o, v_o in enumerate(_cells(v_flat, rows, grid)):
            y_bhdn.addcmul_(local_bhon[:, :, o : o + 1], v_o)
        # A new tensor: torch.compile (2.11) gives an output that was written to in place no gradient.
        stripes.append(y_bhdn + v_pool_bhdp @ weights[:, :, 9:])
    return _joined(stripes)


def _gradients(grid: Pair, grad_bhdn: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the ten inputs."""
    q_bhdn, q_unit_bhdn, k_bhdn, v_bhdn, k_pool_bhdp, v_pool_bhdp, *biases = inputs
    bias_ho, tokens_hdo, token_bias_ho, pool_bias = biases
    k_flat, v_flat = _flat(k_bhdn, grid), _flat(v_bhdn, grid)
    sums = [k_flat, v_flat, k_pool_bhdp, v_pool_bhdp, bias_ho, tokens_hdo, token_bias_ho]
    dk_flat, dv_flat, dk_pool, dv_pool, d_bias, d_tokens, d_token_bias = (torch.zeros_like(x) for x in sums)
    dq, dq_unit = [], []
    resized = isinstance(pool_bias, ResizedBias)
    d_pool_bias = torch.zeros_like(pool_bias.table) if resized else pool_bias.new_empty(pool_bias.shape)
    for rows in _stripes(grid, q_bhdn, k_pool_bhdp):
        q, q_unit, grad = (_tokens(x, rows, grid) for x in (q_bhdn, q_unit_bhdn, grad_bhdn))
        weights, local_bhon = _weights(q, q_unit, _cells(k_flat, rows, grid), k_pool_bhdp, biases, rows, grid)
        inside_on, _ = _window_masks(grid, grad.dtype, grad.device)
        dw_bhon = torch.stack([(grad * v_o).sum(2) for v_o in _cells(v_flat, rows, grid)], 2)
        dw_bhon = dw_bhon * _tokens(inside_on, rows, grid)
        dw = torch.cat([dw_bhon, v_pool_bhdp.mT @ grad], 2)
        ds = weights * (dw - (weights * dw).sum(2, keepdim=True))
        ds_bhon, ds_bhpn = ds[:, :, :9], ds[:, :, 9:]

        dq_bhdn = k_pool_bhdp @ ds_bhpn
        flats = zip(*(_cells(x, rows, grid) for x in (k_flat, dk_flat, dv_flat)), strict=True)
        for o, (k_o, dk_o, dv_o) in enumerate(flats):
            dq_bhdn.addcmul_(ds_bhon[:, :, o : o + 1], k_o)
            dk_o.addcmul_(ds_bhon[:, :, o : o + 1], q)
            dv_o.addcmul_(local_bhon[:, :, o : o + 1], grad)
        dq.append(dq_bhdn)
        dq_unit.append(tokens_hdo @ dw_bhon)
        dk_pool += q @ ds_bhpn.mT
        dv_pool += grad @ weights[:, :, 9:].mT
        d_bias += ds_bhon.sum((0, 3))
        d_tokens += (q_unit @ dw_bhon.mT).sum(0)
        d_token_bias += dw_bhon.sum((0, 3))
        of_rows = ds_bhpn.sum(0).unflatten(2, (-1, grid[1]))
        if resized:
            d_pool_bias += pool_bias.gradient(of_rows, *rows)
        else:
            d_pool_bias[:, :, :, rows[0] : rows[1]] = of_rows.unflatten(1, pool_bias.shape[1:3])
    dk_bhdn, dv_bhdn = (x[..., grid[1] + 1 : -grid[1] - 1] for x in (dk_flat, dv_flat))
    d_biases = d_bias, d_tokens, d_token_bias, d_pool_bias
    return _joined(dq), _joined(dq_unit), dk_bhdn, dv_bhdn, dk_pool, dv_pool, *d_biases


def _weights(
    q_bhdn: Tensor,
    q_unit_bhdn: Tensor,
    k_cells: Iterator[Tensor],
    k_pool_bhdp: Tensor,
    biases: list[Any],
    rows: Pair,
    grid: Pair,
) -> tuple[Tensor, Tensor]:
    """Return the softmax of a stripe of rows (b, h, 9 + p, n), and the whole weights of the window (b, h, 9, n)."""
    bias_ho, tokens_hdo, token_bias_ho, pool_bias = biases
    inside_on, barrier_on = (_tokens(x, rows, grid) for x in _window_masks(grid, q_bhdn.dtype, q_bhdn.device))
    logits_bhon = torch.stack([(q_bhdn * k_o).sum(2) for k_o in k_cells], 2) + (bias_ho.unsqueeze(-1) + barrier_on)
    resized = isinstance(pool_bias, ResizedBias)
    of_rows = pool_bias.laid_out(*rows) if resized else pool_bias[:, :, :, rows[0] : rows[1]]
    weights = torch.cat([logits_bhon, k_pool_bhdp.mT @ q_bhdn + of_rows.flatten(3).flatten(1, 2)], 2).softmax(2)
    more_bhon = tokens_hdo.mT @ q_unit_bhdn + token_bias_ho.unsqueeze(-1)
    return weights, more_bhon * inside_on + weights[:, :, :9]


def _flat(x_bhdn: Tensor, grid: Pair) -> Tensor:
    """Return a map with a row and a cell of zeros at either end."""
    return F.pad(x_bhdn, (grid[1] + 1, grid[1] + 1))


def _cells(x_flat: Tensor, rows: Pair, grid: Pair) -> Iterator[Tensor]:
    """Yield the nine cells of the window of every token of a stripe of rows: views of the map, (b, h, d, n)."""
    width, n = grid[1], (rows[1] - rows[0]) * grid[1]
    return (x_flat.narrow(-1, (rows[0] + dy) * width + dx, n) for dy in range(3) for dx in range(3))


def _tokens(x_bhdn: Tensor, rows: Pair, grid: Pair) -> Tensor:
    """Return the tokens of a stripe of rows."""
    return x_bhdn[..., rows[0] * grid[1] : rows[1] * grid[1]]


def _joined(stripes: list[Tensor]) -> Tensor:
    """Return the stripes as one tensor, without a copy where there is but one."""
    return torch.cat(stripes, -1) if len(stripes) > 1 else stripes[0]


def _stripes(grid: Pair, q_bhdn: Tensor, k_pool_bhdp: Tensor) -> list[Pair]:
    """Return the stripes of rows, (first, end), to go through: one, but on a CPU."""
    height, width = grid
    step = height
    if q_bhdn.device.type == "cpu" and not torch.compiler.is_compiling():
        logits_of_row = q_bhdn.shape[0] * q_bhdn.shape[1] * (9 + k_pool_bhdp.shape[3]) * width
        step = max(_STRIPE // logits_of_row, -(-128 // width))
    return [(first, min(first + step, height)) for first in range(0, height, step)]


@constant
def _window_masks(grid: Pair, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which cells of the tokens' windows are inside the map, (9, N): as 1 and 0, and as 0 and minus infinity."""
    shift = torch.arange(-1, 2, device=device).unsqueeze(-1)
    rows, cols = (torch.arange(n, device=device) + shift for n in grid)
    inside_y, inside_x = (rows >= 0) & (rows < grid[0]), (cols >= 0) & (cols < grid[1])
    inside = (inside_y[:, None, :, None] & inside_x[None, :, None, :]).flatten(2).flatten(0, 1)
    return inside.to(dtype), torch.zeros_like(inside, dtype=dtype).masked_fill(~inside, -torch.inf)
