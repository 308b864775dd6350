"""Learned biases of attention by relative position."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from effbackbones.layers.attention import aligned_bias
from effbackbones.layers.cached import Cached, constant
from effbackbones.layers.window import Window


class RelativePositionBias(Cached):
    """The bias of attention within a window: one learned number per head and offset between query and key.

    Args:
        window: Rows and columns of the window, (h, w).
        heads: Attention heads.
    """

    def __init__(self, window: Window, heads: int):
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), heads))
        trunc_normal_(self.table, std=0.02)

    def forward(self) -> Tensor:
        """Return the bias (1, heads, h w, h w) of queries over keys, stored as attention wants it."""
        return self.kept("bias", [self.table], self._bias)

    def _bias(self) -> Tensor:
        n = self.window[0] * self.window[1]
        rows = self.table.index_select(0, _offsets(self.window, self.table.device))
        return aligned_bias(rows.reshape(n, n, -1).permute(2, 0, 1).unsqueeze(0))


@constant
def _offsets(window: Window, device: torch.device) -> Tensor:
    """Return the row of the table for every pair of query and key, flat: query minus key, row by row."""
    h, w = window
    rows, cols = (torch.arange(n, device=device)[:, None] - torch.arange(n, device=device) + n - 1 for n in window)
    return (rows[:, None, :, None] * (2 * w - 1) + cols[None, :, None, :]).reshape(h * w * h * w)


def resize_table(table: Tensor, window: Window) -> Tensor:
    """Return a bias table (offsets, heads) of a square window for another `window`, resized bicubically.

    It is returned as it is where it already has that many offsets, or where it belongs to no square window.
    """
    size = (2 * window[0] - 1, 2 * window[1] - 1)
    side = round(table.shape[0] ** 0.5) if table.ndim == 2 else 0
    if side % 2 == 0 or side * side != table.shape[0] or table.shape[0] == size[0] * size[1]:
        return table
    image = table.T.reshape(1, -1, side, side)
    if table.dtype in (torch.float16, torch.bfloat16):
        image = image.float()
    return F.interpolate(image, size, mode="bicubic").flatten(2)[0].T.to(table.dtype).contiguous()
