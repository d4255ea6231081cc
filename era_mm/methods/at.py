"""AT: attention transfer, on the spatial distribution of feature energy.

Legend: N batch, C channels, L levels, p power.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from ..core import BaseDistiller, Features, MeasuredPair, Plan
from ..layers import check_maps, full_precision, levels_of
from ..registry import MODELS

#: For pyramids: the middle stage of the paper's networks on CIFAR, 16x16, and
#: the best of the weights that were tried (docs/methods/baselines.md).
OF_PYRAMIDS = dict(num_positions=256, loss_weight=30.0)


def attention(feat: Tensor, power: float = 2.0) -> Tensor:
    """Attention maps, each as a vector of length 1.

        Q = mean_c |F_c|^p,  Q / ||Q||_2

    Source: AT, Zagoruyko and Komodakis, arXiv 1612.03928, F^p_sum of section
    3.1; the mean over channels (the norm cancels its factor) is [official
    code]'s.

    Shape:
        - feat: ``(N, C, H, W)``
        - out: ``(N, H * W)``
    """
    return normalize(feat.abs().pow(power).mean(dim=1).flatten(1))


def attention_loss(
    *,
    student_feat: Tensor,
    teacher_feat: Tensor,
    power: float = 2.0,
    num_positions: int | None = None,
) -> Tensor:
    """Mean squared difference of the attention maps.

        mean_n sum_hw (Q_s / ||Q_s|| - Q_t / ||Q_t||)^2 / num_positions

    If the sizes differ, the larger map is pooled to the smaller.

    Source: AT, arXiv 1612.03928; the mean of squares instead of the norm of
    eq. 2 is [official code]. Pooling is that of mdistiller.

    Args:
        student_feat: The student's.
        teacher_feat: The teacher's.
        power: p.
        num_positions: Divisor of the sum. None: H * W, a mean.

    Shape:
        - student_feat, teacher_feat: ``(N, C, H, W)``, channels may differ
        - out: scalar
    """
    maps = [full_precision(feat) for feat in (student_feat, teacher_feat)]
    height, width = (min(m.shape[dim] for m in maps) for dim in (2, 3))
    size = (height, width)
    student, teacher = (
        attention(
            one
            if tuple(one.shape[2:]) == size
            else adaptive_avg_pool2d(one, size),
            power,
        )
        for one in maps
    )
    distance = (student - teacher).square().sum(dim=1).mean()
    return distance / (num_positions or height * width)


@MODELS.register_module()
class ATDistiller(BaseDistiller):
    """Attention transfer.

        L = loss_weight * sum_l AT(S_l, T_l)

    It has no trainable parameters, and channels may differ.

    Source: AT, arXiv 1612.03928, on the stages of a classifier. Weight 1000
    and power 2 are [official code]'s. As a map Q has length 1, the mean over
    positions makes the loss of small maps large: 250 times the squared
    distance on a map of 2x2. A pyramid's sizes depend on the images, so
    there, as ``plan_for`` writes, the sum is divided by the same number on
    each level, with weight 30 [ours; chosen on val of the digit scenes].

    Args:
        source: Module whose output is distilled, maps ``(N, C, H, W)``; of
            several all are levels. In a classifier the stages of its
            backbone.
        power: p.
        loss_weight: Weight of each level.
        num_positions: Divisor of the sum over positions. None: the number of
            positions of each map, as released. 256 is the middle stage of the
            paper's networks on CIFAR, 16x16.
        teacher: Name of the teacher.
        schedules: Schedules of ``loss_at``; see ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Features that are not maps, different numbers of levels,
            or ``num_positions`` below 1.
    """

    def __init__(
        self,
        source: str | list | dict = 'neck',
        power: float = 2.0,
        loss_weight: float = 1000.0,
        num_positions: int | None = None,
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(source, teacher, schedules, init_cfg)
        if num_positions is not None and num_positions < 1:
            raise ValueError(
                '`num_positions` must be None or at least 1, but got '
                f'{num_positions}.'
            )
        self.power, self.loss_weight = power, loss_weight
        self.num_positions = num_positions

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """On the levels of a neck; in a classifier on the stages."""
        match = pair.match() if pair.is_detector else pair.match_stages()
        config = dict(type=f'era_mm.{cls.__name__}', **match.config())
        if pair.is_detector:
            config |= OF_PYRAMIDS
        return Plan(config, match)

    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Check the levels."""
        check_maps(
            student_feats=levels_of(student_feats, self.student_sources),
            teacher_feats=levels_of(teacher_feats, self.teacher_sources),
            method='AT',
            same_size=False,
        )

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_at``."""
        terms = [
            attention_loss(
                student_feat=s,
                teacher_feat=t,
                power=self.power,
                num_positions=self.num_positions,
            )
            for s, t in zip(
                levels_of(student_feats, self.student_sources),
                levels_of(teacher_feats, self.teacher_sources),
                strict=True,
            )
        ]
        return {'loss_at': self.loss_weight * torch.stack(terms).sum()}

    def loss_weights(self) -> dict[str, float]:
        """Weight of the only term."""
        return {'loss_at': self.loss_weight}
