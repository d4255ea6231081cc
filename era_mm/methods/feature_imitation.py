"""Feature imitation: FitNet's hint and PKD, the usual baselines.

Legend: F_s student's feature in the teacher's space, F_t teacher's, both
``(N, C, *)``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import BaseDistiller, Features
from ..layers import check_alike, full_precision, levels_of
from ..registry import MODELS

#: Below it a variance counts as 0; its root is far below the eps.
TINY = 1e-24


def standardise(feat: Tensor, eps: float = 1e-6) -> Tensor:
    """Standardise each channel over batch and positions.

        n(F) = (F - mean_c) / (std_c + eps)

    std is the unbiased one. A channel with one value, or of equal values,
    becomes 0.

    Source: PKD, arXiv 2207.02039; eps is its released code's.

    Shape:
        - feat, out: ``(N, C, *)``
    """
    dims = [dim for dim in range(feat.dim()) if dim != 1]
    centred = feat - feat.mean(dims, keepdim=True)
    others = max(feat.numel() // feat.shape[1] - 1, 1)
    # On a CPU torch's own std takes five times as long as this.
    variance = centred.square().sum(dims, keepdim=True) / others
    # The root has no gradient at 0.
    std = variance.clamp(min=TINY).sqrt()
    return centred * (1 / (std + eps))


def imitation_loss(
    *,
    student_feat: Tensor,
    teacher_feat: Tensor,
    measure: str = 'mse',
    masks: Tensor | None = None,
) -> Tensor:
    """Distance between the student's feature and the teacher's.

        'mse':      mean (F_s - F_t)^2                       FitNet
        'pearson':  1/2 mean (n(F_s) - n(F_t))^2 = 1 - r     PKD

    n is :func:`standardise`. With masks the mean is over the elements inside
    any area; it is 0 without areas.

    Source: FitNet, arXiv 1412.6550; PKD, arXiv 2207.02039. Masks are [ours].

    Shape:
        - student_feat, teacher_feat: ``(N, C, *)``
        - masks: ``(N, P, H, W)``
        - out: scalar
    """
    student, teacher = map(full_precision, (student_feat, teacher_feat))
    if measure == 'pearson':
        student, teacher = standardise(student), standardise(teacher)
    scale = 0.5 if measure == 'pearson' else 1.0
    if masks is None:
        return scale * nn.functional.mse_loss(student, teacher)
    error = (student - teacher).square()
    inside = masks.amax(1, keepdim=True)
    count = inside.sum() * error.shape[1]
    return scale * (error * inside).sum() / count.clamp(min=1)


@MODELS.register_module()
class FeatureImitationDistiller(BaseDistiller):
    """The student's features become the teacher's.

        'mse':      L = loss_weight * mean_l imitation(connector_l(P_l), T_l)
        'pearson':  L = loss_weight * sum_l imitation(P_l, T_l)

    A connector is a 1x1 convolution. PKD has none; here it gets one only for
    levels whose channels differ.

    Source: FitNet, arXiv 1412.6550 (its hint, here together with the task
    instead of before it, as the field uses it), and PKD, arXiv 2207.02039,
    with the settings of its recipe in mmrazor: 6 per level, summed over the
    first four of a pyramid. One connector per level is [ours].

    Args:
        source: Module whose output is imitated; several are levels.
        measure: 'mse' (FitNet) or 'pearson' (PKD).
        loss_weight: Its weight. None: 1 for 'mse' [ours]; 6 for 'pearson'
            (published for Faster R-CNN; one-stage detectors have 10, which
            ``PKDDistiller`` gets from ``make_config``).
        connector: True: at all levels; False: none, for features of equal
            channels. None: True for 'mse'; for 'pearson' only where channels
            differ.
        num_levels: Number of levels to use, from the first. None: all for
            'mse'; up to four for 'pearson'.
        teacher: Name of the teacher.
        schedules: See ``BaseDistiller``.
        init_cfg: As in mmengine.

    Shape:
        - features: L of ``(N, C, H, W)`` or ``(N, C)``

    Raises:
        ValueError: An unknown measure, features that do not fit, or more
            levels than exist.
    """

    MEASURES = ('mse', 'pearson')
    PKD_WEIGHT = 6.0
    PKD_LEVELS = 4

    def __init__(
        self,
        source: str | list | dict = 'neck',
        measure: str = 'mse',
        loss_weight: float | None = None,
        connector: bool | None = None,
        num_levels: int | None = None,
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
        if num_levels is not None and num_levels < 1:
            raise ValueError(
                f'`num_levels` must be at least 1, but got {num_levels}.'
            )
        if loss_weight is None:
            loss_weight = 1.0 if measure == 'mse' else self.PKD_WEIGHT
        self.measure, self.loss_weight = measure, loss_weight
        self.num_levels = num_levels
        self._connector = connector
        self.connectors: nn.ModuleList

    def _levels(self, feats: Features, sources: Sequence[str]) -> list[Tensor]:
        return levels_of(feats, sources)[: self.num_levels]

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
            [tuple(feat.shape) for feat in levels_of(feats, sources)]
            for feats, sources in (
                (student_feats, self.student_sources),
                (teacher_feats, self.teacher_sources),
            )
        )
        check_alike(
            own,
            theirs,
            names=('The student', 'the teacher'),
            at=(self.student_sources, self.teacher_sources),
            advice='Choose sources of the same levels and strides.',
        )
        if self.num_levels is None:
            if self.measure == 'pearson':
                self.num_levels = min(len(own), self.PKD_LEVELS)
        elif self.num_levels > len(own):
            raise ValueError(
                f'`num_levels` is {self.num_levels}, but there are {len(own)} '
                f'levels at {self.student_sources}. Omit it.'
            )
        own, theirs = own[: self.num_levels], theirs[: self.num_levels]
        channels = [(s[1], t[1]) for s, t in zip(own, theirs, strict=True)]
        if self._connector is False and any(s != t for s, t in channels):
            raise ValueError(
                '`connector=False` needs equal channels, but student and '
                f'teacher have {channels}. Leave the connector on.'
            )
        always = self._connector
        if always is None:
            always = self.measure == 'mse'
        self.connectors = nn.ModuleList(
            nn.Identity()
            if s == t and not always
            else nn.Linear(s, t)
            if len(shape) == 2
            else nn.Conv2d(s, t, 1)
            for (s, t), shape in zip(channels, own, strict=True)
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
        maps = [
            connector(feat)
            for connector, feat in zip(self.connectors, maps, strict=True)
        ]
        masks: Sequence[Tensor | None] = area_masks or [None] * len(maps)
        terms = torch.stack(
            [
                imitation_loss(
                    student_feat=s,
                    teacher_feat=t,
                    measure=self.measure,
                    masks=m,
                )
                for s, t, m in zip(
                    maps, targets, masks[: len(maps)], strict=True
                )
            ]
        )
        loss = terms.mean() if self.measure == 'mse' else terms.sum()
        return {'loss_imitation': self.loss_weight * loss}

    def loss_weights(self) -> dict[str, float]:
        """Weight of the only term."""
        return {'loss_imitation': self.loss_weight}
