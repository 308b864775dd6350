"""Token merging by significance (SG-Former, arXiv 2308.12216): runs of sorted tokens become one token each.

Legend: B images, N tokens of C channels, r tokens of a run, g runs of a tier, M positions of the stretched order.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effbackbones.layers.cached import constant
from effbackbones.layers.reference import use_reference


def token_merging(
    x_bnc: Tensor, order_bn: Tensor, tiers: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """Return sorted tokens merged run by run, (B, sum of g, C): learned weighted sums, the same for all channels.

    The sorted tokens are cut into tiers, and a tier of n tokens into g = max(1, ceil(n / r)) runs. Where r does not
    divide n, the tier is stretched to g r positions first: position t holds its token floor(t n / (g r)), so that
    every token takes part and the weights are used whole.

    x_bnc: (B, N, C). order_bn: the permutation of the tokens that sorts each image, (B, N).
    tiers: tokens of each tier in sorted order, at least one each, N together.
    weights: of the runs of each tier, (1, r). biases: of each tier, (1,).
    """
    function = _reference if use_reference() else _gathered
    return function(x_bnc, order_bn, tuple(tiers), weights, biases)


def runs_of(n: int, r: int) -> int:
    """Return the number of runs of `r` tokens that a tier of `n` tokens is merged in."""
    return max(1, -(-n // r))


def _reference(
    x_bnc: Tensor, order_bn: Tensor, tiers: tuple[int, ...], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    sorted_bnc = x_bnc.gather(1, order_bn.unsqueeze(-1).expand_as(x_bnc))
    merged = []
    for tier_bnc, weight_1r, bias in zip(sorted_bnc.split(tiers, 1), weights, biases, strict=True):
        n, r = tier_bnc.shape[1], weight_1r.shape[1]
        m = runs_of(n, r) * r
        positions = torch.tensor([t * n // m for t in range(m)], device=x_bnc.device)
        runs_bgrc = tier_bnc[:, positions].unflatten(1, (-1, r))
        merged.append((runs_bgrc * weight_1r[0, :, None]).sum(2) + bias)
    return torch.cat(merged, 1)


def _gathered(
    x_bnc: Tensor, order_bn: Tensor, tiers: tuple[int, ...], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    runs = tuple(weight.shape[1] for weight in weights)
    lengths = [runs_of(n, r) * r for n, r in zip(tiers, runs, strict=True)]
    if sum(lengths) > sum(tiers):
        order_bn = order_bn.index_select(1, _stretched(tiers, runs, order_bn.device))
    # An embedding copies whole rows, several times faster than `gather` does.
    first_b1 = torch.arange(x_bnc.shape[0], device=order_bn.device).unsqueeze(1) * x_bnc.shape[1]
    sorted_bmc = F.embedding(order_bn + first_b1, x_bnc.flatten(0, 1))
    merged = []
    for tier_bmc, weight_1r, bias in zip(sorted_bmc.split(lengths, 1), weights, biases, strict=True):
        r = weight_1r.shape[1]
        merged.append((weight_1r @ tier_bmc.unflatten(1, (-1, r))).squeeze(2) + bias)
    return torch.cat(merged, 1)


@constant
def _stretched(tiers: tuple[int, ...], runs: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the sorted position of every position of the stretched order, (M,)."""
    parts, start = [], 0
    for n, r in zip(tiers, runs, strict=True):
        m = runs_of(n, r) * r
        parts.append(start + torch.arange(m, device=device) * n // m)
        start += n
    return torch.cat(parts)
