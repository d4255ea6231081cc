"""The residual decomposition and the losses on it.

Legend: L levels, B branches, u aligned student feature, d residual, e
estimate, r what is still missing, all ``(N, C_t, *)``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ...layers import full_precision
from ...registry import explain_unknown_keys

REDUCTIONS = ('sum', 'mean')


def estimates_of(
    *,
    aligned: Tensor,
    residuals: Sequence[Tensor],
    reduction: str = 'sum',
) -> list[Tensor]:
    """Running estimates of the teacher's feature.

        e_0 = u
        e_i = e_(i-1) + d_i                        'sum'
            = u + 1/i * (d_1 + ... + d_i)          'mean'

    Source: ERA [official code]. Training always uses 'sum'; 'mean' is its
    second form of e_n at inference, without a matching training loss. The
    mean of the first i < n branches is [ours].

    Returns:
        B + 1 tensors e_0 ... e_n.
    """
    estimates = [aligned]
    if reduction == 'sum':
        for residual in residuals:
            estimates.append(estimates[-1] + residual)
    else:
        total = torch.zeros_like(aligned)
        for count, residual in enumerate(residuals, start=1):
            total = total + residual
            estimates.append(aligned + total / count)
    return estimates


def residual_targets(
    *, estimates: Sequence[Tensor], teacher_feat: Tensor
) -> list[Tensor]:
    """Targets of the branches, which are constants.

        r_i = sg(f_t - e_(i-1))                    i = 1..n

    With the stop-gradient, branch i corrects the constant sum of the branches
    before it: MSE(d_i, r_i) has the value of MSE(e_i, f_t), but its gradient
    reaches only branch i.

    Source: ERA [official code].

    Returns:
        B tensors r_1 ... r_n.
    """
    return [(teacher_feat - e).detach() for e in estimates[:-1]]


def _mse(prediction: Tensor, target: Tensor) -> Tensor:
    # Half precision loses the small last residuals.
    prediction = full_precision(prediction)
    return mse_loss(prediction, target.to(prediction.dtype))


@explain_unknown_keys
class ERALoss(nn.Module):
    """ERA's losses; the losses of the head are passed in.

        loss_era_align    = align_weight * sum_l MSE(u_l, f_tl)
        loss_era_residual = residual_weight / n
                            * sum_i s_i sum_l MSE(d_il, r_il)
        loss_era_twi_*    = twi_weight * sum_k w_k * head_loss_k
        w_0 = 1 (0 without twi_on_aligned),  w_i = s_i / n

    MSE is the mean over batch, channels and positions, in float32 or better.
    The divisor is n, not the sum of the scales. In a normalised space the
    sums over levels are weighted means: shares of the teacher's variance.

    Source: ERA. The numbers are [official code], profile ``official``:
    align 5, residual 1, TWI 1, scales 1, 1/2, 1/4, 1/8. The sum over levels
    is [ours].

    Args:
        align_weight: Weight of the feature term.
        residual_weight: Weight of the branches' terms.
        twi_weight: Weight of the teacher head's losses.
        scales: s_i, one per branch, or one number for all of them. None:
            0.5 ** (i - 1).
        twi_on_aligned: The teacher's head also judges e_0 = u, the estimate
            without branches: [official code], its option featcls, which its
            script sets.
        twi_scales: w_k, one per estimate e_0 ... e_n, instead of those above
            [ours]. Two numbers are for the first and the last estimate, with
            0 for the others.
    """

    def __init__(
        self,
        align_weight: float = 5.0,
        residual_weight: float = 1.0,
        twi_weight: float = 1.0,
        scales: float | Sequence[float] | None = None,
        twi_on_aligned: bool = True,
        twi_scales: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.align_weight = align_weight
        self.residual_weight = residual_weight
        self.twi_weight = twi_weight
        self.scales = tuple(scales) if isinstance(scales, Sequence) else scales
        self.twi_on_aligned = twi_on_aligned
        self.twi_scales = None if twi_scales is None else tuple(twi_scales)

    def branch_weights(self, num_branches: int) -> list[float]:
        """s_i / n for each branch.

        Raises:
            ValueError: The number of scales is not that of the branches, or
                one is negative.
        """
        scales = self.scales
        if scales is None:
            scales = tuple(0.5**i for i in range(num_branches))
        elif not isinstance(scales, tuple):
            scales = (scales,) * num_branches
        if len(scales) != num_branches or min(scales) < 0:
            raise ValueError(
                f'`scales` needs one value or one per branch '
                f'({num_branches}), none negative, but got {list(scales)}.'
            )
        return [scale / num_branches for scale in scales]

    def step_weights(self, num_branches: int) -> list[float]:
        """Weights w_k of the head's losses on e_0 ... e_n.

        Raises:
            ValueError: The number of ``twi_scales`` is wrong, one is
                negative, or all are zero.
        """
        if self.twi_scales is not None:
            scales = list(self.twi_scales)
            if len(scales) == 2:
                scales[1:1] = [0.0] * (num_branches - 1)
            if (
                len(scales) != num_branches + 1
                or min(scales) < 0
                or sum(scales) == 0
            ):
                raise ValueError(
                    '`twi_scales` needs two values or one per estimate '
                    f'({num_branches + 1}), none negative and not all 0, but '
                    f'got {list(self.twi_scales)}.'
                )
            return scales
        first = 1.0 if self.twi_on_aligned else 0.0
        return [first, *self.branch_weights(num_branches)]

    def judged(
        self, num_branches: int, steps: str, seed: int
    ) -> dict[int, float]:
        """The estimates that the head judges in an iteration, with weights.

        Args:
            num_branches: n.
            steps: 'all', 'last' or 'sampled': see ``ERADistiller``.
            seed: Seed of this iteration's draw.
        """
        weights = self.step_weights(num_branches)
        if steps == 'all':
            return {k: weight for k, weight in enumerate(weights) if weight}
        index = num_branches
        if steps == 'sampled':
            # Its own generator, so that the run's random state is unchanged.
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.multinomial(
                torch.tensor(weights), 1, generator=generator
            )
            index = int(drawn)
        return {index: sum(weights)}

    def forward(
        self,
        *,
        aligned: Sequence[Tensor],
        residuals: Sequence[Sequence[Tensor]],
        targets: Sequence[Sequence[Tensor]],
        teacher_feats: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Feature losses of a batch in the released form.

        Args:
            aligned: u by level.
            residuals: d by branch and level.
            targets: r by branch and level.
            teacher_feats: f_t by level.

        Returns:
            The two losses, and for the log ``era_mse_e0`` ... ``era_mse_en``:
            the error of each estimate, summed over levels.
        """
        errors = [
            sum(
                _mse(u, t) for u, t in zip(aligned, teacher_feats, strict=True)
            )
        ] + [
            sum(_mse(d, r) for d, r in zip(branch, target, strict=True))
            for branch, target in zip(residuals, targets, strict=True)
        ]
        return self._weighed(errors, 'mse')

    def of_shares(
        self,
        *,
        errors: Sequence[Tensor],
        share_weights: Tensor,
    ) -> dict[str, Tensor]:
        """Feature losses of a batch in a normalised space.

        An error is the unexplained share of the teacher's variance: 0 if the
        estimate is exact, 1 if it is the mean. A level whose variance is not
        known yet counts as 1, without gradient.

        Source: ours.

        Args:
            errors: MSE of e_0 ... e_n by level, ``(B + 1,)`` each.
            share_weights: Weights of the levels, from the space; 0: the
                level's variance is not known.

        Returns:
            The two losses, and ``era_unexplained_e0`` ...
            ``era_unexplained_en`` for the log.
        """
        by_level = torch.stack(list(errors))
        weights = share_weights[:, None]
        by_level = torch.where(weights > 0, weights * by_level, 1.0)
        shares = by_level.mean(dim=0)
        return self._weighed(list(shares.unbind()), 'unexplained')

    def _weighed(self, errors: list, name: str) -> dict[str, Tensor]:
        weights = self.branch_weights(len(errors) - 1)
        losses = {
            'loss_era_align': self.align_weight * errors[0],
            'loss_era_residual': self.residual_weight
            * sum(w * e for w, e in zip(weights, errors[1:], strict=True)),
        }
        for index, error in enumerate(errors):
            losses[f'era_{name}_e{index}'] = error.detach()
        return losses
