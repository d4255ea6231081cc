"""The approximation of a batch: feature terms and parts of the estimates.

Legend: N batch, C_t channels of the teacher, L levels, B branches, * any
spatial dimensions.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...layers import full_precision
from .losses import ERALoss, estimates_of, residual_targets
from .mbrnet import MBRNet
from .residuals import ListedResiduals, Residuals
from .space import FeatureSpace


class Parts(NamedTuple):
    """The parts of the estimates, in the space of the branches.

    Args:
        aligned: u by level.
        residuals: d by level.
    """

    aligned: list[Tensor]
    residuals: list[Residuals]


def approximate(
    mbrnet: MBRNet,
    terms: ERALoss,
    *,
    maps: Sequence[Tensor],
    targets: Sequence[Tensor],
    own: Sequence[Tensor],
    detach: bool = False,
    learns: bool = True,
) -> tuple[dict[str, Tensor], Parts]:
    """The feature terms of a batch, and the parts of the estimates.

    Args:
        mbrnet: Aligns and branches.
        terms: Weights the errors.
        maps: The student's features, L of ``(N, C_s, *)``.
        targets: What is approximated, L of ``(N, C_t, *)``, in float32 or
            better.
        own: The teacher's own features, likewise, on which the space is
            measured. Others than the targets if these are derived from them.
        detach: Detach the student's features for the branches.
        learns: Whether this is a training step, which updates the statistics
            of the space.
    """
    seen = [m.detach() for m in maps] if detach else maps
    aligned = [full_precision(u) for u in mbrnet.align(maps)]
    space = mbrnet.space
    if space is not None:
        if learns:
            space.update(own)
        parts = Parts(aligned, mbrnet.residuals_of_levels(seen))
        return _of_shares(terms, space, parts, targets), parts
    residuals = [
        [full_precision(d) for d in level]
        for level in zip(*mbrnet.residuals(seen), strict=True)
    ]
    # Of estimates only the values count here.
    with torch.no_grad():
        missing = [
            residual_targets(
                estimates=estimates_of(aligned=u, residuals=d),
                teacher_feat=target,
            )
            for u, d, target in zip(aligned, residuals, targets, strict=True)
        ]
    losses = terms(
        aligned=aligned,
        residuals=list(zip(*residuals, strict=True)),
        targets=list(zip(*missing, strict=True)),
        teacher_feats=targets,
    )
    return losses, Parts(aligned, [ListedResiduals(d) for d in residuals])


def _of_shares(
    terms: ERALoss,
    space: FeatureSpace,
    parts: Parts,
    targets: Sequence[Tensor],
) -> dict[str, Tensor]:
    return terms.of_shares(
        errors=[
            d.errors(aligned=u, target=target)
            for u, d, target in zip(
                *parts, space.normalize(targets), strict=True
            )
        ],
        share_weights=space.share_weights,
    )


def unexplained_shares(
    mbrnet: MBRNet,
    terms: ERALoss,
    space: FeatureSpace,
    *,
    maps: Sequence[Tensor],
    targets: Sequence[Tensor],
) -> Tensor:
    """Unexplained share of the variance for each estimate, ``(B + 1,)``.

    Args:
        mbrnet: Aligns and branches.
        terms: Averages over levels.
        space: The net's.
        maps: The student's features.
        targets: The teacher's.
    """
    return shares_in(
        _of_shares(
            terms,
            space,
            Parts(
                [full_precision(u) for u in mbrnet.align(maps)],
                mbrnet.residuals_of_levels(maps),
            ),
            [full_precision(t) for t in targets],
        )
    )


def shares_in(losses: Mapping[str, Tensor]) -> Tensor:
    """The shares among the terms of a step, ``(B + 1,)``."""
    return torch.stack(
        [
            value
            for name, value in losses.items()
            if name.startswith('era_unexplained_e')
        ]
    )


def estimate_from(
    parts: Parts,
    step: int,
    *,
    space: FeatureSpace | None,
    detach: bool = False,
) -> list[Tensor]:
    """An estimate with its graph, on the teacher's scale.

    Args:
        parts: What it is made of.
        step: Which, 0 to B.
        space: That of the branches; None: the teacher's own scale.
        detach: Estimates of the branches do not reach the student.

    Returns:
        L of ``(N, C_t, *)``.
    """
    start = parts.aligned
    # e_0 trains the student whether or not the branches do.
    if detach and step:
        start = [u.detach() for u in start]
    estimate = [
        d.estimate(u, step)
        for u, d in zip(start, parts.residuals, strict=True)
    ]
    return estimate if space is None else space.restore(estimate)
