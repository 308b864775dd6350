"""Aggregated attention: the fast path against the reference, forward and backward, and the reference against a loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effbackbones.ops import ResizedBias, aggregated_attention, ops_backend
from effbackbones.ops import aggregated_attention as public
from effbackbones.ops.aggregated_attention import _Aggregation

NAMES = ("q", "q_unit", "k", "v", "k_pool", "v_pool", "bias", "tokens", "token_bias", "pool_bias")
CASES = [
    ((5, 7), (2, 3)),
    ((8, 8), (2, 2)),
    ((1, 1), (1, 1)),
    ((1, 6), (1, 2)),
    ((6, 1), (3, 1)),
    ((2, 2), (2, 2)),
    ((9, 4), (7, 7)),  # a pooled map of a fixed size, larger than the map
]


def inputs(grid: tuple[int, int], pool: tuple[int, int], b: int = 2, h: int = 3, d: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    n, p = math.prod(grid), math.prod(pool)
    shapes = [(b, h, d, n)] * 4 + [(b, h, d, p)] * 2 + [(h, 9), (h, d, 9), (h, 9), (h, *pool, *grid)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def results(tensors: list[Tensor], grid: tuple[int, int], backend: str = "auto") -> tuple[Tensor, ...]:
    """Return the output and the gradients of all inputs."""
    with ops_backend(backend):
        y = aggregated_attention(*tensors, grid)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad(y, tensors, cotangent)


def assert_same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-12) -> None:
    for name, a, b in zip(("output", *NAMES), ours, expected, strict=True):
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()), name


@pytest.mark.parametrize(("grid", "pool"), CASES, ids=str)
@torch.no_grad()
def test_reference_is_the_definition_token_by_token(grid, pool):
    q, q_unit, k, v, k_pool, v_pool, bias, tokens, token_bias, pool_bias = tensors = inputs(grid, pool, b=1, h=1)
    expected = torch.zeros_like(q)
    for y in range(grid[0]):
        for x in range(grid[1]):
            n = y * grid[1] + x
            cells = {}
            for o in range(9):
                cell_y, cell_x = y + o // 3 - 1, x + o % 3 - 1
                if 0 <= cell_y < grid[0] and 0 <= cell_x < grid[1]:
                    cells[o] = cell_y * grid[1] + cell_x
            logits = [q[0, 0, :, n] @ k[0, 0, :, m] + bias[0, o] for o, m in cells.items()]
            logits += list(q[0, 0, :, n] @ k_pool[0, 0] + pool_bias[0, :, :, y, x].flatten())
            weights = torch.stack(logits).softmax(0)
            for weight, (o, m) in zip(weights, cells.items(), strict=False):
                more = q_unit[0, 0, :, n] @ tokens[0, :, o] + token_bias[0, o]
                expected[0, 0, :, n] += (weight + more) * v[0, 0, :, m]
            expected[0, 0, :, n] += v_pool[0, 0] @ weights[len(cells) :]
    with ops_backend("reference"):
        ours = aggregated_attention(*tensors, grid)
    assert (ours - expected).abs().max() < 1e-12


@pytest.mark.parametrize("stripe", [2**19, 1], ids=["whole", "stripes"])
@pytest.mark.parametrize(("grid", "pool"), [*CASES, ((24, 30), (3, 4))], ids=str)
def test_fast_path_and_its_gradients_equal_the_reference(grid, pool, stripe, monkeypatch):
    monkeypatch.setitem(public.__globals__, "_STRIPE", stripe)
    tensors = inputs(grid, pool)
    assert_same(results(tensors, grid), results(tensors, grid, "reference"))


def test_large_map_goes_by_stripes_of_rows_on_the_cpu():
    stripes = public.__globals__["_stripes"]
    q, k_pool = torch.empty(1, 3, 24, 128 * 128), torch.empty(1, 3, 24, 256)
    rows = stripes((128, 128), q, k_pool)
    assert len(rows) > 8
    assert [first for first, _ in rows] == [0, *(end for _, end in rows[:-1])]
    assert rows[-1][1] == 128
    assert stripes((128, 128), q.to("meta"), k_pool) == [(0, 128)]


@pytest.mark.parametrize(("grid", "pool"), [((3, 2), (1, 2)), ((1, 3), (1, 1))], ids=str)
def test_gradients_are_those_of_finite_differences(grid, pool):
    tensors = inputs(grid, pool, b=2, h=1, d=2)
    assert torch.autograd.gradcheck(lambda *x: aggregated_attention(*x, grid), tensors)


def test_second_derivatives_are_those_of_finite_differences():
    tensors = inputs((2, 3), (1, 2), b=1, h=1, d=2)
    assert torch.autograd.gradgradcheck(lambda *x: aggregated_attention(*x, (2, 3)), tensors)


def test_inputs_of_any_strides_are_taken():
    grid, pool = (4, 6), (2, 3)
    tensors = inputs(grid, pool)
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in tensors]
    assert not any(x.is_contiguous() for x in strided)
    assert_same(results(strided, grid), results(tensors, grid))


def test_bias_may_be_a_view_of_a_table():
    grid, pool = (4, 6), (2, 3)
    tensors, grads = inputs(grid, pool), []
    table = torch.randn(3, 6, 10, dtype=torch.float64, requires_grad=True)
    for backend in ("auto", "reference"):
        tensors[-1] = table.unfold(1, 4, 2).unfold(2, 6, 2)
        with ops_backend(backend):
            y = aggregated_attention(*tensors, grid)
        grads += torch.autograd.grad(y.square().sum(), table)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    assert grads[0].abs().min() > 0


def made_of(grid: tuple[int, int], pool: tuple[int, int], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a table with a gradient, and the rows and columns that resize it."""
    generator = torch.Generator().manual_seed(2)
    shapes = (heads, 5, 6), (pool[0], grid[0], 5), (pool[1], grid[1], 6)
    table, rows, cols = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return table.requires_grad_(), rows, cols


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("stripe", [2**19, 1], ids=["whole", "stripes"])
@pytest.mark.parametrize(("grid", "pool"), [*CASES, ((24, 30), (3, 4))], ids=str)
def test_resized_bias_gives_what_it_gives_laid_out(grid, pool, stripe, backend, monkeypatch):
    monkeypatch.setitem(public.__globals__, "_STRIPE", stripe)
    (*tensors, _), (table, rows, cols) = inputs(grid, pool), made_of(grid, pool, 3)
    found = []
    for bias in (ResizedBias(table, rows, cols), torch.einsum("iya,hab,jxb->hijyx", rows, table, cols)):
        with ops_backend(backend):
            y = aggregated_attention(*tensors, bias, grid)
        found.append((y, *torch.autograd.grad(y.square().sum(), (*tensors, table))))
    assert_same(*found)


def test_second_derivatives_of_a_resized_bias_are_those_of_finite_differences():
    (*tensors, _), (table, rows, cols) = inputs((2, 3), (1, 2), b=1, h=1, d=2), made_of((2, 3), (1, 2), 1)

    def function(*x: Tensor) -> Tensor:
        return aggregated_attention(*x[:-1], ResizedBias(x[-1], rows, cols), (2, 3))

    assert torch.autograd.gradgradcheck(function, (*tensors, table))


def test_values_far_from_zero_stay_finite():
    grid, pool = (4, 6), (2, 3)
    tensors = [x.detach().float() for x in inputs(grid, pool)]
    tensors[0] = tensors[0] * 1e4
    tensors = [x.requires_grad_() for x in tensors]
    assert all(x.isfinite().all() for x in results(tensors, grid))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_float32_and_returns_the_dtype_of_values(dtype):
    grid, pool = (4, 6), (2, 3)
    full = [x.detach().float() for x in inputs(grid, pool)]
    for i in (3, 5):
        full[i] = full[i].to(dtype).float()
    mixed = [x.to(dtype) if i in (3, 5) else x for i, x in enumerate(full)]
    for backend in ("auto", "reference"):
        with ops_backend(backend):
            expected = aggregated_attention(*full, grid)
            with torch.autocast("cpu", dtype):
                ours = aggregated_attention(*mixed, grid)
        assert ours.dtype == dtype
        assert torch.equal(ours, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_backward_under_autocast_computes_in_float32(dtype):
    grid, pool = (4, 6), (2, 3)
    tensors = [x.detach().float().requires_grad_() for x in inputs(grid, pool)]
    expected = results(tensors, grid)
    with torch.autocast("cpu", dtype):
        assert_same(results(tensors, grid), expected, tolerance=0)


def test_inputs_are_all_that_the_backward_pass_keeps():
    grid, pool = (24, 24), (6, 6)
    tensors, kept = inputs(grid, pool), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        aggregated_attention(*tensors, grid)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in tensors}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiled_operator_has_no_graph_break_and_equal_gradients(backend):
    grid, pool = (5, 7), (2, 3)
    tensors = inputs(grid, pool)
    expected = results(tensors, grid)
    torch._dynamo.reset()
    with ops_backend(backend):
        compiled = torch.compile(aggregated_attention, fullgraph=True, backend="aot_eager")
        y = compiled(*tensors, grid)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert_same((y, *torch.autograd.grad(y, tensors, cotangent)), expected)
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_operator_without_gradients_has_no_graph_break():
    grid = (5, 7)
    tensors = inputs(grid, (2, 3))
    torch._dynamo.reset()
    compiled = torch.compile(aggregated_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors, grid), aggregated_attention(*tensors, grid))
    torch._dynamo.reset()


def test_meta_tensors_give_the_shape():
    tensors = [x.detach().to("meta") for x in inputs((4, 6), (2, 3))]
    assert aggregated_attention(*tensors, (4, 6)).shape == (2, 3, 4, 24)


def test_reference_is_chosen_by_the_backend(monkeypatch):
    def refuse(*args: object) -> None:
        raise AssertionError("the fast path was taken")

    monkeypatch.setattr(_Aggregation, "forward", refuse)
    tensors = [F.normalize(x.detach(), dim=-1) for x in inputs((4, 6), (2, 3))]
    with ops_backend("reference"):
        assert aggregated_attention(*tensors, (4, 6)).isfinite().all()
    with pytest.raises(AssertionError, match="fast path"):
        aggregated_attention(*tensors, (4, 6))
