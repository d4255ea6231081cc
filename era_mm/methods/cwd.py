"""CWD: channel-wise distillation of spatial distributions.

Legend: N batch, C channels of the teacher, L levels, tau temperature.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from ..core import BaseDistiller, Features, MeasuredPair, Plan
from ..layers import Aligns, check_maps, full_precision, levels_of
from ..registry import MODELS


def channel_wise_loss(
    *, student_feat: Tensor, teacher_feat: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL between the spatial distributions of two maps, per channel.

        tau^2 / (N C) * sum_nc KL(phi(T_nc) || phi(S_nc)),
        phi(x) = softmax of x / tau over the H W positions

    Source: CWD, Shu et al., arXiv 2011.13256, eqs. 4 and 5.

    Shape:
        - student_feat, teacher_feat: ``(N, C, H, W)``
        - out: scalar
    """
    maps = [
        full_precision(feat).flatten(0, 1)
        for feat in (student_feat, teacher_feat)
    ]
    student, teacher = (
        log_softmax(one.flatten(1) / temperature, dim=1) for one in maps
    )
    return temperature**2 * kl_div(
        student, teacher, reduction='batchmean', log_target=True
    )


@MODELS.register_module()
class CWDDistiller(BaseDistiller):
    """Channel-wise distillation.

        L = loss_weight * sum_l CWD(align_l(S_l), T_l)

    ``align`` is a 1x1 convolution where the channels differ.

    Source: CWD, arXiv 2011.13256, which is about segmentation and detection.
    Weight 10 and temperature 1 for each level of a pyramid are those of
    OpenMMLab's detectors (mmrazor); for the features of a segmentation
    network the paper has 50 and 4. Classifiers are [ours].

    Args:
        source: Module whose output is distilled, maps ``(N, C, H, W)``; of
            several all are levels.
        temperature: tau.
        loss_weight: Weight of each level.
        teacher: Name of the teacher.
        schedules: Schedules of ``loss_cwd``; see ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Features that are not maps or do not fit, a temperature
            that is not above 0.
    """

    def __init__(
        self,
        source: str | list | dict = 'neck',
        temperature: float = 1.0,
        loss_weight: float = 10.0,
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(source, teacher, schedules, init_cfg)
        if temperature <= 0:
            raise ValueError(
                f'`temperature` must be above 0, but got {temperature}.'
            )
        self.temperature, self.loss_weight = temperature, loss_weight
        self.aligns: Aligns

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """On maps, also in a classifier."""
        match = pair.match(maps=True)
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
        """Build what brings the student to the teacher's channels."""
        maps = levels_of(student_feats, self.student_sources)
        targets = levels_of(teacher_feats, self.teacher_sources)
        check_maps(student_feats=maps, teacher_feats=targets, method='CWD')
        self.aligns = Aligns(maps, targets)

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_cwd``."""
        maps = self.aligns(levels_of(student_feats, self.student_sources))
        targets = levels_of(teacher_feats, self.teacher_sources)
        terms = [
            channel_wise_loss(
                student_feat=s, teacher_feat=t, temperature=self.temperature
            )
            for s, t in zip(maps, targets, strict=True)
        ]
        return {'loss_cwd': self.loss_weight * torch.stack(terms).sum()}

    def loss_weights(self) -> dict[str, float]:
        """Weight of the only term."""
        return {'loss_cwd': self.loss_weight}
