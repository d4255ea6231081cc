"""AT: attention transfer, on the spatial distribution of feature energy.

Legend: N batch, C channels, L levels, p power.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from ..core import BaseDistiller, Features, MeasuredPair, Plan
from ..layers import check_maps, full_precision, levels_of
from ..registry import MODELS


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
    *, student_feat: Tensor, teacher_feat: Tensor, power: float = 2.0
) -> Tensor:
    """Mean squared difference of the attention maps.

        mean_n mean_hw (Q_s / ||Q_s|| - Q_t / ||Q_t||)^2

    If the sizes differ, the larger map is pooled to the smaller.

    Source: AT, arXiv 1612.03928; the mean of squares instead of the norm of
    eq. 2 is [official code]. Pooling is that of mdistiller.

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
    return (student - teacher).square().mean()


@MODELS.register_module()
class ATDistiller(BaseDistiller):
    """Attention transfer.

        L = loss_weight * sum_l AT(S_l, T_l)

    It has no trainable parameters, and channels may differ.

    Source: AT, arXiv 1612.03928, on the stages of a classifier. Weight 1000
    and power 2 are [official code]'s. Levels of a pyramid are [ours]: the
    mean over positions makes the loss of large maps small.

    Args:
        source: Module whose output is distilled, maps ``(N, C, H, W)``; of
            several all are levels. In a classifier the stages of its
            backbone.
        power: p.
        loss_weight: Weight of each level.
        teacher: Name of the teacher.
        schedules: Schedules of ``loss_at``; see ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Features that are not maps, or different numbers of
            levels.
    """

    def __init__(
        self,
        source: str | list | dict = 'neck',
        power: float = 2.0,
        loss_weight: float = 1000.0,
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(source, teacher, schedules, init_cfg)
        self.power, self.loss_weight = power, loss_weight

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """On the levels of a neck; in a classifier on the stages."""
        match = pair.match() if pair.is_detector else pair.match_stages()
        return Plan(
            dict(type=f'era_mm.{cls.__name__}', **match.config()), match
        )

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
            attention_loss(student_feat=s, teacher_feat=t, power=self.power)
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
