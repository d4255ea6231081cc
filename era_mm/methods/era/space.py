"""The teacher's normalised feature space, measured on the first batches.

Legend: N batch, C_t channels of the teacher, L levels, * any spatial
dimensions.
"""

from collections.abc import Sequence

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from ...layers import FirstBatches, Measured

#: Lower bound of a channel's deviation relative to its level's: smaller ones
#: are mainly noise and are not scaled up further.
LEAST_SHARE = 0.1
#: A level whose deviation is a smaller share of its mean is constant up to
#: the rounding of float16, 4.9e-4; root mean squares over its channels.
LEAST_SPREAD = 5e-4


class FeatureSpace(Measured, nn.Module):
    """Mean and standard deviation of the teacher's feature.

        x  ->  (x - mean_lc) / std_lc            level l, channel c

    Both are measured over all positions of the first ``num_batches`` batches
    of all ranks, then fixed; they are saved and resumed as buffers. So
    training in this space does not depend on the scale of the teacher's
    features, and a mean squared error is the unexplained share of the
    teacher's variance.

    If a channel's deviation is less than a tenth of its level's root mean
    square, it is divided by that tenth instead, because a dead channel has no
    variance. Shares refer to the resulting variance of the level
    (``share_weights``). A level that is constant up to rounding (deviation
    below 5e-4 of its mean, both as root mean squares) is divided by its mean:
    rounding is no scale for what may come. A level with a single value so
    far, as in a first batch of one image, has no variance yet: its
    ``share_weights`` is 0 until it has.

    Source: ours. PKD (arXiv 2207.02039) normalises each batch separately, so
    an estimate could not be mapped back.

    Args:
        channels: C_t of each level.
        num_batches: Number of batches for the statistics.
    """

    def __init__(self, channels: Sequence[int], num_batches: int = 20) -> None:
        super().__init__()
        self.num_levels = len(channels)
        self.first_batches = FirstBatches(num_batches)
        for level, width in enumerate(channels):
            # In double precision: sums of many values.
            self.register_buffer(
                f'moments{level}', torch.zeros(2 * width + 1).double()
            )
            self.register_buffer(f'mean{level}', torch.zeros(width))
            self.register_buffer(f'std{level}', torch.ones(width))
        self.register_buffer('share_weights', torch.ones(len(channels)))

    @torch.no_grad()
    def update(self, feats: Sequence[Tensor]) -> None:
        """Add a batch to the statistics; no effect once they are fixed.

        A batch whose features are not finite, on any rank, is left out.

        Shape:
            - feats: L of ``(N, C_t, *)``
        """
        if self.first_batches.are_over:
            return
        by_level = []
        for feat in feats:
            dims = [0, *range(2, feat.dim())]
            var, mean = torch.var_mean(feat.float(), dims, correction=0)
            var, mean = var.double(), mean.double()
            number = feat.numel() // feat.shape[1]
            # Moments add up over batches and ranks alike.
            moments = number * torch.cat(
                [mean, var + mean**2, mean.new_ones(1)]
            )
            all_reduce(moments)
            by_level.append(moments)
        if self.first_batches.count(*by_level):
            for level, moments in enumerate(by_level):
                self._set(level, self.get_buffer(f'moments{level}') + moments)

    def _set(self, level: int, moments: Tensor) -> None:
        first, second = (moments[:-1] / moments[-1]).chunk(2)
        var = (second - first**2).clamp(min=0)
        spread = float(var.mean().sqrt())
        size = float((first**2).mean().sqrt())
        if spread > LEAST_SPREAD * size:
            std = var.sqrt().clamp(min=LEAST_SHARE * spread)
            weight = 1 / float((var / std**2).mean())
        else:
            # Nothing to explain; avoid 0 / 0.
            std = torch.full_like(var, size or 1.0)
            weight = 1.0
        self.get_buffer(f'moments{level}').copy_(moments)
        self.get_buffer(f'mean{level}').copy_(first)
        self.get_buffer(f'std{level}').copy_(std)
        self.share_weights[level] = weight if float(moments[-1]) > 1 else 0.0

    def reset(self) -> None:
        """Back to mean 0 and deviation 1."""
        for level in range(self.num_levels):
            self.get_buffer(f'moments{level}').zero_()
            self.get_buffer(f'mean{level}').zero_()
            self.get_buffer(f'std{level}').fill_(1.0)
        self.share_weights.fill_(1.0)

    def _of(self, name: str, level: int, feat: Tensor) -> Tensor:
        value = self.get_buffer(f'{name}{level}').to(feat.dtype)
        return value.view(1, -1, *(1,) * (feat.dim() - 2))

    def statistics(self, level: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a level, ``(C_t,)`` each."""
        return (
            self.get_buffer(f'mean{level}'),
            self.get_buffer(f'std{level}'),
        )

    def normalize(self, feats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map features into the space.

        Shape:
            - feats, out: L of ``(N, C_t, *)``
        """
        return tuple(
            (feat - self._of('mean', level, feat))
            / self._of('std', level, feat)
            for level, feat in enumerate(feats)
        )

    def restore(self, estimates: Sequence[Tensor]) -> list[Tensor]:
        """Map estimates back to the teacher's scale.

        Shape:
            - estimates, out: L of ``(N, C_t, *)``
        """
        return [
            torch.addcmul(
                self._of('mean', level, estimate),
                estimate,
                self._of('std', level, estimate),
            )
            for level, estimate in enumerate(estimates)
        ]
