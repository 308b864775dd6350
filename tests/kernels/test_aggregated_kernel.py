"""The kernels of aggregated attention, against the reference in float64."""

from typing import Any

import pytest
import torch
from kernel_device import DEVICE
from torch import Tensor

from effbackbones.kernels import aggregated_attention as module
from effbackbones.ops.aggregated_attention import _reference

SIZES = [  # images, heads, channels, map, pooled map
    (2, 2, 6, (4, 5), (2, 2)),
    (1, 1, 24, (9, 11), (3, 2)),
    (1, 2, 16, (1, 3), (1, 1)),
    (1, 1, 8, (6, 13), (9, 8)),
]


def example(images: int, heads: int, d: int, grid: tuple[int, int], pool: tuple[int, int]) -> list[Tensor]:
    generator, n, p = torch.Generator().manual_seed(0), grid[0] * grid[1], pool[0] * pool[1]
    shapes = [(images, heads, d, n)] * 4 + [(images, heads, d, p)] * 2 + [(heads, 9), (heads, d, 9), (heads, 9)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    # As the model has it: windows of a table of offsets, which overlap.
    table = torch.randn(heads, grid[0] + 2 * pool[0] - 2, grid[1] + 2 * pool[1] - 2, generator=generator)
    return [tensor.to(DEVICE) for tensor in (*tensors, table)]


def outcome(function: Any, tensors: list[Tensor], grid: tuple[int, int], **kwargs: Any) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    bias = leaves[-1].unfold(1, grid[0], 2).unfold(2, grid[1], 2)
    y = function(grid, *leaves[:-1], bias, **kwargs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad((y * weights).sum(), leaves)]


def by_kernels(grid: tuple[int, int], *inputs: Tensor, exact: bool) -> Tensor:
    q, q_unit, k, v, k_pool, v_pool, bias, tokens, token_bias, pool_bias = inputs
    more = tokens.mT @ q_unit + token_bias.unsqueeze(-1)
    return module.aggregated_attention(q, k, v, k_pool, v_pool, bias, more, pool_bias, grid, exact=exact)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "tf32"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_and_gradients_are_those_of_the_reference(sizes, exact):
    tensors, grid = example(*sizes), sizes[3]
    ours = outcome(by_kernels, tensors, grid, exact=exact)
    expected = outcome(_reference, [tensor.double() for tensor in tensors], grid)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < (5e-5 if exact else 1e-2) * b.abs().max()


def test_gradients_are_the_same_in_every_run():
    tensors = example(*SIZES[0])
    pairs = zip(*(outcome(by_kernels, tensors, (4, 5), exact=True) for _ in range(2)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_values_of_16_bits_that_are_a_part_of_a_tensor_are_read_where_they_lie():
    tensors, grid = example(*SIZES[0]), SIZES[0][3]
    k, v = torch.cat(tensors[2:4], 1).bfloat16().chunk(2, 1)
    tensors[2], tensors[3], tensors[5] = k.float(), v, tensors[5].bfloat16()
    assert not v.is_contiguous()
    ours = outcome(by_kernels, tensors, grid, exact=False)
    assert [x.dtype for x in ours] == [v.dtype, *(x.dtype for x in tensors)]
    expected = outcome(_reference, [tensor.double() for tensor in tensors], grid)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < 2e-2 * b.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_operator_is_fit_for_compilation():
    q, _, k, v, k_pool, v_pool, bias, *_ = (tensor.requires_grad_() for tensor in example(1, 1, 4, (2, 2), (1, 1)))
    more, pool_bias = (
        torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((1, 1, 9, 4), (1, 1, 1, 2, 2))
    )
    inputs = (q, k, v, k_pool, v_pool, bias, more, pool_bias, 2, 2, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(module._operator, inputs, test_utils=tests).values()) == {"SUCCESS"}


def test_trial_call_succeeds():
    module.trial(DEVICE)
