"""ReviewKD: shallow features of the teacher reviewed by deep ones.

Legend: N batch, C channels, L levels, shallow to deep.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, mse_loss

from ..core import BaseDistiller, Features, MeasuredPair, Plan
from ..layers import check_maps, full_precision, levels_of
from ..registry import MODELS

#: Sides of the pooled maps of the hierarchical context loss.
SIDES = (4, 2, 1)
#: Maximum number of channels of the fused features.
MOST_CHANNELS = 512


def hierarchical_loss(*, student_feat: Tensor, teacher_feat: Tensor) -> Tensor:
    """HCL: mean squared error at several resolutions.

        sum_k w_k mean (pool_k(S) - pool_k(T))^2 / sum_k w_k,

    over the map itself with w = 1, and pooled to 4x4, 2x2 and 1x1 with w =
    1/2, 1/4 and 1/8. Sizes that are not smaller than the map's height are
    skipped, without using up their weight.

    Source: ReviewKD, Chen et al., arXiv 2104.09044, section 3.3; weights are
    [official code].

    Shape:
        - student_feat, teacher_feat: ``(N, C, H, W)``
        - out: scalar
    """
    student, teacher = (
        full_precision(feat) for feat in (student_feat, teacher_feat)
    )
    loss = mse_loss(student, teacher)
    weight = total = 1.0
    for side in SIDES:
        if side >= student.shape[2]:
            continue
        weight /= 2
        total += weight
        loss = loss + weight * mse_loss(
            adaptive_avg_pool2d(student, side),
            adaptive_avg_pool2d(teacher, side),
        )
    return loss / total


class AttentionFusion(nn.Module):
    """ABF: fuses a level of the student with the result of deeper levels.

        x' = BN(1x1(x)),  y' = nearest(y) in the size of x'
        a, b = sigmoid(1x1([x', y']))            one map each
        fused = a x' + b y' (x' at the deepest level), in the teacher's size
        out = BN(3x3(fused))

    Source: ReviewKD, arXiv 2104.09044, section 3.3; layers and their
    initial values are [official code].

    Args:
        in_channels: Channels of the student's level.
        mid_channels: Channels of the fused features.
        out_channels: Channels of the teacher's level.
        fuse: False at the deepest level.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        fuse: bool,
    ) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(mid_channels),
        )
        self.expand = nn.Sequential(
            nn.Conv2d(
                mid_channels,
                out_channels,
                kernel_size=3,
                padding=1,
                bias=False,
            ),
            nn.BatchNorm2d(out_channels),
        )
        self.attend = (
            nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid())
            if fuse
            else None
        )
        for layer in (self.reduce[0], self.expand[0]):
            nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(
        self, feat: Tensor, deeper: Tensor | None, size: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """The level in the teacher's shape, and the features to fuse further.

        Args:
            feat: The student's level.
            deeper: Fused features of the deeper level; None at the deepest.
            size: Height and width of the teacher's level.
        """
        fused = self.reduce(feat)
        if self.attend is not None:
            assert deeper is not None
            deeper = interpolate(deeper, fused.shape[2:], mode='nearest')
            shares = self.attend(torch.cat([fused, deeper], dim=1))
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        if fused.shape[2:] != size:
            fused = interpolate(fused, size, mode='nearest')
        return self.expand(fused), fused


@MODELS.register_module()
class ReviewKDDistiller(BaseDistiller):
    """Knowledge review.

        L = loss_weight * sum_l HCL(R_l, T_l)

    R_l is the attention-based fusion of the student's levels l and deeper. It
    is trained with the student.

    Source: ReviewKD, arXiv 2104.09044. Weight 1 is that of its released
    detectors and ImageNet classifiers; on CIFAR-100 it is up to 8, depending
    on the pair, with a ramp over 20 epochs (``schedules``). The released
    classifiers compare features before the last ReLU of a stage, and their
    pooled features as a 1x1 map; here a stage is the output of its module,
    after the ReLU [ours].

    Args:
        source: Modules whose outputs are the levels, shallow to deep. In a
            classifier the stages of its backbone and the neck.
        loss_weight: Weight of the sum over levels.
        teacher: Name of the teacher.
        schedules: Schedules of ``loss_reviewkd``; see ``BaseDistiller``.
        init_cfg: As in mmengine.

    Shape:
        - levels: ``(N, C, H, W)``, or ``(N, C)`` as maps of 1x1

    Raises:
        ValueError: Tokens, or different numbers of levels.
    """

    def __init__(
        self,
        source: str | list | dict = 'neck',
        loss_weight: float = 1.0,
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(source, teacher, schedules, init_cfg)
        self.loss_weight = loss_weight
        self.fusions: nn.ModuleList

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """On a neck's levels; in a classifier on stages and pooled features.

        Set the ramp of the released CIFAR-100 recipe by hand: its length in
        iterations depends on the schedule.
        """
        match = (
            pair.match()
            if pair.is_detector
            else pair.match_stages(pooled=True)
        )
        return Plan(
            dict(type=f'era_mm.{cls.__name__}', **match.config()), match
        )

    @staticmethod
    def _maps(feats: Features, sources: tuple[str, ...]) -> list[Tensor]:
        return [
            feat[..., None, None] if feat.dim() == 2 else feat
            for feat in levels_of(feats, sources)
        ]

    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Build the fusion, deepest level first."""
        maps = self._maps(student_feats, self.student_sources)
        targets = self._maps(teacher_feats, self.teacher_sources)
        check_maps(
            student_feats=maps,
            teacher_feats=targets,
            method='ReviewKD',
            same_size=False,
        )
        middle = min(MOST_CHANNELS, maps[-1].shape[1])
        self.fusions = nn.ModuleList(
            AttentionFusion(
                feat.shape[1],
                middle,
                target.shape[1],
                fuse=level < len(maps) - 1,
            )
            for level, (feat, target) in enumerate(
                zip(maps, targets, strict=True)
            )
        )

    def review(
        self, maps: list[Tensor], sizes: list[torch.Size]
    ) -> list[Tensor]:
        """The student's levels in the teacher's shapes, shallow to deep.

        Args:
            maps: The student's levels.
            sizes: Height and width of the teacher's levels.
        """
        reviewed, fused = [], None
        for fusion, feat, size in zip(
            reversed(self.fusions),
            reversed(maps),
            reversed(sizes),
            strict=True,
        ):
            out, fused = fusion(feat, fused, size)
            reviewed.append(out)
        return reviewed[::-1]

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_reviewkd``."""
        maps = self._maps(student_feats, self.student_sources)
        targets = self._maps(teacher_feats, self.teacher_sources)
        reviewed = self.review(maps, [t.shape[2:] for t in targets])
        terms = [
            hierarchical_loss(student_feat=r, teacher_feat=t)
            for r, t in zip(reviewed, targets, strict=True)
        ]
        return {'loss_reviewkd': self.loss_weight * torch.stack(terms).sum()}

    def loss_weights(self) -> dict[str, float]:
        """Weight of the only term."""
        return {'loss_reviewkd': self.loss_weight}
