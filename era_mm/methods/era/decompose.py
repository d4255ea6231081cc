"""The parts of a distiller's estimates, for display."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...layers import full_precision
from .losses import estimates_of


@dataclass
class Decomposition:
    """The successive approximation of a teacher's feature.

    Args:
        teacher: The feature by level, ``(N, C_t, *)``; in the normalised
            space if the distiller has one.
        estimates: e_0 ... e_n, each by level, in the same space.
        shares: Unexplained share of the teacher's variance for each estimate,
            ``(levels, n + 1)``. In a normalised space as in the losses;
            otherwise the squared error divided by the squared distance of the
            teacher's feature to its mean over the batch.
    """

    teacher: list[Tensor]
    estimates: list[list[Tensor]]
    shares: Tensor | None


@torch.no_grad()
def decompose(
    distiller: Any, *, student_feats: dict, teacher_feats: dict
) -> Decomposition | None:
    """The parts of an ``ERADistiller``'s estimates for a batch.

    Source: ours.

    Args:
        distiller: A distiller whose ``mbrnet`` makes estimates.
        student_feats: By source, as ``Distillation.record`` gives them.
        teacher_feats: Likewise.

    Returns:
        None for other distillers, and before a normalised space has seen
        its first batch.
    """
    mbrnet = getattr(distiller, 'mbrnet', None)
    if mbrnet is None or not hasattr(mbrnet, 'align'):
        return None
    space = mbrnet.space
    if space is not None and not int(space.first_batches.seen):
        return None
    maps = distiller._maps(student_feats, distiller.feature_sources)
    targets = [
        full_precision(target)
        for target in distiller._maps(teacher_feats, distiller.teacher_sources)
    ]
    if space is not None:
        targets = list(space.normalize(targets))
    residuals = mbrnet.residuals(maps)
    by_level = [
        estimates_of(
            aligned=full_precision(aligned),
            residuals=[full_precision(branch[level]) for branch in residuals],
        )
        for level, aligned in enumerate(mbrnet.align(maps))
    ]
    shares = []
    for level, (target, estimates) in enumerate(
        zip(targets, by_level, strict=True)
    ):
        errors = torch.stack([(target - e).square().mean() for e in estimates])
        if space is not None:
            shares.append(space.share_weights[level] * errors)
        else:
            dims = [0, *range(2, target.dim())]
            variance = target.var(dims, correction=0).mean()
            shares.append(errors / variance.clamp(min=1e-12))
    return Decomposition(
        targets,
        [list(step) for step in zip(*by_level, strict=True)],
        torch.stack(shares),
    )
