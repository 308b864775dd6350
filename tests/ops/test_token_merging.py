"""Token merging: the fast path against the reference, and the reference's own rules."""

import pytest
import torch
from torch import Tensor

from effbackbones.ops import ops_backend, token_merging

CASES = {
    "of 224 px, stage 0": ((784, 1568, 784), (196, 56, 28)),
    "of 224 px, stage 2": ((98, 98), (2, 1)),
    "uneven": ((25, 50, 26), (49, 14, 7)),
    "shorter than a run": ((4, 8, 7), (49, 14, 7)),
    "one token each": ((1, 1), (2, 1)),
}
each_case = pytest.mark.parametrize(("tiers", "runs"), CASES.values(), ids=CASES)


def arguments(tiers: tuple[int, ...], runs: tuple[int, ...], batch: int = 3) -> tuple[Tensor, ...]:
    """Return tokens, an order of each image's own, weights and biases."""
    generator = torch.Generator().manual_seed(0)
    n = sum(tiers)
    x = torch.randn(batch, n, 5, generator=generator, dtype=torch.float64)
    order = torch.rand(batch, n, generator=generator).argsort()
    learned = [torch.randn(1, r, generator=generator, dtype=torch.float64) for r in runs]
    return x, order, *learned, *(torch.randn(1, generator=generator, dtype=torch.float64) for _ in runs)


def merge(backend: str, tiers: tuple[int, ...], x: Tensor, order: Tensor, *learned: Tensor) -> Tensor:
    with ops_backend(backend):
        return token_merging(x, order, tiers, learned[: len(tiers)], learned[len(tiers) :])


@each_case
def test_fast_path_equals_the_reference_forward_and_backward(tiers, runs):
    results = []
    for backend in ("auto", "reference"):
        x, order, *learned = arguments(tiers, runs)
        leaves = [t.requires_grad_() for t in (x, *learned)]
        out = merge(backend, tiers, x, order, *learned)
        (out * torch.arange(out.numel()).reshape(out.shape).cos()).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for fast, reference in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_runs_that_divide_their_tiers_are_weighted_sums_of_sorted_tokens(backend):
    x = torch.tensor([[[10.0], [20.0], [30.0], [40.0], [50.0], [60.0]]])
    order = torch.tensor([[5, 0, 4, 1, 3, 2]])
    weights, biases = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])], [torch.tensor([1.0]), torch.tensor([0.5])]
    with ops_backend(backend):
        merged = token_merging(x, order, (4, 2), weights, biases)
    assert merged.flatten().tolist() == [60 + 2 * 10 + 1, 50 + 2 * 20 + 1, 3 * 40 + 0.5, 3 * 30 + 0.5]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tier_that_runs_do_not_divide_is_stretched_by_repeating_tokens_evenly(backend):
    x = torch.arange(5.0).reshape(1, 5, 1)
    weight = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    with ops_backend(backend):
        merged = token_merging(x, torch.arange(5)[None], (5,), [weight], [torch.zeros(1)])
    # Positions 0 to 7 hold the tokens 0 0 1 1 2 3 3 4.
    assert merged.flatten().tolist() == [1100, 4332]


@each_case
def test_every_token_takes_part_in_its_tier_alone(tiers, runs):
    x, order, *learned = arguments(tiers, runs, batch=1)
    x.requires_grad_()
    out = merge("auto", tiers, x, order, *learned)
    groups = [max(1, -(-n // r)) for n, r in zip(tiers, runs, strict=True)]
    assert out.shape == (1, sum(groups), 5)
    for tier_tokens, tier_out in zip(order.split(tiers, 1), out.split(groups, 1), strict=True):
        (grad,) = torch.autograd.grad(tier_out.sum(), x, retain_graph=True)
        used = grad[0, :, 0].nonzero().flatten().tolist()
        assert used == sorted(tier_tokens[0].tolist())


@each_case
def test_images_of_a_batch_are_merged_on_their_own(tiers, runs):
    x, order, *learned = arguments(tiers, runs)
    together = merge("auto", tiers, x, order, *learned)
    for i in range(len(x)):
        alone = merge("auto", tiers, x[i : i + 1], order[i : i + 1], *learned)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)
