"""Position biases against the plain formula; tables resized."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effbackbones.layers import RelativePositionBias, resize_table

each_window = pytest.mark.parametrize("window", [(1, 1), (2, 2), (2, 5), (5, 2), (1, 4), (7, 7)], ids=str)


def plain(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Return the bias (heads, N, N): for each pair of tokens, the row of the table of their offset."""
    h, w = window
    tokens = [(row, col) for row in range(h) for col in range(w)]
    rows = [table[(qr - kr + h - 1) * (2 * w - 1) + qc - kc + w - 1] for qr, qc in tokens for kr, kc in tokens]
    return torch.stack(rows).reshape(h * w, h * w, -1).permute(2, 0, 1)


@each_window
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_bias_and_its_gradient_are_those_of_the_formula(window, training):
    bias = RelativePositionBias(window, 3).double().train(training)
    n = window[0] * window[1]
    ours = bias()
    assert ours.shape == (1, 3, n, n)
    expected = plain(bias.table, window)
    assert torch.equal(ours[0], expected)
    cotangent = torch.randn(3, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(ours, bias.table, cotangent[None])
    (expected_grad,) = torch.autograd.grad(expected, bias.table, cotangent)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


@each_window
def test_bias_is_stored_as_fused_attention_needs_it(window):
    *strides, last = RelativePositionBias(window, 3)().stride()
    assert last == 1
    assert [stride for stride in strides if stride % 8] == []


@torch.no_grad()
def test_bias_is_kept_in_evaluation_and_follows_its_table():
    bias = RelativePositionBias((2, 3), 2).eval()
    before = bias()
    assert bias() is before
    bias.table.mul_(2)
    assert torch.equal(bias(), 2 * before)


def test_table_starts_as_a_truncated_normal_and_is_all_there_is():
    torch.manual_seed(0)
    bias = RelativePositionBias((12, 10), 8)
    assert {key: tuple(value.shape) for key, value in bias.state_dict().items()} == {"table": (23 * 19, 8)}
    assert bias.table.detach().std() == pytest.approx(0.02, rel=0.05)


# Tables of other windows


def table(side: int, heads: int = 3) -> Tensor:
    return torch.randn(side * side, heads, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("window", [(7, 7), (12, 12), (4, 9), (1, 2)], ids=str)
def test_resized_table_is_the_bicubic_one(window):
    rows, cols = 2 * window[0] - 1, 2 * window[1] - 1
    resized = resize_table(table(9), window)
    image = table(9).reshape(9, 9, 3).permute(2, 0, 1)[None]
    expected = F.interpolate(image, (rows, cols), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    torch.testing.assert_close(resized.reshape(rows, cols, 3), expected)
    assert resized.is_contiguous()


def test_resized_table_fits_the_bias():
    bias = RelativePositionBias((4, 6), 3).double()
    bias.load_state_dict({"table": resize_table(table(9), bias.window)})
    assert bias().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_resized_table_keeps_its_dtype(dtype):
    given = table(9).to(dtype)
    resized = resize_table(given, (7, 7))
    assert resized.dtype == dtype
    expected = resize_table(given.double(), (7, 7))
    assert (resized.double() - expected).abs().max() < max(2 * torch.finfo(dtype).eps, 1e-5) * expected.abs().max()


def test_table_that_fits_is_left_alone():
    given = table(9)
    assert resize_table(given, (5, 5)) is given


@pytest.mark.parametrize("shape", [(80, 3), (64, 3), (63, 3), (81,), (81, 3, 1), ()], ids=str)
def test_table_of_no_square_window_is_left_alone(shape):
    given = torch.zeros(shape)
    assert resize_table(given, (7, 7)) is given
