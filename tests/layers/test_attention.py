"""Softmax attention: every backend against the formula in float64, and the choice between them.

xformers itself needs a GPU. Elsewhere `FakeXformers` stands in for it: the same layout, the same rules, the formula.
"""

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from effbackbones.layers import attention
from effbackbones.layers.attention import Host, aligned_bias, attend, attention_backend, last_backend, why_not

BACKENDS = ("xformers", "sdpa", "plain")
BIAS_SHAPES = [(2, 3, 5, 7), (1, 3, 5, 7), (3, 5, 7), (5, 7), (1, 1, 1, 7), (2, 1, 1, 7), (2, 3, 5, 1), (1, 1)]


def formula(q, k, v, bias=None, scale=None):
    """Return attention by the textbook, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


def inputs(b=2, heads=3, n=5, m=7, d=8, d_v=None, dtype=torch.float64, device="cpu", grad=True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (b, heads, n, d), (b, heads, m, d), (b, heads, m, d_v or d)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_(grad)
        for shape in shapes
    ]


def random_bias(*shape, dtype=torch.float64, device="cpu", grad=True) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return values.to(device, dtype).requires_grad_(grad)


def assert_matches_formula(q, k, v, bias=None, scale=None, tolerance=1e-12):
    """Compare values and every gradient of `attend` with those of the formula, relative to the largest value."""
    leaves = [x for x in (q, k, v, bias) if x is not None and x.requires_grad]
    expected = formula(q, k, v, bias, scale)
    out = attend(q, k, v, bias, scale)
    assert out.shape == (*q.shape[:3], v.shape[-1])
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    cotangent = cotangent.to(expected.device)
    pairs = [(out, expected)]
    if leaves:
        expected_grads = torch.autograd.grad(expected, leaves, cotangent)
        pairs += zip(torch.autograd.grad(out, leaves, cotangent.to(out.dtype)), expected_grads, strict=True)
    for ours, theirs in pairs:
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


class FakeXformers:
    """xformers.ops with `memory_efficient_attention` alone: (B, M, heads, K) layout, CUTLASS's rules for the bias."""

    def __init__(self):
        self.calls: list[dict] = []

    def memory_efficient_attention(self, query, key, value, attn_bias=None, p=0.0, scale=None):
        b, n, heads, _ = query.shape
        self.calls.append({"dtype": query.dtype, "p": p, "scale": scale, "bias": attn_bias})
        assert query.dtype == key.dtype == value.dtype
        for x in (query, key, value):
            assert x.stride(-1) == 1
            assert all(stride * x.element_size() % 16 == 0 for stride in (*x.stride()[:-1], x.storage_offset()))
        if attn_bias is not None:
            assert attn_bias.shape == (b, heads, n, key.shape[1])
            assert attn_bias.dtype == query.dtype
            assert attn_bias.stride(-1) == 1
            assert all(stride % 8 == 0 for stride in (*attn_bias.stride()[:-1], attn_bias.storage_offset()))
        # As in xformers: where none of the three needs a gradient, not even the bias gets one.
        needs_grad = query.requires_grad or key.requires_grad or value.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_grad):
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            out = attention._plain(q, k, v, attn_bias, scale, p)
            return out.transpose(1, 2).contiguous()


@pytest.fixture
def xformers_modules() -> Iterator[None]:
    """Leave sys.modules without xformers, and afterwards as it was."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "xformers"}
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def fake_xformers(monkeypatch, xformers_modules) -> FakeXformers:
    """Let this machine's devices be ones that xformers can serve."""
    fake = FakeXformers()
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)
    monkeypatch.setattr(attention, "_host", lambda device: Host())
    return fake


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> Iterator[str]:
    """Force each backend in turn; the fake xformers serves float64 too, so that it can be compared closely."""
    if request.param == "xformers":
        request.getfixturevalue("fake_xformers")
        monkeypatch.setattr(attention, "why_not", lambda *args, **kwargs: [])
    with attention_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()  # tests that compile share the code of `attend`, whose recompilations are limited


def fresh_module():
    """Run the module's file anew, as an import in a new process would."""
    spec = importlib.util.spec_from_file_location("fresh_attention", attention.__file__)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- values and gradients


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"d": 28, "d_v": 12},
        {"d": 1, "d_v": 12},
        {"n": 1},
        {"m": 1},
        {"b": 1, "heads": 1},
        {"n": 49, "m": 49, "d": 32},
    ],
    ids=str,
)
def test_attend_without_bias_matches_formula(backend, shape):
    assert_matches_formula(*inputs(**shape))
    assert last_backend() == backend


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_attend_with_broadcast_bias_matches_formula(backend, shape):
    assert_matches_formula(*inputs(), random_bias(*shape))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_attend_with_scale_matches_formula(backend, scale):
    assert_matches_formula(*inputs(), random_bias(3, 5, 7), scale=scale)


def test_attend_with_gradient_of_bias_alone_matches_formula(backend):
    assert_matches_formula(*inputs(grad=False), random_bias(3, 5, 7))


def test_attend_with_frozen_bias_matches_formula(backend):
    assert_matches_formula(*inputs(), random_bias(3, 5, 7, grad=False))


def test_attend_without_any_gradient_returns_constant(backend):
    with torch.no_grad():
        out = attend(*inputs(), random_bias(3, 5, 7))
    assert not out.requires_grad
    assert (out - formula(*inputs(), random_bias(3, 5, 7))).abs().max() < 1e-12


def test_attend_with_packed_qkv_matches_formula(backend):
    qkv = torch.randn(2, 9, 3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_matches_formula(*qkv.permute(2, 0, 3, 1, 4))


def test_attend_with_channels_first_inputs_matches_formula(backend):
    assert_matches_formula(*(x.mT.contiguous().mT for x in inputs(grad=False)), random_bias(3, 5, 7))


def test_attend_with_misaligned_slices_matches_formula(backend):
    q, k, v = (torch.cat([x[..., :1], x], -1)[..., 1:] for x in inputs(grad=False))
    assert_matches_formula(q, k, v, random_bias(3, 6, 9)[:, 1:, 2:].detach())


def test_attend_with_bias_of_other_dtype_serves_in_dtype_of_q(backend):
    q, k, v = inputs(dtype=torch.float32)
    bias = random_bias(3, 5, 7)
    out = attend(q, k, v, bias)
    assert out.dtype == torch.float32
    assert (out - formula(q, k, v, bias)).abs().max() < 1e-5


def test_attend_with_boolean_bias_raises():
    with pytest.raises(TypeError, match=r"bias has dtype torch.bool"):
        attend(*inputs(), torch.ones(5, 7, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attend_in_16_bits_beyond_range_of_unscaled_scores_matches_formula(backend, dtype):
    # 64 * 40 * 40 = 102400 overflows float16; an eighth of it does not.
    q, k, v = inputs(d=64, dtype=dtype, grad=False)
    out = attend(q.sign() * 40, k.sign() * 40, v)
    assert (out - formula(q.sign() * 40, k.sign() * 40, v)).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", ["row", "some"])
def test_attend_with_large_negative_bias_is_finite_in_values_and_gradients(backend, dtype, mask):
    q, k, v = inputs(dtype=dtype)
    bias = torch.zeros(1, 1, 5, 7, dtype=dtype)
    bias[..., 0, :] = -6e4 if mask == "row" else 0
    bias[..., 3:] = torch.finfo(dtype).min / 2
    bias.requires_grad_()
    out = attend(q, k, v, bias)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (q, k, v, bias))
    assert out[:, :, 1:].sub(formula(q, k, v, bias)[:, :, 1:]).abs().max() < 0.05


def test_attend_with_infinite_bias_excludes_the_keys(backend):
    q, k, v = inputs()
    bias = torch.zeros(5, 7, dtype=torch.float64)
    bias[:, 4:] = -torch.inf
    assert (attend(q, k, v, bias) - formula(q, k[:, :, :4], v[:, :, :4])).abs().max() < 1e-12


def test_attend_with_dropout_keeps_the_mean_and_follows_the_seed(backend):
    q, k, _ = inputs(b=8, n=32, m=32, grad=False)
    v = torch.ones(8, 3, 32, 8, dtype=torch.float64)

    def seeded(dropout_p):
        torch.manual_seed(0)
        return attend(q, k, v, random_bias(3, 32, 32), dropout_p=dropout_p)

    out = seeded(0.5)
    assert out.shape == v.shape
    assert abs(out.mean() - 1) < 0.02
    assert out.std() > 0.05
    assert torch.equal(out, seeded(0.5))
    assert (seeded(0.0) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_under_autocast_serves_in_autocast_dtype(backend, dtype):
    q, k, v = inputs(dtype=torch.float32)
    bias = random_bias(3, 5, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q.to(dtype), k, v, bias)
    assert out.dtype == torch.bfloat16
    assert (out - formula(q, k, v, bias)).abs().max() < 0.05
    out.sum().backward()
    assert bias.grad.dtype == torch.float32


# ---- aligned_bias


@pytest.mark.parametrize("length", [1, 7, 8, 49])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_aligned_bias_is_equal_with_strides_that_are_multiples_of_8(length, order):
    bias = random_bias(*(torch.Size((3, 5, length))[order.index(i)] for i in range(3))).permute(order)
    assert bias.shape == (3, 5, length)
    result = aligned_bias(bias)
    assert torch.equal(result, bias)
    assert result.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in result.stride()[:-1])


def test_aligned_bias_of_aligned_bias_is_itself():
    bias = aligned_bias(random_bias(3, 5, 7))
    assert aligned_bias(bias) is bias


def test_aligned_bias_of_misaligned_start_is_moved():
    bias = random_bias(4 * 16 + 1, grad=False)[1:].view(4, 16)
    result = aligned_bias(bias)
    assert torch.equal(result, bias)
    assert result.storage_offset() == 0


def test_aligned_bias_passes_the_gradient():
    bias = random_bias(2, 3, 5)
    cotangent = random_bias(2, 3, 5, grad=False)
    aligned_bias(bias).backward(cotangent)
    assert torch.equal(bias.grad, cotangent)


def test_aligned_bias_under_compile_has_no_graph_break():
    bias = random_bias(2, 3, 5)
    result = torch.compile(aligned_bias, fullgraph=True, backend="aot_eager")(bias)
    assert torch.equal(result, bias)
    assert result.stride() == (24, 8, 1)


def test_attend_with_aligned_bias_hands_xformers_its_storage(fake_xformers):
    bias = aligned_bias(random_bias(3, 5, 7, dtype=torch.float32, grad=False))
    attend(*inputs(dtype=torch.float32), bias)
    assert fake_xformers.calls[0]["bias"].data_ptr() == bias.data_ptr()


# ---- which backend can serve


def why_not_xformers(host=Host(), bias=None, **kwargs):  # noqa: B008  (immutable)
    return why_not("xformers", *inputs(**{"dtype": torch.float16} | kwargs), bias, host)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float32, "d": 28},
        {"dtype": torch.float32, "d": 12, "d_v": 8},
        {"d": 64, "d_v": 32, "bias": torch.zeros(7)},
        {"dtype": torch.bfloat16, "host": Host(capability=(12, 0))},
        {"host": Host(capability=(7, 5)), "bias": torch.zeros(7)},
    ],
    ids=str,
)
def test_why_not_xformers_of_fitting_call_is_empty(call):
    assert why_not_xformers(**call) == []


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"host": Host(problems=("no such thing",))}, "no such thing"),
        ({"dtype": torch.float64}, "dtype torch.float64: xformers serves float32, float16 and bfloat16"),
        ({"dtype": torch.bfloat16, "host": Host(capability=(7, 5))}, "bfloat16 needs compute capability 8.0"),
        ({"d": 1, "d_v": 12}, "head dims 12 (q, k) and 12 (v)"),
        ({"d": 28}, "head dims 28 (q, k) and 28 (v): xformers needs multiples of 8 in torch.float16"),
        ({"d_v": 4}, "head dims 8 (q, k) and 4 (v)"),
        ({"d": 30, "dtype": torch.float32}, "multiples of 4 in torch.float32"),
        ({"b": 65536, "heads": 1, "n": 1, "m": 1}, "batch 65536 and heads 1: the kernels' CUDA grid ends at 65535"),
        ({"b": 0}, "a tensor is empty"),
        ({"m": 0}, "a tensor is empty"),
        (
            {"bias": torch.zeros(7), "host": Host(capability=(10, 0))},
            "capability 10.0 xformers has flash attention only",
        ),
        ({"dtype": torch.float32, "host": Host(capability=(10, 0))}, "flash attention only"),
        ({"d": 16, "d_v": 8, "host": Host(capability=(10, 0))}, "flash attention only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_why_not_xformers_of_unfit_call_gives_the_reason(call, reason):
    (found,) = why_not_xformers(**call)
    assert reason in found


def test_why_not_xformers_of_mixed_dtypes_gives_the_reason():
    q, k, v = inputs(dtype=torch.float16)
    (found,) = why_not("xformers", q, k.float(), v, host=Host())
    assert "dtypes torch.float16, torch.float32 and torch.float16" in found


def test_why_not_xformers_under_autocast_judges_the_cast_call():
    q, k, v = inputs(dtype=torch.float32, d=28)
    assert why_not("xformers", q.bfloat16(), k, v, host=Host()) != []
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = why_not("xformers", q.bfloat16(), k, v, host=Host())
    assert "multiples of 8 in torch.bfloat16" in found


def test_why_not_xformers_gives_all_reasons():
    assert len(why_not_xformers(Host(problems=("off",)), dtype=torch.float64, d=3, b=0)) == 4


def test_why_not_xformers_on_cpu_names_the_device():
    (found,) = why_not("xformers", *inputs(dtype=torch.float32))
    assert found == "the tensors are on cpu: xformers serves CUDA devices only"


@pytest.mark.parametrize("name", ["sdpa", "plain"])
def test_why_not_other_backends_is_empty(name):
    assert why_not(name, *inputs(d=3), random_bias(7)) == []


# ---- which backend serves


def test_auto_serves_with_xformers_where_it_can(fake_xformers):
    attend(*inputs(dtype=torch.float32), scale=0.5, dropout_p=0.25)
    assert last_backend() == "xformers"
    assert fake_xformers.calls == [{"dtype": torch.float32, "p": 0.25, "scale": 0.5, "bias": None}]


def test_auto_serves_with_sdpa_where_xformers_cannot(fake_xformers):
    attend(*inputs(dtype=torch.float32, d=6))
    assert last_backend() == "sdpa"
    assert fake_xformers.calls == []


def test_auto_on_cpu_serves_with_sdpa():
    attend(*inputs())
    assert last_backend() == "sdpa"


@pytest.mark.parametrize(
    ("grad", "enabled", "served"), [(True, True, "plain"), (True, False, "sdpa"), (False, True, "sdpa")]
)
def test_auto_on_cpu_serves_a_bias_that_needs_a_gradient_with_plain(grad, enabled, served):
    q, k, v = inputs(grad=True)
    with torch.set_grad_enabled(enabled):
        attend(q, k, v, torch.randn(q.shape[2], k.shape[2], dtype=q.dtype, requires_grad=grad))
    assert last_backend() == served


def test_auto_on_cpu_serves_many_weights_with_sdpa():
    q, k, v = inputs(b=3, heads=11, n=256, m=512, d=2, dtype=torch.float32)  # 4.3 million
    bias = random_bias(11, 256, 512, dtype=torch.float32)
    attend(q, k, v, bias)
    served = [last_backend()]
    attend(q[:2], k[:2], v[:2], bias)  # 2.9 million
    served.append(last_backend())
    attend(q, k, v, bias, dropout_p=0.1)
    assert [*served, last_backend()] == ["sdpa", "plain", "plain"]


def test_forced_xformers_on_cpu_raises_with_call_and_all_reasons():
    with attention_backend("xformers"), pytest.raises(RuntimeError) as error:
        attend(*inputs(d=3))
    message = str(error.value)
    assert "'xformers' is forced but cannot serve q (2, 3, 5, 3)" in message
    assert "the tensors are on cpu" in message
    assert "dtype torch.float64" in message
    assert "head dims 3" in message
    assert "EFFBACKBONES_ATTENTION" in message


@pytest.mark.parametrize("name", ["sdpa", "plain"])
def test_forced_backend_serves_where_xformers_could(fake_xformers, name):
    with attention_backend(name):
        attend(*inputs(dtype=torch.float32))
    assert last_backend() == name
    assert fake_xformers.calls == []


def test_attention_backend_nests_and_restores():
    served = []
    with attention_backend("plain"):
        with attention_backend("sdpa"):
            attend(*inputs())
            served.append(last_backend())
        attend(*inputs())
        served.append(last_backend())
        with attention_backend("auto"):
            attend(*inputs())
            served.append(last_backend())
    attend(*inputs())
    assert [*served, last_backend()] == ["sdpa", "plain", "sdpa", "sdpa"]


def test_attention_backend_restores_after_exception():
    with pytest.raises(ZeroDivisionError), attention_backend("plain"):
        raise ZeroDivisionError
    attend(*inputs())
    assert last_backend() == "sdpa"


def test_attention_backend_of_unknown_name_lists_the_valid_ones():
    expected = "the attention backend is 'flash'; expected one of auto, xformers, sdpa, triton, plain"
    with pytest.raises(ValueError, match=expected), attention_backend("flash"):
        pass


@pytest.mark.parametrize(("value", "served"), [(None, "sdpa"), ("auto", "sdpa"), ("sdpa", "sdpa"), ("plain", "plain")])
def test_environment_variable_chooses_the_backend(monkeypatch, value, served):
    monkeypatch.delenv("EFFBACKBONES_ATTENTION", raising=False)
    if value:
        monkeypatch.setenv("EFFBACKBONES_ATTENTION", value)
    module = fresh_module()
    assert module.last_backend() is None
    module.attend(*inputs())
    assert module.last_backend() == served


def test_environment_variable_with_unknown_name_raises_at_import(monkeypatch):
    monkeypatch.setenv("EFFBACKBONES_ATTENTION", "fast")
    expected = "EFFBACKBONES_ATTENTION is 'fast'; expected one of auto, xformers, sdpa, triton, plain"
    with pytest.raises(ValueError, match=expected):
        fresh_module()


# ---- a bias that needs a gradient, by blocks


@pytest.fixture
def by_blocks(monkeypatch) -> list[tuple]:
    """Let attention go by blocks however small it is; the list has the arguments of each call."""
    calls = []
    apply = attention._BiasedByBlocks.apply

    def record(*args):
        calls.append(args)
        return apply(*args)

    monkeypatch.setattr(attention, "_LEAST_WEIGHTS", 1)
    monkeypatch.setattr(attention, "_LEAST_WINDOW", 1)
    monkeypatch.setattr(attention, "_BLOCK", 250)  # two of a batch of five
    monkeypatch.setattr(attention._BiasedByBlocks, "apply", record)
    return calls


@pytest.mark.parametrize("d_v", [8, 12])
@pytest.mark.parametrize("shape", [*BIAS_SHAPES[1:5], (5, 3, 5, 7), (5, 1, 1, 7), (5, 3, 5, 1), (1, 1)])
def test_blocks_have_values_and_gradients_of_the_formula(by_blocks, shape, d_v):
    assert_matches_formula(*inputs(b=5, d_v=d_v), random_bias(*shape))
    assert_matches_formula(*inputs(b=5, d_v=d_v), random_bias(*shape), scale=0.3)
    assert len(by_blocks) == 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_blocks_in_other_dtypes(by_blocks, dtype, tolerance):
    assert_matches_formula(*inputs(b=5, dtype=dtype), random_bias(3, 5, 7, dtype=dtype), tolerance=tolerance)
    assert len(by_blocks) == 1


def test_blocks_under_autocast_compute_in_its_dtype(by_blocks):
    q, k, v = inputs(b=5, dtype=torch.float32)
    bias = random_bias(3, 5, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v, bias)
        grads = torch.autograd.grad(out.float().square().sum(), (q, k, v, bias))
    assert out.dtype == torch.bfloat16
    expected = torch.autograd.grad(formula(q, k, v, bias).square().sum(), (q, k, v, bias))
    for ours, theirs in zip(grads, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 3e-2 * theirs.abs().max()
    assert len(by_blocks) == 1


def test_blocks_keep_no_weights(by_blocks):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        attend(*inputs(n=50, m=70), random_bias(3, 50, 70))
    assert (2, 3, 50, 8) in saved
    assert (2, 3, 50, 70) not in saved


def test_blocks_serve_torch_func_and_checkpointed_calls(by_blocks):
    leaves = [*inputs(b=5), random_bias(3, 5, 7)]

    def loss(*args):
        return attend(*args).square().sum()

    expected = torch.autograd.grad(formula(*leaves).square().sum(), leaves)
    checkpointed = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    for grads in (torch.func.grad(loss, (0, 1, 2, 3))(*leaves), checkpointed):
        for ours, theirs in zip(grads, expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-12
    assert len(by_blocks) >= 2


def test_blocks_have_no_second_derivative_and_say_so(by_blocks):
    leaves = [*inputs(b=5), random_bias(3, 5, 7)]
    grads = torch.autograd.grad(attend(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grads[0].sum().backward()


# ---- torch.compile and torch.export


@pytest.mark.parametrize("name", ["auto", "xformers", "sdpa", "plain"])
def test_compiled_attend_has_no_graph_break_and_does_not_use_xformers(fake_xformers, name):
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    q, k, v = inputs(dtype=torch.float32)
    bias = random_bias(3, 5, 7, dtype=torch.float32)
    with attention_backend(name):
        out = compiled(q, k, v, bias)
    assert (out - formula(q, k, v, bias)).abs().max() < 1e-5
    assert fake_xformers.calls == []


def test_compiled_attend_follows_a_change_of_backend():
    graphs = []

    def record(graph, example_inputs):
        graphs.append({node.target for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(attend, fullgraph=True, backend=record)
    compiled(*inputs())
    with attention_backend("plain"):
        compiled(*inputs())
    assert len(graphs) == 2
    assert torch.nn.functional.scaled_dot_product_attention in graphs[0]
    assert torch.nn.functional.scaled_dot_product_attention not in graphs[1]


@pytest.mark.parametrize("name", ["auto", "plain"])
@pytest.mark.parametrize("grad", [True, False])
def test_compiled_attend_has_the_gradients_of_the_formula(name, grad):
    q, k, v = inputs(grad=grad)
    bias = random_bias(3, 5, 7)
    leaves = [x for x in (q, k, v, bias) if x.requires_grad]
    with attention_backend(name):
        out = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v, bias)
    expected = torch.autograd.grad(formula(q, k, v, bias).square().sum(), leaves)
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), leaves), expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(random_bias(3, 7, 7, dtype=torch.float32, grad=False))

    def forward(self, x):
        return attend(x, x * 2, x + 1, aligned_bias(self.bias))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["auto", "plain"])
def test_exported_attend_serves_a_dynamic_batch_without_xformers(fake_xformers, name, strict):
    module = Attention()
    q = inputs(n=7, dtype=torch.float32, grad=False)[0]
    with attention_backend(name):
        program = torch.export.export(module, (q,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
    assert fake_xformers.calls == []
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("scaled_dot_product_attention" in target for target in targets) == (name == "auto")
    x = torch.cat([q, q.flip(0), q])
    assert (program.module()(x) - formula(x, x * 2, x + 1, module.bias)).abs().max() < 1e-5


# ---- xformers itself, and the report


def write_xformers(folder: Path, version: str = "0.0.35", extra: str = "", operator: str = "'kernel'") -> None:
    """Write a package that looks like xformers whose C++ extension does not load: it warns, and serves no CUDA."""
    fmha = folder / "xformers" / "ops" / "fmha"
    fmha.mkdir(parents=True)
    warn = "import logging; logging.getLogger('xformers').warning('cannot load C++ extensions')"
    (folder / "xformers" / "__init__.py").write_text(f"{warn}\n__version__ = {version!r}\n{extra}\n")
    (folder / "xformers" / "ops" / "__init__.py").write_text("")
    (fmha / "__init__.py").write_text("")
    (fmha / "common.py").write_text("_built_with_cuda = False\n")
    (fmha / "cutlass.py").write_text(f"class FwOp:\n    OPERATOR = {operator}\n")


@pytest.fixture
def packages(tmp_path, monkeypatch, xformers_modules) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_import_of_xformers_is_quiet_and_opens_cuda(packages, caplog):
    write_xformers(packages)
    assert attention._import_problem.__wrapped__() == ""
    assert caplog.records == []
    assert sys.modules["xformers.ops.fmha.common"]._built_with_cuda is True


def test_import_of_xformers_without_fitting_kernels_leaves_cuda_closed(packages):
    write_xformers(packages, operator="None")
    assert attention._import_problem.__wrapped__() == ""
    assert sys.modules["xformers.ops.fmha.common"]._built_with_cuda is False


def test_import_of_other_xformers_version_is_a_problem(packages):
    write_xformers(packages, version="0.0.36")
    assert attention._import_problem.__wrapped__() == "xformers 0.0.36 is installed; expected 0.0.35"


def test_import_of_broken_xformers_is_a_problem(packages):
    write_xformers(packages, extra="raise OSError('libcudart.so.12')")
    assert attention._import_problem.__wrapped__() == "xformers does not import: OSError: libcudart.so.12"


def test_import_of_missing_xformers_says_how_to_install(monkeypatch, xformers_modules):
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert attention._import_problem.__wrapped__() == "xformers is not installed: pip install 'effbackbones[xformers]'"


def test_attend_on_cpu_does_not_import_xformers(packages):
    write_xformers(packages)
    module = fresh_module()
    module.attend(*inputs())
    module.why_not("xformers", *inputs())
    assert "xformers" not in sys.modules


@pytest.mark.parametrize("failure", ["", "no kernel image is available"])
def test_cuda_device_serves_xformers_where_its_trial_call_works(monkeypatch, caplog, failure):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_import_problem", lambda: "")
    monkeypatch.setattr(attention, "_failure", lambda backend, device, host: failure)
    host = attention._host.__wrapped__(torch.device("cuda", 0))
    assert host == Host((failure,) if failure else (), (9, 0))
    assert [record.getMessage() for record in caplog.records] == (
        [f"xformers attention is off on cuda:0: {failure}"] if failure else []
    )


def test_cuda_device_without_xformers_is_no_warning(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_import_problem", lambda: attention._NOT_INSTALLED)
    assert attention._host.__wrapped__(torch.device("cuda", 0)).problems == (attention._NOT_INSTALLED,)
    assert caplog.records == []


def test_trial_calls_cover_both_kernels_and_leave_no_trace(fake_xformers):
    before, state = last_backend(), torch.get_rng_state()
    with torch.inference_mode():
        assert attention._failure("xformers", torch.device("cpu"), Host()) == ""
    assert [(call["dtype"], call["bias"] is not None) for call in fake_xformers.calls] == [
        (torch.float16, False),
        (torch.float32, True),
    ]
    assert last_backend() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_trial_call_that_raises_returns_the_error(fake_xformers, monkeypatch):
    def broken(*args):
        raise NotImplementedError("no operator found")

    monkeypatch.setattr(fake_xformers, "memory_efficient_attention", broken)
    failure = attention._failure("xformers", torch.device("cpu"), Host())
    assert failure == "a trial call raised NotImplementedError: no operator found"


def test_attention_report_on_cpu_names_what_works(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention.attention_report() == {
        "xformers": "the tensors are on cpu: xformers serves CUDA devices only",
        "sdpa": "works",
        "triton": "serves CUDA devices only",
        "plain": "works",
    }


# ---- the real kernels

CUDA_TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CUDA_TOLERANCE, ids=str)
@pytest.mark.parametrize("bias_shape", [None, (1, 3, 49, 49), (2, 3, 49, 49), (3, 49, 49), (1, 1, 1, 49)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_attend_on_cuda_matches_formula(name, bias_shape, dtype):
    bias = random_bias(*bias_shape, dtype=dtype, device="cuda") if bias_shape else None
    with attention_backend(name):
        assert_matches_formula(*inputs(n=49, m=49, d=32, dtype=dtype, device="cuda"), bias, None, CUDA_TOLERANCE[dtype])
    assert last_backend() == name


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [{"n": 1}, {"m": 1}, {"d": 64, "d_v": 32}, {"b": 1, "heads": 1}], ids=str)
def test_attend_on_cuda_of_odd_shape_matches_formula(name, shape):
    q, k, v = inputs(**{"d": 32} | shape, dtype=torch.float16, device="cuda")
    bias = random_bias(q.shape[2], k.shape[2], dtype=torch.float16, device="cuda")
    with attention_backend(name):
        assert_matches_formula(q, k, v, bias, tolerance=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_attend_on_cuda_with_gradient_of_bias_alone_matches_formula(name):
    bias = random_bias(3, 5, 7, dtype=torch.float32, device="cuda")
    with attention_backend(name):
        assert_matches_formula(*inputs(dtype=torch.float32, device="cuda", grad=False), bias, tolerance=5e-3)


@pytest.mark.gpu
def test_auto_on_cuda_serves_head_dim_28_in_float16_with_sdpa():
    assert_matches_formula(*inputs(d=28, dtype=torch.float16, device="cuda"), tolerance=1e-2)
    assert last_backend() == "sdpa"


@pytest.mark.gpu
def test_attend_on_cuda_under_autocast_serves_a_float32_bias_with_xformers():
    q, k, v = inputs(n=49, m=49, d=32, dtype=torch.float32, device="cuda")
    bias = random_bias(3, 49, 49, dtype=torch.float32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = attend(q, k, v, bias)
    assert last_backend() == "xformers"
    assert out.dtype == torch.bfloat16
    assert (out - formula(q, k, v, bias)).abs().max() < 0.08


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_attend_on_cuda_with_dropout_keeps_the_mean(name):
    q, k, _ = inputs(b=8, n=64, m=64, d=32, dtype=torch.float16, device="cuda")
    v = torch.ones(8, 3, 64, 32, dtype=torch.float16, device="cuda")
    torch.manual_seed(0)
    with attention_backend(name):
        out = attend(q, k, v, dropout_p=0.5)
    out.sum().backward()
    assert abs(out.float().mean() - 1) < 0.02
    assert q.grad.isfinite().all()


@pytest.mark.gpu
def test_attention_report_on_cuda_says_that_all_work():
    assert set(attention.attention_report().values()) == {"works"}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "biased"])
def test_one_key_gives_its_value_and_no_gradient_to_scores(with_bias, compiled):
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 1, 1))
    bias = torch.randn(3, 5, 1, requires_grad=True) if with_bias else None
    function = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    out = function(q, k, v, bias)
    assert torch.equal(out, v.expand(2, 3, 5, 8))
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    torch.testing.assert_close(v.grad, weights.sum(2, keepdim=True))
    for x in (q, k, bias) if with_bias else (q, k):
        assert torch.equal(x.grad, torch.zeros_like(x))
