"""The examples that operators are measured with."""

import pytest
import torch

from effbackbones import ops
from effbackbones.bench import Example
from effbackbones.bench.operators import OPERATORS
from effbackbones.ops import ops_backend


def test_every_operator_has_an_example() -> None:
    helpers = {"ResizedBias", "ops_backend", "sample_super_tokens", "use_reference"}
    assert set(OPERATORS) == set(ops.__all__) - helpers | {"attention", "window_attention"}


@pytest.mark.parametrize("size", [(64, 64), (52, 100)])
@pytest.mark.parametrize("name", OPERATORS)
def test_example_gives_the_same_by_either_path(name: str, size: tuple[int, int]) -> None:
    example = Example(2, *size, torch.float64, "cpu", True)
    call = OPERATORS[name](example)
    found = []
    for backend in ("auto", "reference"):
        with ops_backend(backend):
            output = call()
        assert output.shape[0] % 2 == 0
        # An input that the gradient does not reach is none to make.
        found.append([output, *torch.autograd.grad(output.square().mean(), example.tensors)])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
