"""Windows against loops over them."""

import pytest
import torch
from torch import Tensor

from effbackbones.layers import join_window_heads, join_windows, pad_to_windows, split_window_heads, split_windows

each_map = pytest.mark.parametrize(
    ("window", "size"),
    [((2, 3), (4, 9)), ((3, 3), (3, 3)), ((1, 4), (5, 8)), ((4, 2), (4, 2)), ((1, 1), (2, 3))],
    ids=str,
)


def numbered(*shape: int) -> Tensor:
    """Return a tensor all of whose elements differ."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def windows(x_bhwc: Tensor, window: tuple[int, int]) -> list[Tensor]:
    """Return the windows (h, w, C) image by image, row by row."""
    (h, w), (b, height, width, _) = window, x_bhwc.shape
    return [
        x_bhwc[i, top : top + h, left : left + w]
        for i in range(b)
        for top in range(0, height, h)
        for left in range(0, width, w)
    ]


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (1, 1), (7, 8)], ids=str)
def test_padding_is_of_zeros_at_the_bottom_and_the_right(size):
    x = numbered(2, *size, 3) + 1
    padded = pad_to_windows(x, (2, 3))
    height, width = size
    assert padded.shape == (2, -(-height // 2) * 2, -(-width // 3) * 3, 3)
    assert torch.equal(padded[:, :height, :width], x)
    assert padded.count_nonzero() == x.numel()


def test_map_that_fits_is_not_copied():
    x = numbered(2, 4, 6, 3)
    assert pad_to_windows(x, (2, 3)) is x


@each_map
def test_windows_are_those_of_a_loop(window, size):
    x = numbered(2, *size, 5)
    expected = torch.stack([part.reshape(-1, 5) for part in windows(x, window)])
    assert torch.equal(split_windows(x, window), expected)


@each_map
def test_joined_windows_are_the_map(window, size):
    x = numbered(2, *size, 5)
    assert torch.equal(join_windows(split_windows(x, window), window, size), x)


@each_map
@pytest.mark.parametrize(("parts", "heads"), [(3, 2), (1, 4), (2, 1)])
def test_window_heads_are_those_of_a_loop(window, size, parts, heads):
    d = 3
    x = numbered(2, *size, parts * heads * d)
    split = split_window_heads(x, window, parts, heads)
    assert len(split) == parts
    for p, tensor in enumerate(split):
        assert tensor.shape[1:] == (heads, window[0] * window[1], d)
        for part, got in zip(windows(x, window), tensor, strict=True):
            for head in range(heads):
                first = (p * heads + head) * d
                assert torch.equal(got[head], part[:, :, first : first + d].reshape(-1, d))


@each_map
@pytest.mark.parametrize("heads", [1, 4])
def test_joined_window_heads_are_the_map(window, size, heads):
    x = numbered(2, *size, heads * 3)
    (tensor,) = split_window_heads(x, window, 1, heads)
    assert torch.equal(join_window_heads(tensor, window, size), x)


def test_batch_may_be_symbolic():
    class RoundTrip(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            (tensor,) = split_window_heads(x, (2, 3), 1, 2)
            return join_windows(split_windows(x, (2, 3)), (2, 3), (4, 6)), join_window_heads(tensor, (2, 3), (4, 6))

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(RoundTrip(), (numbered(2, 4, 6, 4),), dynamic_shapes=({0: batch},))
    x = numbered(5, 4, 6, 4)
    assert all(torch.equal(y, x) for y in program.module()(x))
