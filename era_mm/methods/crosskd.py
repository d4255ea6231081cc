"""CrossKD: intermediate features of the student's head enter the teacher's.

Legend: N batch, K classes, L levels, R positions (or anchors) of a batch.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    kl_div,
    log_softmax,
)

from ..core import BaseDistiller, Features, MeasuredPair, Plan, Unregistered
from ..core.classes import why_other_classes
from ..core.host_models import is_query_based
from ..heads import (
    DenseTWIHead,
    PredictorTWIHead,
    find_head,
    plain_towers,
    predictors_of,
    tower_sources,
    why_no_sigmoid_scores,
    why_not_comparable,
)
from ..layers import crop_to_common, full_precision, rows_of_levels
from ..registry import MODELS

#: Number of layers of the student's towers before the crossing.
LAYER = 3
#: Released weights of the boxes, by what the teacher's head predicts.
BOX_WEIGHT, DISTRIBUTION_WEIGHT = 1.0, 4.0


def match_statistics(
    *, student_feat: Tensor, teacher_feat: Tensor, eps: float = 1e-5
) -> Tensor:
    """Give the student's channels the teacher's mean and deviation.

        (F_s - mean_s) * sqrt((var_t + eps) / (var_s + eps)) + mean_t

    mean and var (biased) are of a channel over batch and positions; on
    several ranks, of each rank's images. The student's are not detached, as
    in a norm, so no gradient moves the mean or scale of a channel, which the
    teacher's head would not notice. The teacher's are constants.

    Source: CrossKD, arXiv 2306.11369, in its released form. That the
    statistics are the batch's, their gradient and eps, which is that of batch
    norm, are [ours].

    Shape:
        - student_feat, teacher_feat, out: ``(N, C, H, W)``
    """
    student, teacher = map(full_precision, (student_feat, teacher_feat))
    var, mean = torch.var_mean(student, (0, 2, 3), correction=0, keepdim=True)
    target_var, target_mean = torch.var_mean(
        teacher.detach(), (0, 2, 3), correction=0, keepdim=True
    )
    scale = ((target_var + eps) / (var + eps)).sqrt()
    matched = (student - mean) * scale + target_mean
    return matched.to(student_feat.dtype)


def quality_focal_loss(
    *, student_logits: Tensor, teacher_scores: Tensor, beta: float = 1.0
) -> Tensor:
    """Cross-entropy to soft labels, weighted by the error of the score.

        sum_rk |sigmoid(z) - q|^beta * BCE(z, q)

    Source: quality focal loss, Li et al., arXiv 2006.04388, eq. 3, without
    its mean; beta 1 is CrossKD's released configs' (2 is GFL's).

    Shape:
        - student_logits, teacher_scores: ``(R, K)``
        - out: scalar
    """
    gap = (student_logits.sigmoid() - teacher_scores).abs().pow(beta)
    cross = binary_cross_entropy_with_logits(
        student_logits, teacher_scores, reduction='none'
    )
    return (gap * cross).sum()


def weighted_giou_loss(
    *, student_boxes: Tensor, teacher_boxes: Tensor, weights: Tensor
) -> Tensor:
    """Mean of 1 - GIoU, weighted.

        sum_r w_r (1 - GIoU(b_r, t_r)) / sum_r w_r

    Source: GIoU is arXiv 1902.09630.

    Shape:
        - student_boxes, teacher_boxes: ``(R, 4)``, corners in pixels
        - weights: ``(R,)``
        - out: scalar
    """
    from mmdet.structures.bbox import bbox_overlaps

    giou = bbox_overlaps(
        student_boxes, teacher_boxes, mode='giou', is_aligned=True
    )
    return (weights * (1 - giou)).sum() / weights.sum().clamp(min=1e-6)


@MODELS.register_module()
class CrossKDDistiller(BaseDistiller):
    """Cross-head distillation of dense detectors.

    The outputs of the ``layer``-th layers of the student's two towers get the
    mean and deviation of the teacher's, channel by channel, and go through
    the rest of the teacher's frozen head. The result is pulled towards the
    head's outputs for the teacher's own features::

        z = head_T^{> layer}(match(align(f_S), f_T)),   t = head_T(F_T)
        loss_crosskd_score = score_weight * QFL(z_cls, sigmoid(t_cls)) / sum w
        loss_crosskd_box   = box_weight * sum_r w_r D(z_r, t_r) / sum w

    match is :func:`match_statistics`, level by level. w_r is the teacher's
    highest score at a position; D is 1 - GIoU of decoded boxes or, for heads
    that predict distributions (GFL), the KL summed over the bins, averaged
    over the four sides. The student's own last layers are trained only by the
    labels.

    Source: CrossKD, Wang et al., arXiv 2306.11369, section 3. ``layer`` 3 of
    4, the weights, QFL's beta of 1 and the matched statistics are its
    released settings. What is summed and averaged inside the losses is not
    known to us; dividing by sum w and D's mean over the sides are [ours], as
    are the 1x1 convolutions (one per tower, for all levels; without bias,
    which the matching would remove) where the towers' widths differ. Written
    from the paper.

    Args:
        layer: Number of layers of the student's towers before the crossing.
            None: 3, or all if there are fewer. If the teacher's towers are
            shorter, the features enter its predictors.
        score_weight: Weight of the scores.
        box_weight: Weight of the boxes. None: 1; 4 for heads that predict
            distributions.
        beta: Exponent of the quality focal loss.
        teacher: Name of the teacher.
        schedules: Schedules of ``loss_crosskd_score`` and
            ``loss_crosskd_box``; see ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Heads without two towers that the levels share or without
            sigmoid scores, different levels, or a teacher that is trained.
    """

    #: Gradients pass through the teacher's head.
    needs_frozen_teacher = True

    def __init__(
        self,
        layer: int | None = None,
        score_weight: float = 1.0,
        box_weight: float | None = None,
        beta: float = 1.0,
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__('neck', teacher, schedules, init_cfg)
        self.layer = layer
        self.score_weight, self.beta = score_weight, beta
        self._given_box_weight = box_weight
        self.box_weight: float
        self.rest: PredictorTWIHead
        self.aligns: nn.ModuleList

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """For two dense detectors of the same levels.

        Raises:
            ValueError: The pair is of another kind.
        """
        match = pair.match()
        reason = _why_not(pair.student.model, pair.teacher.model)
        reason = reason or why_other_classes(
            pair.student.classes, pair.teacher.classes
        )
        if reason is None and (match.resample or match.unused()):
            reason = 'their levels have other strides'
        if reason is not None:
            raise ValueError(
                f'CrossKD cannot pair these: {reason}. Take a '
                'method on features.'
            )
        kind = type(pair.teacher.model.bbox_head).__name__
        return Plan(
            dict(type=f'era_mm.{cls.__name__}'),
            match,
            head=f"the student's towers go on in the teacher's {kind}",
        )

    def choose_sources(
        self, *, student: nn.Module, teacher: nn.Module | None
    ) -> None:
        """Layers of the student's towers; what the teacher's head reads."""
        assert teacher is not None
        reason = _why_not(student, teacher)
        if reason is not None:
            raise ValueError(
                f'CrossKD cannot pair these: {reason}. Take a method on '
                'features.'
            )
        towers = plain_towers(student).values()
        layer = self.layer
        if layer is None:
            layer = min(LAYER, *map(len, towers))
        self.student_sources = tower_sources(student, layer)
        has_neck = getattr(teacher, 'neck', None) is not None
        self.teacher_sources = ('neck' if has_neck else 'backbone',)
        theirs = plain_towers(teacher)
        left_out = min(layer, *map(len, theirs.values()))
        self.rest = PredictorTWIHead(predictors_of(teacher, left_out))
        self._towers = [
            Unregistered(nn.Sequential(*tower[:left_out]))
            for tower in theirs.values()
        ]
        self._widths = [
            tower[left_out - 1].out_channels for tower in theirs.values()
        ]
        weight = self._given_box_weight
        if weight is None:
            weight = BOX_WEIGHT if self._bins == 1 else DISTRIBUTION_WEIGHT
        self.box_weight = weight

    @torch.no_grad()
    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Build what aligns the towers; run the teacher's head once."""
        own = [student_feats[source] for source in self.student_sources]
        theirs = teacher_feats[self.teacher_sources[0]]
        grids = [[tuple(f.shape[2:]) for f in one] for one in (*own, theirs)]
        if not grids[0] == grids[1] == grids[2]:
            raise ValueError(
                f"CrossKD needs pairs of levels, but the student's towers "
                f"have {grids[0]} and {grids[1]} and the teacher's head reads "
                f'{grids[2]}. Give both necks the same levels.'
            )
        self.aligns = nn.ModuleList(
            nn.Identity()
            if maps[0].shape[1] == width
            else nn.Conv2d(maps[0].shape[1], width, kernel_size=1, bias=False)
            for maps, width in zip(own, self._widths, strict=True)
        )
        told = self._tower_outputs(theirs)
        outs = self.rest.training_forward(told)
        self._leave_boxes_if(self._why_no_boxes(outs))
        self._compare(self._cross(own, told), outs)

    @property
    def feature_pairs(self) -> tuple[tuple[str, str], ...]:
        """None: features are only what the heads read."""
        return ()

    @property
    def uses_predictions(self) -> bool:
        """Always: the crossed ones learn to be them."""
        return True

    @property
    def _bins(self) -> int:
        """Bins of a distribution; 1 if a side of a box is one number."""
        return getattr(self.rest.head, 'reg_max', 0) + 1

    def _why_no_boxes(self, outs: Any) -> str | None:
        head = self.rest.head
        anchors = outs[0][0].shape[1] // head.cls_out_channels
        widths = {level.shape[1] for level in outs[1]}
        name = type(head).__name__
        if widths != {4 * self._bins * anchors}:
            return f'{name} predicts no four sides of a box'
        if self._bins == 1 and not (
            hasattr(head, 'bbox_coder') and hasattr(head, 'prior_generator')
        ):
            return f'{name} has no priors and coder to decode boxes with'
        return None

    def _leave_boxes_if(self, reason: str | None) -> None:
        if self.box_weight and reason is not None:
            self.box_weight = 0.0
            print_log(
                f'CrossKD without boxes: {reason}.',
                logger='current',
                level=logging.WARNING,
            )

    # -- losses ------------------------------------------------------------

    def _tower_outputs(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """The teacher's own features where the student's enter its head."""
        return [tower.module(f) for tower in self._towers for f in feats]

    def _cross(
        self, towers: Sequence[Sequence[Tensor]], told: Sequence[Tensor]
    ) -> Any:
        """Outputs of the rest of the teacher's head for student's towers."""
        aligned = [
            align(feat)
            for align, tower in zip(self.aligns, towers, strict=True)
            for feat in tower
        ]
        feats = [
            match_statistics(student_feat=own, teacher_feat=their)
            for own, their in zip(aligned, told, strict=True)
        ]
        return self.rest.training_forward(feats)

    def _compare(self, crossed: Any, said: Any) -> dict[str, Tensor]:
        classes = self.rest.head.cls_out_channels
        logits, told = (
            full_precision(rows_of_levels(outs[0], classes).flatten(0, 1))
            for outs in (crossed, said)
        )
        scores = told.sigmoid()
        weights = scores.amax(dim=1)
        score = quality_focal_loss(
            student_logits=logits, teacher_scores=scores, beta=self.beta
        )
        losses = {
            'loss_crosskd_score': self.score_weight
            * score
            / weights.sum().clamp(min=1e-6)
        }
        if self.box_weight:
            losses['loss_crosskd_box'] = self.box_weight * self._box_loss(
                crossed[1], said[1], weights
            )
        return losses

    def _box_loss(
        self,
        crossed: Sequence[Tensor],
        said: Sequence[Tensor],
        weights: Tensor,
    ) -> Tensor:
        if self._bins == 1:
            student, teacher = (
                self._decode(levels) for levels in (crossed, said)
            )
            return weighted_giou_loss(
                student_boxes=student, teacher_boxes=teacher, weights=weights
            )
        student, teacher = (
            log_softmax(
                full_precision(
                    rows_of_levels(levels, 4 * self._bins)
                    .flatten(0, 1)
                    .unflatten(1, (4, self._bins))
                ),
                dim=2,
            )
            for levels in (crossed, said)
        )
        gap = kl_div(student, teacher, reduction='none', log_target=True)
        gap = gap.sum(dim=2).mean(dim=1)
        return (weights * gap).sum() / weights.sum().clamp(min=1e-6)

    def _decode(self, levels: Sequence[Tensor]) -> Tensor:
        """Boxes in pixels, image by image, ``(R, 4)``."""
        head = self.rest.head
        sizes = [level.shape[2:] for level in levels]
        priors = head.prior_generator.grid_priors(
            sizes, device=levels[0].device
        )
        if getattr(head, 'norm_on_bbox', False):
            # FCOS: in training form the distances are in strides.
            levels = [
                level * stride
                for level, stride in zip(levels, head.strides, strict=True)
            ]
        coded = full_precision(rows_of_levels(levels, 4))
        places = torch.cat(priors).repeat(len(coded), 1)
        return head.bbox_coder.decode(places, coded.flatten(0, 1))

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_crosskd_score`` and ``loss_crosskd_box``."""
        towers = []
        feats: Sequence[Tensor] = teacher_feats[self.teacher_sources[0]]
        for source in self.student_sources:
            # If padding differs, the common part.
            maps, feats = crop_to_common(
                student_feats=student_feats[source], teacher_feats=feats
            )
            towers.append(maps)
        with torch.no_grad():
            told = self._tower_outputs(feats)
            said = self.rest.training_forward(told)
        return self._compare(self._cross(towers, told), said)

    def loss_weights(self) -> dict[str, float]:
        """Weights of scores and boxes."""
        weights = {'loss_crosskd_score': self.score_weight}
        if self.box_weight:
            weights['loss_crosskd_box'] = self.box_weight
        return weights


def _why_not(student: nn.Module, teacher: nn.Module) -> str | None:
    """The reason why two models cannot be crossed, or None."""
    for owner, model in (('student', student), ('teacher', teacher)):
        if is_query_based(model) or not isinstance(
            find_head(model), DenseTWIHead
        ):
            return f'the {owner} ({type(model).__name__}) has no dense head'
        try:
            plain_towers(model)
        except ValueError:
            return (
                f"the {owner}'s {type(model.bbox_head).__name__} has no two "
                'towers that the levels share (cls_convs and reg_convs)'
            )
    reason = why_not_comparable(student, teacher)
    if reason is not None:
        return reason
    reason = why_no_sigmoid_scores(teacher.bbox_head)
    return (
        reason and f"the teacher's {type(teacher.bbox_head).__name__} {reason}"
    )
