"""MGD: the teacher's map generated from a masked map of the student.

Legend: N batch, C channels of the teacher, L levels.
"""

from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from torch import Tensor, nn

from ..core import BaseDistiller, Features, MeasuredPair, Plan
from ..layers import Aligns, check_maps, full_precision, levels_of
from ..registry import MODELS


def generation_loss(*, student_feat: Tensor, teacher_feat: Tensor) -> Tensor:
    """Squared error, summed over an image and averaged over images.

        1 / N * sum_nchw (G - T)^2

    Source: MGD, Yang et al., arXiv 2205.01529, eq. 4; the mean over images is
    [official code].

    Shape:
        - student_feat, teacher_feat: ``(N, C, H, W)``
        - out: scalar
    """
    student, teacher = (
        full_precision(feat) for feat in (student_feat, teacher_feat)
    )
    return (student - teacher).square().sum() / len(student)


def keep_mask(
    feat: Tensor,
    mask_ratio: float,
    generator: torch.Generator,
    mask: str = 'positions',
) -> Tensor:
    """1 where a map is kept, 0 where it is masked, drawn for each image.

    Source: MGD, arXiv 2205.01529, eq. 1; 'channels' is the [official code]
    for classifiers.

    Args:
        feat: The map to be masked.
        mask_ratio: Average share of what is masked.
        generator: On the CPU, so that every device draws the same.
        mask: 'positions', the same ones in all channels, or whole
            'channels'.

    Shape:
        - feat: ``(N, C, H, W)``
        - out: ``(N, 1, H, W)`` for positions, ``(N, C, 1, 1)`` for channels
    """
    num, channels, *places = feat.shape
    size = (num, channels, 1, 1) if mask == 'channels' else (num, 1, *places)
    drawn = torch.rand(size, generator=generator)
    return (drawn >= mask_ratio).to(feat)


@MODELS.register_module()
class MGDDistiller(BaseDistiller):
    """Masked generative distillation.

        L = loss_weight * sum_l MGD(G_l(M * align_l(S_l)), T_l)

    M masks random positions, the same for all channels, or random channels;
    G is a 3x3 convolution, a ReLU and a 3x3 convolution; ``align`` is a 1x1
    convolution if the channels differ. All are trained with the student.

    Source: MGD, arXiv 2205.01529, and its [official code]. The defaults are
    those of one-stage detectors [paper]: 2e-5 and 0.65 of the positions;
    two-stage ones have 5e-7 and 0.45. ImageNet classifiers have 7e-5 and 0.15
    on the last map of the backbone, of the channels [official code].
    ``plan_for`` chooses among them. The paper's detectors also start from the
    teacher's neck and head: ``inherit`` of ``era_mm.Distillation``. The loss
    is a sum over channels and positions, so its weight depends on the size of
    the maps.

    Masks are drawn with a seed from the iteration number [ours], so a resumed
    run draws the same masks, and the run's random state does not change.

    Args:
        source: Module whose output is distilled, maps ``(N, C, H, W)``; of
            several all are levels.
        mask_ratio: Share of the positions or channels that are masked.
        loss_weight: Weight of each level.
        mask: What is masked: 'positions' or 'channels'.
        teacher: Name of the teacher.
        schedules: Schedules of ``loss_mgd``; see ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Features that are not maps or do not fit, a ratio outside
            of 0 to 1, an unknown mask.
    """

    MASKS = ('positions', 'channels')

    def __init__(
        self,
        source: str | list | dict = 'neck',
        mask_ratio: float = 0.65,
        loss_weight: float = 2e-5,
        mask: str = 'positions',
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(source, teacher, schedules, init_cfg)
        if not 0 <= mask_ratio < 1:
            raise ValueError(
                '`mask_ratio` must be at least 0 and less than 1, but got '
                f'{mask_ratio}.'
            )
        if mask not in self.MASKS:
            raise ValueError(
                f'`mask` must be one of {self.MASKS}, but got {mask!r}.'
            )
        self.mask_ratio, self.loss_weight = mask_ratio, loss_weight
        self.mask = mask
        self.aligns: Aligns
        self.generators: nn.ModuleList

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """On maps, with the paper's settings for such models."""
        match = pair.match(maps=True)
        settings: dict[str, Any] = {}
        if not pair.is_detector:
            settings = dict(mask='channels', mask_ratio=0.15, loss_weight=7e-5)
        elif hasattr(pair.student.model, 'roi_head'):
            settings = dict(mask_ratio=0.45, loss_weight=5e-7)
        return Plan(
            dict(type=f'era_mm.{cls.__name__}', **match.config(), **settings),
            match,
        )

    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Build the align layers and the generators."""
        maps = levels_of(student_feats, self.student_sources)
        targets = levels_of(teacher_feats, self.teacher_sources)
        check_maps(student_feats=maps, teacher_feats=targets, method='MGD')
        self.aligns = Aligns(maps, targets)
        self.generators = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, kernel_size=3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, width, kernel_size=3, padding=1),
            )
            for width in (target.shape[1] for target in targets)
        )

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_mgd``."""
        maps = self.aligns(levels_of(student_feats, self.student_sources))
        targets = levels_of(teacher_feats, self.teacher_sources)
        generator = torch.Generator()
        # Different masks on every rank.
        generator.manual_seed(self.step * get_world_size() + get_rank())
        terms = [
            generation_loss(
                student_feat=generate(
                    feat
                    * keep_mask(feat, self.mask_ratio, generator, self.mask)
                ),
                teacher_feat=target,
            )
            for generate, feat, target in zip(
                self.generators, maps, targets, strict=True
            )
        ]
        return {'loss_mgd': self.loss_weight * torch.stack(terms).sum()}

    def loss_weights(self) -> dict[str, float]:
        """Weight of the only term."""
        return {'loss_mgd': self.loss_weight}
