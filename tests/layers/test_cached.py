"""What is kept between calls, and when it is not."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from effbackbones.layers import Cached, constant

calls: list[Any] = []
"""The keys that a value was computed for, in order."""


@pytest.fixture(autouse=True)
def _no_calls():
    calls.clear()


class Squares(Cached):
    """Keeps the squares of its weights, plus a number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, key: int = 0) -> Tensor:
        def compute() -> Tensor:
            calls.append(key)
            return self.weight.square() + key

        return self.kept(key, [self.weight], compute)


@pytest.fixture
def module() -> Squares:
    """Return a module in evaluation mode that keeps a value."""
    module = Squares().eval()
    with torch.no_grad():
        module()
    return module


# Kept values


@torch.no_grad()
def test_value_is_computed_once(module):
    assert module() is module()
    assert calls == [0]


@torch.no_grad()
def test_tuple_is_kept_whole():
    module = Squares().eval()
    a, b = (module.kept("pair", [module.weight], lambda: (module.weight + 1, module.weight + 2)) for _ in range(2))
    assert a is b
    assert torch.equal(a[1], torch.tensor([3.0, 4.0]))


def multiply(module: Squares) -> None:
    module.weight.mul_(3)


def load(module: Squares) -> None:
    module.load_state_dict({"weight": torch.tensor([3.0, 6.0])})


def assign(module: Squares) -> None:
    module.load_state_dict({"weight": torch.tensor([3.0, 6.0])}, assign=True)


def replace(module: Squares) -> None:
    module.weight = nn.Parameter(torch.tensor([3.0, 6.0]))


@pytest.mark.parametrize("change", [multiply, load, assign, replace])
@torch.no_grad()
def test_value_follows_a_change_of_the_weights(module, change):
    change(module)
    assert torch.equal(module(), torch.tensor([9.0, 36.0]))
    module()
    assert calls == [0, 0]


@torch.no_grad()
def test_value_follows_a_step_of_an_optimizer(module):
    module.weight.grad = torch.ones(2)
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert torch.equal(module(), torch.tensor([0.0, 1.0]))


@torch.no_grad()
def test_value_follows_the_dtype(module):
    assert module.double()().dtype == torch.float64
    assert module.float()().dtype == torch.float32


@pytest.mark.parametrize("mode", [True, False])
@torch.no_grad()
def test_change_of_mode_drops_the_value(module, mode):
    module.train(mode)
    module.eval()()
    assert calls == [0, 0]


@torch.no_grad()
def test_value_under_autocast_is_one_of_its_own(module):
    product = torch.eye(2)

    def compute() -> Tensor:
        return product @ module.weight

    for _ in range(2):
        assert module.kept("product", [module.weight], compute).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert module.kept("product", [module.weight], compute).dtype == torch.bfloat16


@torch.no_grad()
def test_oldest_value_goes_first():
    module = Squares().eval()
    for key in (1, 2, 1, 3, 1, 3):
        assert torch.equal(module(key), torch.tensor([1.0, 4.0]) + key)
    assert calls == [1, 2, 3]
    module(2)
    assert calls == [1, 2, 3, 2]


@torch.no_grad()
def test_max_kept_is_that_of_the_class():
    class Three(Squares):
        max_kept = 3

    module = Three().eval()
    for key in (1, 2, 3, 1, 2, 3):
        module(key)
    assert calls == [1, 2, 3]


# Nothing kept


@torch.no_grad()
def test_nothing_is_kept_in_training():
    module = Squares().train()
    assert module() is not module()
    assert calls == [0, 0]


def test_value_that_needs_a_gradient_is_computed_in_every_graph(module):
    for _ in range(2):
        module.weight.grad = None
        module().sum().backward()
        assert torch.equal(module.weight.grad, torch.tensor([2.0, 4.0]))
    assert calls == [0, 0, 0]


def test_value_of_frozen_weights_is_kept_where_gradients_are_on():
    module = Squares().eval().requires_grad_(False)
    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        (module() * x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([2.0, 8.0]))
    assert calls == [0]


@torch.no_grad()
def test_nothing_is_kept_while_compiling(module, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    module(), module()
    assert calls == [0, 0, 0]


@torch.no_grad()
def test_compiled_module_has_no_graph_break(module):
    torch._dynamo.reset()
    compiled = torch.compile(module.forward, fullgraph=True, backend="eager")
    assert torch.equal(compiled(), torch.tensor([1.0, 4.0]))
    module.weight.mul_(3)
    assert torch.equal(compiled(), torch.tensor([9.0, 36.0]))
    torch._dynamo.reset()


@torch.no_grad()
def test_module_without_storage_passes_through():
    module = Squares().to("meta").eval()
    assert module().is_meta
    assert module() is not module()


# Inference mode


def test_value_made_in_inference_mode_takes_part_in_a_graph():
    module = Squares().eval().requires_grad_(False)
    with torch.inference_mode():
        module()
    x = torch.ones(2, requires_grad=True)
    (module() * x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 4.0]))
    assert calls == [0]


def test_weights_made_in_inference_mode_are_not_kept():
    with torch.inference_mode():  # such tensors have no count of changes to go by
        module = Squares().eval()
        module()
        module.weight.mul_(3)
        assert torch.equal(module(), torch.tensor([9.0, 36.0]))


# State


def test_value_is_no_part_of_the_state(module):
    assert list(module.state_dict()) == ["weight"]
    assert not dict(module.named_buffers())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_copy_keeps_nothing_yet_and_then_for_itself(module, duplicate):
    other = duplicate(module)
    assert torch.equal(other(), torch.tensor([1.0, 4.0]))
    assert calls == [0, 0]
    assert module() is not other()
    assert calls == [0, 0]


# Constants of a size


def test_constant_is_made_once_for_each_arguments():
    @constant
    def table(n: int, device: torch.device) -> Tensor:
        """Count."""
        calls.append(n)
        return torch.arange(n, device=device)

    cpu = torch.device("cpu")
    assert table(3, cpu) is table(3, cpu)
    assert torch.equal(table(4, device=cpu), torch.arange(4))
    assert calls == [3, 4]
    assert table.__doc__ == "Count."


def test_constant_made_in_inference_mode_takes_part_in_a_graph():
    @constant
    def ones(n: int) -> Tensor:
        return torch.ones(n)

    with torch.inference_mode():
        made = ones(2)
    x = torch.ones(2, requires_grad=True)
    (x * made).sum().backward()
    assert ones(2) is made
    assert not made.requires_grad


def test_constant_is_traced_while_compiling():
    @constant
    def ones(n: int) -> Tensor:
        return torch.ones(n)

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x * ones(2), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.ones(2))
    torch._dynamo.reset()


def test_at_most_64_constants_are_kept():
    @constant
    def number(n: int) -> int:
        calls.append(n)
        return n

    for n in (*range(65), 64, 1, 0):
        assert number(n) == n
    assert calls == [*range(65), 0]


def test_nothing_is_kept_of_tensors_that_are_faked():
    @constant
    def indices(n: int) -> Tensor:
        return torch.arange(n)

    with FakeTensorMode():
        assert isinstance(indices(3), FakeTensor)
    assert indices(3).tolist() == [0, 1, 2]
    with FakeTensorMode():
        assert isinstance(indices(3), FakeTensor)
