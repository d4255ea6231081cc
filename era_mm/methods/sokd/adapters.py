"""Phi: maps the student's features to the teacher's space."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from ...layers import check_alike, full_precision

Shapes = Sequence[tuple[int, ...]]


def below(owner: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a submodule, without its prefix."""
    start = f'{owner}.'
    return {
        key.removeprefix(start): value
        for key, value in values.items()
        if key.startswith(start)
    }


def check_shapes(student: Shapes, teacher: Shapes) -> None:
    """Refuse levels that do not correspond.

    Raises:
        ValueError: Different numbers of levels or sizes, or features that are
            neither maps nor vectors.
    """
    if any(len(shape) not in (2, 4) for shape in student):
        raise ValueError(
            'SoKD needs maps (N, C, H, W) or vectors (N, C), but the student '
            f'has {list(student)}. Choose other sources for `base`.'
        )
    check_alike(
        student,
        teacher,
        names=('The student', 'the teacher'),
        advice='Choose sources of the same levels and strides for `base`.',
    )


class Adapters(nn.ModuleList):
    """A 1x1 convolution at each level (a linear layer for vectors).

    Source: an adapter to the teacher's space is SoKD's [paper, by readers'
    notes]; its form is [inference].

    Args:
        student: Shapes of the student's features, by level.
        teacher: Shapes of the teacher's features, by level.
    """

    def __init__(self, student: Shapes, teacher: Shapes) -> None:
        super().__init__(
            nn.Linear(s[1], t[1])
            if len(s) == 2
            else nn.Conv2d(s[1], t[1], kernel_size=1)
            for s, t in zip(student, teacher, strict=True)
        )

    def forward(
        self,
        feats: Sequence[Tensor],
        weights: Mapping[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """Phi(F_s) by level.

        Args:
            feats: F_s by level.
            weights: Weights to use instead of its own, by name; for looking
                ahead.
        """
        return [
            functional_call(adapter, below(str(level), weights or {}), (feat,))
            for level, (adapter, feat) in enumerate(
                zip(self, feats, strict=True)
            )
        ]

    def fit(
        self,
        feats: Sequence[Tensor],
        targets: Sequence[Tensor],
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Distance of Phi to the teacher; its gradient reaches only Phi.

        mean over l of mean (Phi_l(sg F_sl) - F_tl)^2
        """
        adapted = self([feat.detach() for feat in feats], weights)
        terms = [
            mse_loss(full_precision(a), full_precision(t))
            for a, t in zip(adapted, targets, strict=True)
        ]
        return torch.stack(terms).mean()
