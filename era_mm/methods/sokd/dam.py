"""DAM: heads that both features share, and the losses on areas.

Legend: N batch, C channels, P areas, L levels. F_s is the student's feature
in the teacher's space, F_t' the refined teacher's, both ``(N, C, H, W)``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from ...layers import FormerNames, full_precision
from ...registry import explain_unknown_keys
from .areas import (
    AreaDecoder,
    Areas,
    Prediction,
    Targets,
    attention_targets,
    box_targets,
)


class DAMHead(nn.Module):
    """Heat map, size and offset of a feature; one set of weights for both.

        conv 3x3 (C -> feat_channels) - ReLU - conv 1x1 (-> 1, 2, 2)

    for each of the three. The heat map's bias begins at the probability 0.1.

    Source: one set of three head branches for teacher and student is SoKD
    [paper, Fig. 3]; their form is CenterNet's [inference].

    Args:
        in_channels: C.
        feat_channels: Channels between the two convolutions. 64 is
            CenterNet's.

    Shape:
        - in: ``(N, C, H, W)``
        - out: ``Prediction``
    """

    def __init__(self, in_channels: int, feat_channels: int = 64) -> None:
        super().__init__()
        self.heatmap, self.size, self.offset = (
            nn.Sequential(
                nn.Conv2d(in_channels, feat_channels, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(feat_channels, num, 1),
            )
            for num in (1, 2, 2)
        )
        nn.init.constant_(self.heatmap[-1].bias, -math.log(0.9 / 0.1))

    def forward(self, feat: Tensor) -> Prediction:
        """The prediction, in float32."""
        return Prediction(
            full_precision(self.heatmap(feat)),
            full_precision(self.size(feat)),
            full_precision(self.offset(feat)),
        )


def agreement_loss(*, student: Prediction, teacher: Prediction) -> Tensor:
    """The heads should have the same outputs for both features.

        L_D = sum_i mean( (conv_i(F_s) - conv_i(F_t'))^2 )

    over heat map (logits), size and offset.

    Source: SoKD [paper, by readers' notes]; the mean is [ours].

    Shape:
        - out: scalar
    """
    terms = [mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(terms).sum()


def area_loss(
    *,
    student_feat: Tensor,
    teacher_feat: Tensor,
    masks: Tensor,
    reduction: str = 'mean',
) -> Tensor:
    """Distance between the features inside the areas.

        L_DA = sum_i || M_i * F_s - M_i * F_t' ||^2      'sum', per sample
             = mean of (F_s - F_t')^2 inside the M_i               'mean'

    Overlaps of two areas count twice. It is 0 without areas.

    Source: SoKD [paper, by readers' notes]: 'sum'. 'mean' is [inference].

    Args:
        student_feat: F_s.
        teacher_feat: F_t'.
        masks: M_i.
        reduction: 'mean' or 'sum'.

    Shape:
        - student_feat, teacher_feat: ``(N, C, H, W)``
        - masks: ``(N, P, H, W)``
        - out: scalar
    """
    error = (
        full_precision(student_feat) - full_precision(teacher_feat)
    ).square()
    # M_i is squared with the difference; of a hard one it is the same.
    weight = masks.square().sum(1, keepdim=True)
    total = (error * weight).sum()
    if reduction == 'sum':
        return total / len(error)
    return total / (weight.sum() * error.shape[1]).clamp(min=1)


@explain_unknown_keys
class DAM(FormerNames):
    """Distinctive area detection module.

        loss_sokd_agree  = agree_weight  * mean_l L_D
        loss_sokd_area   = area_weight   * mean_l L_DA
        loss_sokd_anchor = anchor_weight * (focal + 0.1 * L1(size)
                                            + L1(offset)) / number of centres

    L_D alone has a trivial solution, heads with constant outputs. The anchor
    loss trains the heads on the teacher's feature:

    - 'boxes': centres of the ground truth, as in CenterNet; for detectors.
    - 'attention': peaks of the teacher's attention; for data without boxes.

    It trains only the heads; the student is trained by L_D. [ours]

    Heads are shared by levels of equal channels; where channels differ, each
    level has its own.

    Source: SoKD, arXiv 2409.18785. Heads, L_D and L_DA are [paper, by
    readers' notes]; what supervises the heads is not known: the anchor is
    [inference], its losses and their weights CenterNet's. All other weights
    are [inference].

    Args:
        in_channels: The teacher's channels, by level.
        feat_channels: See ``DAMHead``.
        decoder: Arguments of ``AreaDecoder``.
        agree_weight: Weight of L_D; 0 turns it off.
        area_weight: Weight of L_DA; 0 turns the areas off.
        area_reduction: See :func:`area_loss`.
        anchor: 'attention', 'boxes' or None for none.
        anchor_weight: Its weight.

    Raises:
        ValueError: Unknown settings, or a combination that trains nothing.
    """

    ANCHORS = ('attention', 'boxes', None)
    #: Settings for 'head' (`paramwise_cfg.custom_keys`) hold for every name
    #: that contains it.
    former_names: ClassVar[dict[str, str]] = {'heads': 'predictors'}

    def __init__(
        self,
        in_channels: Sequence[int],
        feat_channels: int = 64,
        decoder: dict | None = None,
        agree_weight: float = 1.0,
        area_weight: float = 1.0,
        area_reduction: str = 'mean',
        anchor: str | None = 'attention',
        anchor_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if anchor not in self.ANCHORS:
            raise ValueError(
                f'`dam.anchor` must be one of {self.ANCHORS}, but got '
                f'{anchor!r}.'
            )
        if area_reduction not in ('mean', 'sum'):
            raise ValueError(
                "`dam.area_reduction` must be 'mean' or 'sum', but got "
                f'{area_reduction!r}.'
            )
        if min(agree_weight, area_weight) < 0 or anchor_weight <= 0:
            raise ValueError(
                'DAM needs agree_weight and area_weight of 0 or more and '
                f'anchor_weight above 0 (anchor=None for none), but got '
                f'{agree_weight}, {area_weight} and {anchor_weight}.'
            )
        if agree_weight == 0 and area_weight == 0:
            raise ValueError(
                'With agree_weight=0 and area_weight=0 DAM teaches the '
                'student nothing. Set dam=False.'
            )
        if agree_weight == 0 and anchor is None:
            raise ValueError(
                'With agree_weight=0 and anchor=None nothing trains the heads '
                "that find the areas. Set anchor='attention' or 'boxes', or "
                'dam=False.'
            )
        shared = len(set(in_channels)) == 1
        self.num_levels = len(in_channels)
        self.predictors = nn.ModuleList(
            DAMHead(channels, feat_channels)
            for channels in (in_channels[:1] if shared else in_channels)
        )
        self.decoder = AreaDecoder(**(decoder or {}))
        self.agree_weight, self.area_weight = agree_weight, area_weight
        self.area_reduction = area_reduction
        self.anchor, self.anchor_weight = anchor, anchor_weight
        self.focal = (
            MMENGINE_MODELS.build(
                dict(type='mmdet.GaussianFocalLoss', reduction='sum')
            )
            if anchor
            else None
        )

    def predict(self, feats: Sequence[Tensor]) -> list[Prediction]:
        """The heads' predictions by level."""
        shared = len(self.predictors) == 1
        return [
            self.predictors[0 if shared else level](feat)
            for level, feat in enumerate(feats)
        ]

    def areas(
        self, student: Sequence[Prediction], teacher: Sequence[Prediction]
    ) -> list[Areas]:
        """The areas by level."""
        return [
            self.decoder(student=s, teacher=t)
            for s, t in zip(student, teacher, strict=True)
        ]

    def _targets(
        self, teacher_feats: Sequence[Tensor], data_samples: Sequence[Any]
    ) -> list[Targets]:
        if self.anchor == 'attention':
            topk = self.decoder.topk
            return [attention_targets(feat, topk) for feat in teacher_feats]
        from mmdet.structures.bbox import get_box_tensor

        return box_targets(
            [get_box_tensor(s.gt_instances.bboxes) for s in data_samples],
            tuple(data_samples[0].batch_input_shape),
            [(feat.shape[2], feat.shape[3]) for feat in teacher_feats],
            teacher_feats[0].device,
        )

    def anchor_loss(
        self,
        predictions: Sequence[Prediction],
        targets: Sequence[Targets],
    ) -> Tensor:
        """CenterNet's losses of the levels together, weighted.

        Args:
            predictions: Predictions for the teacher's features.
            targets: Their targets.
        """
        assert self.focal is not None
        total = predictions[0].heatmap.new_zeros(())
        centres = total
        for found, target in zip(predictions, targets, strict=True):
            total = total + self.focal(found.heatmap.sigmoid(), target.heatmap)
            for value, wanted, weight in (
                (found.size, target.size, 0.1),
                (found.offset, target.offset, 1.0),
            ):
                error = l1_loss(value, wanted, reduction='none')
                # Of two numbers each; CenterNet takes their mean.
                total = total + weight * (error * target.weight).sum() / 2
            centres = centres + target.weight.sum()
        return self.anchor_weight * total / centres.clamp(min=1)

    def loss_weights(self) -> dict[str, float]:
        """Weights of the active terms."""
        weights = {
            'agree': self.agree_weight,
            'anchor': self.anchor_weight if self.anchor else 0.0,
            'area': self.area_weight,
        }
        return {f'loss_sokd_{k}': w for k, w in weights.items() if w}

    def losses(
        self,
        *,
        student: Sequence[Prediction],
        teacher: Sequence[Prediction],
        teacher_feats: Sequence[Tensor],
        data_samples: Sequence[Any],
    ) -> dict[str, Tensor]:
        """``loss_sokd_agree`` and ``loss_sokd_anchor``, if they are active.

        Args:
            student: Predictions on F_s.
            teacher: Predictions on F_t'.
            teacher_feats: F_t, not refined.
            data_samples: Ground truth.
        """
        losses: dict[str, Tensor] = {}
        if self.agree_weight:
            terms = [
                agreement_loss(student=s, teacher=t)
                for s, t in zip(student, teacher, strict=True)
            ]
            losses['loss_sokd_agree'] = (
                self.agree_weight * torch.stack(terms).mean()
            )
        if self.anchor:
            losses['loss_sokd_anchor'] = self.anchor_loss(
                teacher, self._targets(teacher_feats, data_samples)
            )
        return losses

    def area_losses(
        self,
        *,
        student_feats: Sequence[Tensor],
        teacher_feats: Sequence[Tensor],
        areas: Sequence[Areas],
    ) -> Mapping[str, Tensor]:
        """``loss_sokd_area``.

        Args:
            student_feats: F_s.
            teacher_feats: F_t'.
            areas: Areas by level.
        """
        terms = [
            area_loss(
                student_feat=s,
                teacher_feat=t,
                masks=level.masks,
                reduction=self.area_reduction,
            )
            for s, t, level in zip(
                student_feats, teacher_feats, areas, strict=True
            )
        ]
        return {'loss_sokd_area': self.area_weight * torch.stack(terms).mean()}
