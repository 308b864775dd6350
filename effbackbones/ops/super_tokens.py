"""Super-token attention: pixels share out among the super tokens around them, and these attend to each other.

Source: "Vision Transformer with Super Token Sampling", arXiv 2211.11167, section 3.

A map is cut into square cells with one super token each. A pixel belongs, by a softmax, to the nine super tokens of its
cell and of the cells around; a super token is the weighted mean of the pixels that belong to it. What the super tokens
become goes back to the pixels by the same weights. Neighbours are numbered row by row, k = 3 a + b for the cell a - 1
rows down and b - 1 columns to the right; beyond the border they are zero vectors, which take their share of a pixel
and lose it. Padding takes part like any pixel.

Legend: b batch, h and w rows and columns, c channels, g cells (all of a batch, row by row), n pixels of a cell, k its
nine neighbours.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from effbackbones.layers.reference import use_kernels, use_reference
from effbackbones.layers.window import join_windows, pad_to_windows, split_windows

Grid = tuple[int, int]


def super_token_attention(x_bhwc: Tensor, cell: int, n_iter: int, refine: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the map (B, H, W, C) after attention through super tokens.

    The association of pixels with super tokens is a constant to the gradient, which flows through the pixels that are
    averaged, and through `refine`.

    Args:
        x_bhwc: The map, of any size: it is padded with zeros at the bottom and the right.
        cell: Side of a cell, pixels.
        n_iter: Rounds of association, at least 1.
        refine: The attention among super tokens, (B, ceil(H / cell), ceil(W / cell), C) to the same.
    """
    if use_reference():
        return _reference(x_bhwc, cell, n_iter, refine)
    x_gnc, grid = _cells(x_bhwc, cell)
    s_bhwc, q_gkn = _sample(x_gnc, grid, n_iter)
    return _map(_spread(q_gkn, refine(s_bhwc)), cell, grid, x_bhwc)


def sample_super_tokens(x_bhwc: Tensor, cell: int, n_iter: int) -> tuple[Tensor, Tensor]:
    """Return the super tokens of a map, and how pixels belong to them: what `super_token_attention` works with.

    Args:
        x_bhwc: The map, (B, H, W, C).
        cell: Side of a cell, pixels.
        n_iter: Rounds of association, at least 1.

    Returns:
        Super tokens before any attention, (B, ceil(H / cell), ceil(W / cell), C); and the weight of each pixel for the
        nine super tokens around it, (B, H, W, 9), which sum to 1, those of neighbours beyond the border included.
    """
    x_gnc, grid = _cells(x_bhwc, cell)
    s_bhwc, q_gkn = _sample(x_gnc, grid, n_iter)
    return s_bhwc, _map(q_gkn.transpose(1, 2), cell, grid, x_bhwc)


def _cells(x_bhwc: Tensor, cell: int) -> tuple[Tensor, Grid]:
    """Return the pixels of a map's cells, (B h w, N, C), and the grid of cells."""
    x_bhwc = pad_to_windows(x_bhwc, (cell, cell))
    return split_windows(x_bhwc, (cell, cell)), (x_bhwc.shape[1] // cell, x_bhwc.shape[2] // cell)


def _map(y_gnc: Tensor, cell: int, grid: Grid, x_bhwc: Tensor) -> Tensor:
    """Return the pixels of cells as a map of the size of `x_bhwc`."""
    y_bhwc = join_windows(y_gnc, (cell, cell), (grid[0] * cell, grid[1] * cell))
    return y_bhwc[:, : x_bhwc.shape[1], : x_bhwc.shape[2]]


def _sample(x_gnc: Tensor, grid: Grid, n_iter: int) -> tuple[Tensor, Tensor]:
    """Return the super tokens (B, h, w, C), and the association (B h w, 9, N), a constant to the gradient."""
    update = _update_by_kernels if _has_kernels(x_gnc) else _update
    fixed_gnc = x_gnc.detach()
    s_bhwc = fixed_gnc.mean(1).reshape(-1, *grid, fixed_gnc.shape[-1])
    for i in range(n_iter):
        s_bhwc, q_gkn = update(s_bhwc, fixed_gnc, x_gnc if i == n_iter - 1 else fixed_gnc)
    return s_bhwc, q_gkn


def _update(s_bhwc: Tensor, fixed_gnc: Tensor, x_gnc: Tensor) -> tuple[Tensor, Tensor]:
    """Associate pixels with super tokens; return the means of `x_gnc` by that, and the association."""
    q_gkn, share_gkn = _associate(s_bhwc, fixed_gnc)
    return _collect(share_gkn @ x_gnc, (s_bhwc.shape[1], s_bhwc.shape[2])), q_gkn


def _update_by_kernels(s_bhwc: Tensor, fixed_gnc: Tensor, x_gnc: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `_update` by Triton kernels, which give sums in float32: these are divided, not the weights."""
    from effbackbones.kernels.super_tokens import associate, gather

    grid = (s_bhwc.shape[1], s_bhwc.shape[2])
    q_gkn, total_gk = associate(s_bhwc, fixed_gnc)
    total_bhw1 = _collect(total_gk.unsqueeze(-1), grid) + 1e-12
    return (gather(q_gkn, x_gnc, *grid) / total_bhw1).to(x_gnc.dtype), q_gkn


def _spread(q_gkn: Tensor, s_bhwc: Tensor) -> Tensor:
    """Return what pixels get of the super tokens around them, (B h w, N, C)."""
    if _has_kernels(q_gkn):
        from effbackbones.kernels.super_tokens import spread

        y_gnc: Tensor = spread(q_gkn, s_bhwc)
        return y_gnc
    return q_gkn.transpose(1, 2) @ _neighbours(s_bhwc)


def _has_kernels(x: Tensor) -> bool:
    return x.dtype != torch.float64 and use_kernels("super_tokens", x.device)


def _associate(s_bhwc: Tensor, x_gnc: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of pixels for their super tokens, and their shares in these, both (B h w, 9, N).

    A super token's shares sum to 1: it is divided by the sum of its weights. The small number is none in float16, nor
    is the quotient's gradient, so these are in float32, and sums of pixels are of shares, never of weights.
    They lie neighbour by neighbour, as softmax and sums are faster along the pixels than along nine numbers.
    """
    dtype = torch.float64 if x_gnc.dtype == torch.float64 else torch.float32
    scores_gkn = _neighbours(s_bhwc * s_bhwc.shape[-1] ** -0.5) @ x_gnc.transpose(1, 2)
    q_gkn = scores_gkn.softmax(1, dtype=dtype)
    total_bhw1 = _collect(q_gkn.sum(2, keepdim=True), (s_bhwc.shape[1], s_bhwc.shape[2]))
    share_gkn = q_gkn * _neighbours(1 / (total_bhw1 + 1e-12))
    return q_gkn.to(x_gnc.dtype), share_gkn.to(x_gnc.dtype)


def _neighbours(s_bhwc: Tensor) -> Tensor:
    """Return the nine super tokens around each cell, (B h w, 9, C), zeros beyond the border."""
    h, w, c = s_bhwc.shape[1:]
    s = F.pad(s_bhwc, (0, 0, 1, 1, 1, 1))
    s = torch.cat([s[:, :, b : b + w] for b in range(3)], 3)
    return torch.cat([s[:, a : a + h] for a in range(3)], 3).reshape(-1, 9, c)


def _collect(part_gkc: Tensor, grid: Grid) -> Tensor:
    """Return the sums (B, h, w, C) of what cells have for each of their neighbours: the transpose of `_neighbours`."""
    before, same, after = part_gkc.reshape(-1, *grid, 3, 3, part_gkc.shape[-1]).unbind(3)
    part = same + F.pad(before[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1)) + F.pad(after[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
    before, same, after = part.unbind(3)
    return same + F.pad(before[:, :, 1:], (0, 0, 0, 1)) + F.pad(after[:, :, :-1], (0, 0, 1, 0))


def _reference(x_bhwc: Tensor, cell: int, n_iter: int, refine: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute `super_token_attention` step by step, with torch's unfold and fold."""
    (height, width), c = x_bhwc.shape[1:3], x_bhwc.shape[3]
    h, w = -(-height // cell), -(-width // cell)
    x_bchw = F.pad(x_bhwc.permute(0, 3, 1, 2), (0, w * cell - width, 0, h * cell - height))
    x_bgnc = x_bchw.reshape(-1, c, h, cell, w, cell).permute(0, 2, 4, 3, 5, 1).reshape(-1, h * w, cell**2, c)
    dtype = torch.float64 if x_bhwc.dtype == torch.float64 else torch.float32

    def neighbours(s_bchw: Tensor) -> Tensor:
        return F.unfold(s_bchw, 3, padding=1).reshape(-1, s_bchw.shape[1], 9, h * w).permute(0, 3, 2, 1)

    def collect(part_bgkc: Tensor) -> Tensor:
        return F.fold(part_bgkc.permute(0, 3, 2, 1).flatten(1, 2), (h, w), 3, padding=1)

    def update() -> Tensor:
        share_bgnk = q_bgnk * neighbours(1 / (total_b1hw + 1e-12)).mT  # float32, as the quotient needs
        return collect(share_bgnk.to(x_bgnc.dtype).mT @ x_bgnc)

    with torch.no_grad():
        s_bchw = x_bgnc.mean(2).mT.reshape(-1, c, h, w)
        for i in range(n_iter):
            if i:
                s_bchw = update()
            q_bgnk = (x_bgnc @ neighbours(s_bchw).mT * c**-0.5).softmax(-1, dtype=dtype)
            total_b1hw = collect(q_bgnk.sum(2).unsqueeze(-1))
    s_bchw = refine(update().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    y_bgnc = q_bgnk.to(x_bhwc.dtype) @ neighbours(s_bchw)
    y_bchw = y_bgnc.reshape(-1, h, w, cell, cell, c).permute(0, 5, 1, 3, 2, 4).reshape(-1, c, h * cell, w * cell)
    return y_bchw[:, :, :height, :width].permute(0, 2, 3, 1)
