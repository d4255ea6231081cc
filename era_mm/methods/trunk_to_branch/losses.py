"""Decorrelation, and the ramp.

Legend: N samples over all ranks, K peers, D numbers of an embedding.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor

from ...layers import full_precision


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over the ranks, and its derivative.

    Every rank's loss depends on every rank's summand, so the gradient of a
    summand is the sum of what all ranks hand back. DDP then averages the
    parameters' gradients, so the mean of the ranks' losses is minimised.
    torch's own (torch.distributed.nn.functional) is deprecated.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        all_reduce(total)
        return total


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    return _SumOverRanks.apply(tensor) if get_world_size() > 1 else tensor


def _pairs(embeddings: Sequence[Tensor]) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(len(embeddings)), 2))


def mean_squared_correlation(
    embeddings: Sequence[Tensor], eps: float = 1e-5
) -> Tensor:
    """Mean squared correlation between the numbers of different peers.

        E_k  = (e_k - mean) / sqrt(var + eps)         over the samples
        C_kj = E_k^T E_j / N                          D x D
        out  = 2 / (K (K - 1)) * sum_{k < j} ||C_kj||_F^2 / D^2

    0 for independent peers, at most 1; 0 for a single peer, and for a single
    sample, which has no correlation. Of N independent
    samples it is about 1 / N by chance. Mean, variance and C are those of the
    samples of all ranks together; ranks may hold different numbers of them.

    Source: Trunk-to-Branch has a decorrelation loss [paper]; the formula is
    [inference], after cross-correlation as in Barlow Twins, arXiv 2103.03230.
    Statistics over the ranks are [ours].

    Args:
        embeddings: One per peer.
        eps: Added to the variance, so that a number that never changes counts
            as uncorrelated.

    Shape:
        - embeddings: K of ``(N, D)``
        - out: scalar
    """
    if len(embeddings) < 2:
        return embeddings[0].new_zeros(())
    # Products in half precision would lose small correlations.
    with torch.autocast(embeddings[0].device.type, enabled=False):
        stacked = full_precision(torch.stack(list(embeddings)))
        num_peers, count, width = stacked.shape
        counts = stacked.new_full((num_peers, 1), count)
        sums = _sum_over_ranks(torch.cat([stacked.sum(dim=1), counts], dim=1))
        total = sums[0, -1].detach()
        centred = stacked - (sums[:, :-1] / total).unsqueeze(1)
        pairs = _pairs(embeddings)
        moments = [centred.square().sum(dim=1)]
        moments += [centred[k].t() @ centred[j] for k, j in pairs]
        moments_of_all = _sum_over_ranks(torch.cat(moments)) / total
        deviations = (moments_of_all[:num_peers] + eps).sqrt()
        products = moments_of_all[num_peers:].reshape(-1, width, width)
        scales = torch.stack(
            [torch.outer(deviations[k], deviations[j]) for k, j in pairs]
        )
        return (products / scales).square().mean()


def ramp_factor(step: float, length: float) -> float:
    """The factor of L_ensemble: small while the peers know little.

        w(t) = exp(-5 (1 - min(t, length) / length)^2)

    Source: ONE, arXiv 1806.04606 [official code], where t counts epochs and
    ``length`` is 80 of 300. 1 for ``length=0``.

    Args:
        step: t.
        length: Where it reaches 1, in the unit of ``step``.
    """
    if not length:
        return 1.0
    return math.exp(-5 * (1 - min(step, length) / length) ** 2)
