"""The kernels of attention with a shared bias, against the formula in float64."""

from typing import Any

import pytest
import torch
from kernel_device import DEVICE
from torch import Tensor

from effbackbones.kernels import window_attention as module

SIZES = [  # windows, heads, queries, keys, channels of q and k, of v
    (5, 2, 9, 9, 6, 6),
    (3, 1, 49, 49, 32, 32),
    (2, 2, 70, 70, 8, 8),
    (2, 1, 5, 67, 16, 24),
]


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    return ((q @ k.mT) * scale + bias).softmax(-1) @ v


def example(sizes: Any, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    windows, heads, n, m, d, d_v = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = [(windows, heads, n, d), (windows, heads, m, d), (windows, heads, m, d_v), (1, heads, n, m)]
    tensors = [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]
    return tensors, torch.randn(windows, heads, n, d_v, generator=generator).to(DEVICE, dtype)


def outcome(function: Any, tensors: list[Tensor], grad: Tensor, scale: float) -> list[Tensor]:
    y = function(*tensors, scale)
    return [y, *torch.autograd.grad(y, tensors, grad.to(y.dtype))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_and_gradients_are_those_of_the_formula(sizes, dtype, tolerance):
    tensors, grad = example(sizes, dtype)
    ours = outcome(module.window_attention, tensors, grad, 0.4)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    for got, expected in zip(ours, outcome(formula, doubles, grad, 0.4), strict=True):
        assert got.dtype == dtype
        assert (got - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("sides", [(9, 9), (9, 67)], ids=["one tile", "tiles"])
def test_gradient_of_the_bias_is_summed_in_parts_of_the_windows(sides, monkeypatch):
    tensors, grad = example((7, 2, *sides, 6, 6), torch.float32)
    expected = outcome(module.window_attention, tensors, grad, 0.4)
    monkeypatch.setattr(module, "PROGRAMS", 6)
    for got, whole in zip(outcome(module.window_attention, tensors, grad, 0.4), expected, strict=True):
        torch.testing.assert_close(got, whole)


def test_strided_inputs_give_the_same():
    tensors, grad = example((3, 2, 9, 9, 6, 6), torch.float32)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors]
    pairs = zip(*(outcome(module.window_attention, x, grad, 0.4) for x in (tensors, strided)), strict=True)
    for a, b in pairs:
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
def test_operator_is_fit_for_compilation():
    tensors, _ = example((2, 1, 5, 5, 4, 4), torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(module._operator, (*tensors, 0.4), test_utils=tests).values()) == {"SUCCESS"}


def test_trial_call_succeeds():
    module.trial(DEVICE)
