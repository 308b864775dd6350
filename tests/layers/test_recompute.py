from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from effbackbones.layers import Mlp, ops_backend, recompute, recomputed


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def everything_large(monkeypatch):
    monkeypatch.setattr(recompute, "_LARGE", 1)


def gradients(module, x):
    with Calls() as calls:
        module(x).square().sum().backward()
    found = [p.grad for p in module.parameters()]
    module.zero_grad()
    return found, calls.counts


@pytest.mark.parametrize("pointwise", [False, True])
def test_the_activation_alone_is_computed_twice_and_the_gradients_are_the_same(monkeypatch, pointwise):
    torch.manual_seed(0)
    mlp = Mlp(8, 16, lambda a, b: nn.Conv2d(a, b, 1)) if pointwise else Mlp(8, 16)
    x = torch.randn(2, 8, 5, 5) if pointwise else torch.randn(2, 5, 8)
    expected, plain = gradients(mlp, x)
    monkeypatch.setattr(recompute, "_LARGE", 1)
    found, calls = gradients(mlp, x)

    assert plain["gelu"] == 1
    assert calls["gelu"] == 2
    for name in ("addmm", "convolution"):
        assert calls[name] == plain[name]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_is_kept_is_the_input_alone(everything_large):
    """An output that nothing but the backward pass would keep is freed at once."""
    alive = []

    def function(y):
        z = F.gelu(y)
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(z.untyped_storage()))
        return F.linear(z, torch.ones(3, 4, requires_grad=True))

    out = recomputed(function, torch.randn(5, 4, requires_grad=True))
    assert alive[0].expired()
    out.sum().backward()
    assert len(alive) == 2


def test_dropout_is_the_same_both_times(everything_large):
    x = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(8, 8, requires_grad=True)
    dropped = []

    def function(y):
        dropped.append(F.dropout(y, 0.5))
        return F.linear(dropped[-1], weight)

    recomputed(function, x).sum().backward()
    assert len(dropped) == 2
    assert torch.equal(*dropped)


@pytest.mark.parametrize("where", ["small", "no_grad", "frozen", "reference", "func"])
def test_it_is_computed_once_where_twice_gains_nothing_or_cannot_be(monkeypatch, where):
    monkeypatch.setattr(recompute, "_LARGE", 21 if where == "small" else 1)
    times = []

    def function(y):
        times.append(1)
        return F.gelu(y).square()

    x = torch.randn(5, 4, requires_grad=where != "frozen")
    expected = torch.autograd.functional.jacobian(lambda y: F.gelu(y).square().sum(), x)
    if where == "func":
        torch.testing.assert_close(torch.func.grad(lambda y: recomputed(function, y).sum())(x), expected)
    elif where == "reference":
        with ops_backend("reference"):
            recomputed(function, x).sum().backward()
        torch.testing.assert_close(x.grad, expected)
    elif where == "no_grad":
        with torch.no_grad():
            recomputed(function, x)
    else:
        out = recomputed(function, x).sum()
        if out.requires_grad:
            out.backward()
            torch.testing.assert_close(x.grad, expected)
    assert len(times) == 1


def test_second_derivatives(everything_large):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda y, w: recomputed(lambda z: F.linear(F.gelu(z), w), y), (x, weight))


def test_graph_of_any_batch_is_not_tied_to_a_size():
    """A batch of 2, below the size of a large input, and one that is above it, share a graph."""
    batch = torch.export.Dim("batch", min=1, max=2 * recompute._LARGE)
    mlp = Mlp(8, 16)
    program = torch.export.export(mlp, (torch.randn(2, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 8)
    torch.testing.assert_close(program.module()(x), mlp(x))
