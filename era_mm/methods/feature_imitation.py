"""Feature imitation: FitNet's hint and PKD, the usual baselines.

Legend: F_s student's feature in the teacher's space, F_t teacher's, both
``(N, C, *)``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import BaseDistiller, Features
from ..registry import MODELS


def _full(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def standardise(feat: Tensor, eps: float = 1e-6) -> Tensor:
    """Each channel with mean 0 and deviation 1 over batch and positions.

        n(F) = (F - mean_c) / (std_c + eps)

    Source: PKD, arXiv 2207.02039; eps is its released code's.

    Shape:
        - feat, out: ``(N, C, *)``
    """
    dims = [dim for dim in range(feat.dim()) if dim != 1]
    mean = feat.mean(dims, keepdim=True)
    return (feat - mean) / (feat.std(dims, keepdim=True) + eps)


def imitation_loss(
    *,
    student_feat: Tensor,
    teacher_feat: Tensor,
    measure: str = 'mse',
    masks: Tensor | None = None,
) -> Tensor:
    """How far the student's feature is from the teacher's.

        'mse':      mean (F_s - F_t)^2                       FitNet
        'pearson':  1/2 mean (n(F_s) - n(F_t))^2 = 1 - r     PKD

    n is :func:`standardise`. With masks the mean is over the numbers in any
    area; 0 where there is none.

    Source: FitNet, arXiv 1412.6550; PKD, arXiv 2207.02039. Masks are [ours].

    Shape:
        - student_feat, teacher_feat: ``(N, C, *)``
        - masks: ``(N, P, H, W)``
        - out: scalar
    """
    student, teacher = _full(student_feat), _full(teacher_feat)
    if measure == 'pearson':
        student, teacher = standardise(student), standardise(teacher)
    error = (student - teacher).square()
    if measure == 'pearson':
        error = error / 2
    if masks is None:
        return error.mean()
    inside = masks.amax(1, keepdim=True)
    count = inside.sum() * error.shape[1]
    return (error * inside).sum() / count.clamp(min=1)


@MODELS.register_module()
class FeatureImitationDistiller(BaseDistiller):
    """The student's features become the teacher's.

        L = loss_weight * mean_l imitation(connector_l(P_l), T_l)

    with a 1x1 convolution per level as connector.

    Source: FitNet, arXiv 1412.6550 (its hint, here together with the task
    instead of before it, as the field uses it), and PKD, arXiv 2207.02039.
    One connector per level is [ours].

    Args:
        source: Module whose output is imitated; of several all are levels.
        measure: 'mse' (FitNet) or 'pearson' (PKD).
        loss_weight: Its weight.
        connector: False: none, for features of equal channels, as in PKD.
        teacher: Name of the teacher.
        schedules: See ``BaseDistiller``.
        init_cfg: As in mmengine.

    Shape:
        - features: L of ``(N, C, H, W)`` or ``(N, C)``

    Raises:
        ValueError: An unknown measure, features that do not fit.
    """

    MEASURES = ('mse', 'pearson')

    def __init__(
        self,
        source: str | list | dict = 'neck',
        measure: str = 'mse',
        loss_weight: float = 1.0,
        connector: bool = True,
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(source, teacher, schedules, init_cfg)
        if measure not in self.MEASURES:
            raise ValueError(
                f'`measure` must be one of {self.MEASURES}, but got '
                f'{measure!r}.'
            )
        self.measure, self.loss_weight = measure, loss_weight
        self._has_connector = connector
        self.connectors: nn.ModuleList | None = None

    @staticmethod
    def _levels(feats: Features, sources: Sequence[str]) -> list[Tensor]:
        return [feat for source in sources for feat in feats[source]]

    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Build the connectors for the pair's channels."""
        own, theirs = (
            [tuple(feat.shape) for feat in self._levels(feats, sources)]
            for feats, sources in (
                (student_feats, self.student_sources),
                (teacher_feats, self.teacher_sources),
            )
        )
        if [(len(s), s[2:]) for s in own] != [(len(s), s[2:]) for s in theirs]:
            raise ValueError(
                f'The student has features {own} at {self.student_sources} '
                f'and the teacher {theirs} at {self.teacher_sources}: all but '
                'the channels must agree. Choose sources of the same levels '
                'and strides.'
            )
        channels = [(s[1], t[1]) for s, t in zip(own, theirs, strict=True)]
        if self._has_connector:
            self.connectors = nn.ModuleList(
                nn.Linear(*pair) if len(shape) == 2 else nn.Conv2d(*pair, 1)
                for pair, shape in zip(channels, own, strict=True)
            )
        elif any(s != t for s, t in channels):
            raise ValueError(
                '`connector=False` needs equal channels, but student and '
                f'teacher have {channels}. Leave the connector on.'
            )

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
        area_masks: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """``loss_imitation``.

        Args:
            student_feats: Features by source.
            teacher_feats: The same of the teacher.
            data_samples: Not used.
            area_masks: By level, ``(N, P, H, W)``: the loss is taken inside
                these areas alone.
        """
        maps = self._levels(student_feats, self.student_sources)
        targets = self._levels(teacher_feats, self.teacher_sources)
        if self.connectors is not None:
            maps = [
                connector(feat)
                for connector, feat in zip(self.connectors, maps, strict=True)
            ]
        masks: Sequence[Tensor | None] = area_masks or [None] * len(maps)
        terms = [
            imitation_loss(
                student_feat=s, teacher_feat=t, measure=self.measure, masks=m
            )
            for s, t, m in zip(maps, targets, masks, strict=True)
        ]
        loss = self.loss_weight * torch.stack(terms).mean()
        return {'loss_imitation': loss}

    def loss_weights(self) -> dict[str, float]:
        """Of the one term."""
        return {'loss_imitation': self.loss_weight}
