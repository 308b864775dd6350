"""Maps cut into non-overlapping windows, and put together again.

Windows are ordered image by image, row by row; tokens of a window in raster order. Legend: B batch, H and W rows and
columns of a map, h and w of a window (which divide them), N = h w tokens, heads of d channels.
"""

import torch.nn.functional as F
from torch import Tensor

Window = tuple[int, int]


def pad_to_windows(x_bhwc: Tensor, window: Window) -> Tensor:
    """Return the map with zeros at the bottom and the right, so that `window` divides it."""
    pad_h, pad_w = -x_bhwc.shape[1] % window[0], -x_bhwc.shape[2] % window[1]
    return F.pad(x_bhwc, (0, 0, 0, pad_w, 0, pad_h)) if pad_h or pad_w else x_bhwc


def split_windows(x_bhwc: Tensor, window: Window) -> Tensor:
    """Return the windows of a map, (B H/h W/w, N, C)."""
    (h, w), c = window, x_bhwc.shape[-1]
    x = x_bhwc.reshape(-1, x_bhwc.shape[1] // h, h, x_bhwc.shape[2] // w, w, c)
    return x.transpose(2, 3).reshape(-1, h * w, c)


def join_windows(x_bnc: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    """Return the map (B, H, W, C) of `size` (H, W) that `split_windows` cut."""
    (h, w), (height, width) = window, size
    x = x_bnc.reshape(-1, height // h, width // w, h, w, x_bnc.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x_bnc.shape[-1])


def split_window_heads(x_bhwc: Tensor, window: Window, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Return `parts` tensors (B H/h W/w, heads, N, d) of a map whose channels are ordered part, head, d: one copy."""
    h, w = window
    x = x_bhwc.reshape(
        -1, x_bhwc.shape[1] // h, h, x_bhwc.shape[2] // w, w, parts, heads, x_bhwc.shape[3] // (parts * heads)
    )
    x = x.permute(5, 0, 1, 3, 6, 2, 4, 7)
    return x.reshape(parts, -1, heads, h * w, x.shape[-1]).unbind(0)


def join_window_heads(x_bhnd: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    """Return the map (B, H, W, heads d) of `size` (H, W) of windows (B H/h W/w, heads, N, d): one copy."""
    (h, w), (height, width) = window, size
    x = x_bhnd.reshape(-1, height // h, width // w, x_bhnd.shape[1], h, w, x_bhnd.shape[3])
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, height, width, x_bhnd.shape[1] * x_bhnd.shape[3])
