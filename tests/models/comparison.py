"""Our models against literal implementations and fixtures: outputs and gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parity.parity import load_fixture, make_input, subsample
from torch import Tensor

from effbackbones.models._hierarchical import checkpoint_filter_fn

TOLERANCE = 1e-9
State = dict[str, Tensor]


def error(ours: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest value expected."""
    assert ours.shape == expected.shape
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def assert_same_numbers(
    model: Any,
    forward: Callable[[State, Tensor], tuple[Tensor | None, list[Tensor]]],
    state: State,
    size: tuple[int, int],
    batch: int = 2,
) -> None:
    """Compare logits, maps and the gradients of input and parameters with those of a literal implementation.

    Args:
        model: Ours, in float64 and evaluation mode, with the weights of `state`.
        forward: Of official weights and images, the logits (None or ignored in dense mode) and the four maps.
        state: The official weights, constants and statistics among them.
        size: Height and width of the images.
        batch: Images.
    """
    leaves = {k: v.clone().requires_grad_() for k, v in state.items() if v.is_floating_point() and "running_" not in k}
    x, y = (make_input((batch, 3, *size)).requires_grad_() for _ in range(2))
    logits, expected = forward({**state, **leaves}, x)
    last, ours = model.forward_intermediates(y)
    if not model.dense:
        ours, expected = [model.forward_head(last), *ours], [logits, *expected]
    for a, b in zip(ours, expected, strict=True):
        assert error(a, b) < TOLERANCE

    cotangents = [make_input(tuple(b.shape), seed) for seed, b in enumerate(expected, start=1)]
    torch.autograd.backward(ours, cotangents)
    grads = torch.autograd.grad(expected, [x, *leaves.values()], cotangents, allow_unused=True)
    assert error(y.grad, grads[0]) < TOLERANCE
    named = {key: grad for key, grad in zip(leaves, grads[1:], strict=True) if grad is not None}
    by_our_names = checkpoint_filter_fn({key: named.get(key, value) for key, value in state.items()}, model)
    used = checkpoint_filter_fn(
        {key: torch.full_like(value, key in named) if key in leaves else value for key, value in state.items()}, model
    )
    for key, parameter in model.named_parameters():
        if used[key].any():
            # Where a gradient is zero but for rounding (of a key's bias, say), there is nothing to be relative to.
            bound = TOLERANCE * by_our_names[key].abs().max() + 1e-12
            assert (parameter.grad - by_our_names[key]).abs().max() < bound, key
        else:
            assert parameter.grad is None or not parameter.grad.any(), key


def assert_numbers_of_fixture(path: Path, logits: Tensor | None, maps: list[Tensor]) -> None:
    """Compare logits (None or ignored where the fixture has none) and the four maps with those of a fixture."""
    meta, expected = load_fixture(path)
    assert [list(m.shape) for m in maps] == meta["feature_shapes"]
    ours = {f"feature_{i}": subsample(m) for i, m in enumerate(maps)}
    if "logits" in expected:
        assert logits is not None
        ours["logits"] = logits.numpy()
    assert ours.keys() == expected.keys()
    errors = {k: abs(ours[k] - expected[k]).max() / abs(expected[k]).max() for k in expected}
    assert max(errors.values()) < TOLERANCE, errors
