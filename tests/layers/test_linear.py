"""Linear layers equal torch's, whoever computes them."""

import pytest
import torch
import torch.nn.functional as F

from effbackbones.layers import Linear, apply_linear, ops_backend


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that names the functions of torch that are called from now on."""
    called: list[str] = []
    for name in ("linear", "conv2d"):
        real = getattr(F, name)
        monkeypatch.setattr(F, name, lambda *args, real=real, name=name: called.append(name) or real(*args))
    return called


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(2, 24, 20, 96), (1, 20, 24, 96), (3, 196, 96), (1, 5, 7, 6), (9, 6)], ids=str)
def test_output_and_gradients_equal_torchs(shape, bias):
    torch.manual_seed(0)
    layer = Linear(shape[-1], 256, bias=bias)
    *rows, channels = shape
    apart = torch.randn(*rows, 2 * channels)[..., :channels]
    for x in (torch.randn(shape), torch.randn(*rows[::-1], channels).transpose(0, -2), apart):
        leaves = [x.detach().requires_grad_(), *layer.parameters()]
        ours, expected = layer(leaves[0]), F.linear(*leaves)
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        cotangent = torch.randn(expected.shape)
        grads = (torch.autograd.grad(out, leaves, cotangent) for out in (ours, expected))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "dtype", "served"),
    [
        ((2, 24, 20, 96), torch.float32, "conv2d"),
        ((4, 500, 96), torch.float32, "linear"),  # fewer rows than torch takes to oneDNN on one thread
        ((2, 8, 5, 96), torch.float32, "linear"),  # too few tokens to be faster
        ((2048, 96), torch.float32, "linear"),
        ((2, 24, 20, 96), torch.float64, "linear"),
        ((2, 24, 20, 96), torch.bfloat16, "linear"),
    ],
    ids=str,
)
def test_many_tokens_of_float32_on_a_cpu_are_convolved(shape, dtype, served, monkeypatch):
    assert torch.get_num_threads() == 1
    called = calls(monkeypatch)
    apply_linear(torch.randn(shape, dtype=dtype), torch.randn(256, 96, dtype=dtype))
    assert called == [served]


def test_autocast_other_devices_and_references_take_torchs_linear(monkeypatch):
    x, weight = torch.randn(2, 24, 20, 96), torch.randn(256, 96)
    called = calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert apply_linear(x, weight).dtype == torch.bfloat16
    assert apply_linear(x.to("meta"), weight.to("meta")).shape == (2, 24, 20, 256)
    with ops_backend("reference"):
        apply_linear(x, weight)
    assert called == ["linear"] * 3
