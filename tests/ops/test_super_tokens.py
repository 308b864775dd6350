"""Super-token attention: the fast path, the reference, a literal implementation, and numbers worked out by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import reference_stvit as literal
from torch import Tensor

from effbackbones.ops import ops_backend, sample_super_tokens, super_token_attention
from effbackbones.ops import super_tokens as module

SIZES = ((8, 8), (8, 12), (11, 6), (3, 2), (1, 1), (4, 13), (13, 4))
each_path = pytest.mark.parametrize("path", ["auto", "reference"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refinement(c: int) -> Callable[[Tensor], Tensor]:
    """Return attention among super tokens (B, h, w, C), which mixes all positions and channels."""
    weight = random(c, c, seed=1) / math.sqrt(c)

    def refine(s_bhwc: Tensor) -> Tensor:
        s_bnc = s_bhwc.flatten(1, 2)
        scores = s_bnc @ weight @ s_bnc.transpose(1, 2)
        return (scores.softmax(-1) @ s_bnc @ weight.T).reshape(s_bhwc.shape)

    return refine


def run(path: str, x: Tensor, cell: int, n_iter: int, refine: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the output, and the gradient of the input under a random cotangent."""
    x = x.clone().requires_grad_()
    with ops_backend(path):
        out = super_token_attention(x, cell, n_iter, refine)
    out.backward(random(*out.shape, seed=2))
    return out.detach(), x.grad


def run_literal(x: Tensor, cell: int, n_iter: int, refine: Callable[[Tensor], Tensor], **kwargs: Any) -> Tensor:
    def refine_bchw(s_bchw: Tensor) -> Tensor:
        return refine(s_bchw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    out = literal.super_token_attention(x.permute(0, 3, 1, 2), cell, n_iter, refine_bchw, **kwargs)
    return out.permute(0, 2, 3, 1)


def assert_close(ours: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


@each_path
@pytest.mark.parametrize("n_iter", [1, 2, 3])
@pytest.mark.parametrize("cell", [1, 2, 4, 5])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_output_and_gradient_equal_the_literal_ones(path, size, cell, n_iter):
    x, refine = 2 * random(2, *size, 6), refinement(6)
    out, grad = run(path, x, cell, n_iter, refine)
    x.requires_grad_()
    expected = run_literal(x, cell, n_iter, refine)
    expected.backward(random(*out.shape, seed=2))
    assert_close(out, expected)
    assert_close(grad, x.grad)


@pytest.mark.parametrize("n_iter", [1, 3])
@pytest.mark.parametrize(("size", "cell", "c"), [((56, 56), 8, 16), ((26, 35), 4, 32), ((30, 70), 16, 8)], ids=str)
def test_fast_path_equals_the_reference_on_many_cells(size, cell, c, n_iter):
    x, refine = random(2, *size, c), refinement(c)
    for ours, expected in zip(
        run("auto", x, cell, n_iter, refine), run("reference", x, cell, n_iter, refine), strict=True
    ):
        assert_close(ours, expected)


@each_path
@pytest.mark.parametrize("n_iter", [1, 2])
def test_gradient_is_the_one_with_the_association_held_fixed(path, n_iter):
    x, direction, refine = 2 * random(1, 7, 9, 5), random(1, 7, 9, 5, seed=3), refinement(5)
    out, grad = run(path, x, 4, n_iter, refine)
    cotangent = random(*out.shape, seed=2)
    padded = F.pad(x, (0, 0, 0, 3, 0, 1))
    cells = {(i, j): padded[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten(1, 2) for i in range(2) for j in range(3)}
    fixed = literal.associate(cells, n_iter)

    def slope(**kwargs: Any) -> float:
        ahead, behind = (run_literal(x + h * direction, 4, n_iter, refine, **kwargs) for h in (1e-6, -1e-6))
        return ((ahead - behind) * cotangent).sum().item() / 2e-6

    ours = (grad * direction).sum().item()
    assert ours == pytest.approx(slope(association=fixed), rel=1e-7)
    assert ours != pytest.approx(slope(), rel=1e-3), "the association has no influence here"


@each_path
def test_neighbours_beyond_the_border_take_the_weight_of_score_zero(path):
    x = torch.full((1, 3, 3, 4), 0.5, dtype=torch.float64)  # one cell, whose eight neighbours do not exist
    weight = math.exp(0.5 * 0.5 * 4 / 2) / (math.exp(0.5 * 0.5 * 4 / 2) + 8)
    with ops_backend(path):
        out = super_token_attention(x, 3, 1, lambda s: 3 * s)
    assert_close(out, 3 * weight * x)


@each_path
def test_padding_counts_in_means_and_totals(path):
    x = torch.full((1, 1, 1, 4), 2.0, dtype=torch.float64)  # a cell of this pixel and three of padding
    weight = math.exp(2 * 2 / 4 * 4 / 2) / (math.exp(2 * 2 / 4 * 4 / 2) + 8)
    with ops_backend(path):
        out = super_token_attention(x, 2, 1, lambda s: s)
    assert_close(out, weight * x * weight / (weight + 3 / 9 + 1e-12))


@each_path
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_super_token_that_no_pixel_chooses_gives_finite_numbers(path, dtype):
    x = torch.zeros(1, 2, 6, 16)
    x[:, :, :2], x[:, :, 4:] = 30, -30
    x[:, 0, 2:4], x[:, 1, 2:4] = 30, -30  # the pixels of the cell between, whose mean is 0
    x = x.to(dtype).requires_grad_()
    s_bhwc, q_bhwk = sample_super_tokens(x, 2, 1)
    assert not q_bhwk[0, :, 2:4, 4].any()
    assert not s_bhwc[0, 0, 1].any()
    with ops_backend(path):
        out = super_token_attention(x, 2, 1, lambda s: s + s.mean((1, 2), keepdim=True))
    (out.float().sum() * 2**10).backward()  # scaled, as for float16
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("size", [(8, 12), (7, 9)], ids=str)
def test_samples_are_what_attention_works_with(size):
    x, seen = random(2, *size, 6), []
    out = super_token_attention(x, 4, 2, lambda s: seen.append(s) or s.sin())
    s_bhwc, q_bhwk = sample_super_tokens(x, 4, 2)
    assert torch.equal(s_bhwc, seen[0])
    assert s_bhwc.shape == (2, 2, 3, 6)
    torch.testing.assert_close(q_bhwk.sum(-1), torch.ones(2, *size, dtype=torch.float64))
    y, s = torch.zeros_like(x), F.pad(s_bhwc.sin(), (0, 0, 1, 1, 1, 1))
    for k in range(9):
        around = s[:, k // 3 : k // 3 + 2, k % 3 : k % 3 + 3]
        y += q_bhwk[..., k, None] * around.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : size[0], : size[1]]
    assert_close(y, out)


def test_association_has_no_gradient_and_super_tokens_have():
    s_bhwc, q_bhwk = sample_super_tokens(random(1, 4, 4, 2).requires_grad_(), 2, 1)
    assert s_bhwc.requires_grad
    assert not q_bhwk.requires_grad


@pytest.mark.parametrize(("path", "used"), [("auto", 0), ("reference", 1)])
def test_backend_chooses_the_path(path, used, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_reference", lambda x, *_: calls.append(x) or x)
    with ops_backend(path):
        super_token_attention(random(1, 4, 4, 2), 2, 1, lambda s: s)
    assert len(calls) == used
