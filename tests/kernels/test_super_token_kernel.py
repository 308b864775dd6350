"""The kernels of super tokens, against the plain PyTorch path in float64."""

import pytest
import torch
from kernel_device import DEVICE

from effbackbones.kernels import super_tokens as module
from effbackbones.ops import super_tokens

SIZES = [  # images, cells, pixels of a cell, channels
    (2, (2, 3), 16, 8),
    (1, (1, 1), 4, 16),
    (1, (3, 2), 64, 70),
]


def pixels(images: int, grid: tuple[int, int], n: int, c: int) -> torch.Tensor:
    return torch.randn(images * grid[0] * grid[1], n, c, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_weights_and_their_sums_are_those_of_the_plain_path(sizes):
    images, grid, _, c = sizes
    x_gnc = pixels(*sizes)
    s_bhwc = x_gnc.mean(1).reshape(images, *grid, c) * 3
    q_gkn, total_gk = module.associate(s_bhwc, x_gnc)
    scores = super_tokens._neighbours(s_bhwc.double() * c**-0.5) @ x_gnc.double().mT
    expected = scores.softmax(1)
    assert (q_gkn - expected).abs().max() < 1e-6
    assert (total_gk - expected.sum(2)).abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 3e-3)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gather_and_spread_and_their_gradients_are_those_of_the_plain_path(sizes, dtype, tolerance):
    images, grid, n, c = sizes
    generator = torch.Generator().manual_seed(1)
    q_gkn = torch.rand(images * grid[0] * grid[1], 9, n, generator=generator).to(DEVICE, dtype)
    x_gnc, s_bhwc = pixels(*sizes).to(dtype), torch.randn(images, *grid, c, generator=generator).to(DEVICE, dtype)
    calls = (
        (lambda x: module.gather(q_gkn, x, *grid), lambda x: super_tokens._collect(q_gkn.double() @ x, grid), x_gnc),
        (
            lambda s: module.spread(q_gkn, s),
            lambda s: q_gkn.double().mT @ super_tokens._neighbours(s),
            s_bhwc,
        ),
    )
    for ours, plain, tensor in calls:
        outcomes = []
        for function, x in ((ours, tensor), (plain, tensor.double())):
            x = x.detach().requires_grad_()
            y = function(x)
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
            outcomes.append((y, *torch.autograd.grad((y * weights).sum(), x)))
        for a, b in zip(*outcomes, strict=True):
            assert (a - b).abs().max() < tolerance * b.abs().max()


def test_trial_call_succeeds():
    module.trial(DEVICE)
