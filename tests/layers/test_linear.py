"""Linear layers equal torch's, whoever computes them."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from effbackbones.layers import Linear, apply_linear, apply_linear_bcn, linear, ops_backend


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have oneDNN serve, whichever CPU this is."""
    monkeypatch.setattr(linear, "_ONEDNN", torch.backends.mkldnn.is_available())


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that names the functions of torch that are called from now on."""
    called: list[str] = []
    for owner, name in ((F, "linear"), (F, "conv2d"), (linear, "_onednn_linear")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, real=real, name=name: called.append(name) or real(*args))
    return called


LARGE = (2, 24, 20, 96)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [LARGE, (1, 20, 24, 96), (4, 197, 96), (480, 96), (1, 5, 7, 6), (2, 0, 96)], ids=str)
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
        with torch.no_grad():
            inferred = layer(x)
        assert inferred.is_contiguous()
        torch.testing.assert_close(inferred, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 480, 96), (1, 35, 96), (3, 4, 6)], ids=str)
def test_channels_first_equal_torchs(shape):
    leaves = [torch.randn(shape), torch.randn(256, shape[-1]), torch.randn(256)]
    expected = F.linear(*leaves).mT
    torch.testing.assert_close(apply_linear_bcn(*leaves), expected, rtol=1e-4, atol=1e-5)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    ours, expected = apply_linear_bcn(*leaves), F.linear(*leaves).mT
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn(expected.shape)
    for a, b in zip(*(torch.autograd.grad(out, leaves, cotangent) for out in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "dtype", "trained", "inferred"),
    [
        (LARGE, torch.float32, "conv2d", "_onednn_linear"),
        ((4, 196, 96), torch.float32, "conv2d", "_onednn_linear"),
        ((1, 997, 96), torch.float32, "linear", "_onednn_linear"),  # a prime number of tokens: no batch
        ((2, 10, 10, 96), torch.float32, "linear", "_onednn_linear"),  # too few for a convolution
        ((2, 5, 4, 96), torch.float32, "linear", "linear"),
        (LARGE, torch.float64, "linear", "linear"),
        (LARGE, torch.bfloat16, "linear", "linear"),
    ],
    ids=str,
)
def test_onednn_serves_where_it_is_faster(shape, dtype, trained, inferred, served):
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(256, 96, dtype=dtype)
    apply_linear(x, weight.requires_grad_())
    with torch.no_grad():
        apply_linear(x, weight)
    assert served == [trained, inferred]


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_onednn_serves_on_cpus_whose_avx512_mkl_leaves_unused(vendor, capability, expected, monkeypatch):
    monkeypatch.setattr(linear, "cpu_field", {"vendor_id": vendor}.get)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert linear._mkl_leaves_avx512() is expected


def test_a_bias_alone_has_its_gradient():
    bias = torch.zeros(256, requires_grad=True)
    apply_linear(torch.randn(LARGE), torch.randn(256, 96), bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((256,), 960.0))


def test_autocast_other_devices_and_references_take_torchs_linear(served):
    x, weight = torch.randn(LARGE), torch.randn(256, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert apply_linear(x, weight).dtype == torch.bfloat16
    assert apply_linear(x.to("meta"), weight.to("meta")).shape == (2, 24, 20, 256)
    with ops_backend("reference"):
        apply_linear(x, weight)
    assert served == ["linear"] * 3


def test_transforms_of_torch_func():
    x, weight = torch.randn(LARGE), torch.randn(256, 96)
    _, tangent = torch.func.jvp(lambda x: apply_linear(x, weight), (x,), (2 * x,))
    torch.testing.assert_close(tangent, F.linear(2 * x, weight))
    _, tangent = torch.func.jvp(lambda weight: apply_linear(x, weight), (weight,), (2 * weight,))
    torch.testing.assert_close(tangent, F.linear(x, 2 * weight))
    mapped = torch.func.vmap(lambda x: apply_linear(x, weight))(x)
    torch.testing.assert_close(mapped, F.linear(x, weight))


def test_operations_are_counted():
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        apply_linear(torch.randn(LARGE), torch.randn(256, 96))
    assert counter.get_total_flops() == 2 * 2 * 24 * 20 * 96 * 256


def test_a_traced_model_has_torchs_linear():
    traced = torch.jit.trace(Linear(96, 256).eval(), torch.randn(LARGE))
    assert "mkldnn" not in str(traced.inlined_graph)


def test_compiled_layer_takes_any_number_of_tokens_with_one_compilation():
    counter = CompileCounter()
    layer = torch.compile(Linear(96, 256), backend=counter, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in (20, 90, 200, 4000):
            layer(torch.randn(2, tokens, 96))
    assert counter.frame_count == 1
