"""Linear layers over maps equal torch's, whoever computes them."""

import pytest
import torch
import torch.nn.functional as F

from effbackbones.layers import Linear, linear_bhwc


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that names the functions of torch that are called from now on."""
    called: list[str] = []
    for name in ("linear", "conv2d"):
        real = getattr(F, name)
        monkeypatch.setattr(F, name, lambda *args, real=real, name=name: called.append(name) or real(*args))
    return called


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(2, 8, 5, 6), (1, 16, 1, 6), (1, 4, 4, 6), (3, 7, 7, 6)], ids=str)
def test_output_and_gradients_equal_torchs(shape, bias):
    torch.manual_seed(0)
    layer = Linear(6, 10, bias=bias)
    for x in (torch.randn(shape), torch.randn(shape).transpose(1, 2), torch.randn(*shape[:2], 9, 6)[:, :, : shape[2]]):
        leaves = [x.detach().requires_grad_(), *layer.parameters()]
        ours, expected = layer(leaves[0]), F.linear(*leaves)
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, expected)
        cotangent = torch.randn(expected.shape)
        grads = (torch.autograd.grad(out, leaves, cotangent) for out in (ours, expected))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "served"),
    [
        ((2, 8, 5, 6), torch.float32, "conv2d"),
        ((1, 8, 5, 6), torch.float32, "linear"),  # fewer rows than torch takes to oneDNN
        ((2, 8, 5, 6), torch.float64, "linear"),
        ((2, 8, 5, 6), torch.bfloat16, "linear"),
    ],
    ids=str,
)
def test_rows_of_float32_on_a_cpu_are_convolved(shape, dtype, served, monkeypatch):
    called = calls(monkeypatch)
    linear_bhwc(torch.randn(shape, dtype=dtype), torch.randn(4, 6, dtype=dtype))
    assert called == [served]


def test_autocast_and_other_devices_take_torchs_linear(monkeypatch):
    called = calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_bhwc(torch.randn(2, 8, 5, 6), torch.randn(4, 6)).dtype == torch.bfloat16
    assert linear_bhwc(torch.empty(2, 8, 5, 6, device="meta"), torch.empty(4, 6, device="meta")).shape == (2, 8, 5, 4)
    assert called == ["linear", "linear"]
