"""Losses between the outputs of dense heads.

Legend: N batch, K classes, R rows (anchors or regions), k rows of an image,
L levels, B numbers that encode a box.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..core import Features
from ..layers import (
    Rows,
    bernoulli_entropy,
    bernoulli_kl,
    best_rows,
    full_precision,
)
from ..registry import explain_unknown_keys
from .detector_term import DetectorTerm, Said
from .twi_blend import coder_of, same_priors
from .twi_heads import DenseTWIHead, TWIHead

Outputs = Any


#: Attributes of heads that predict objectness separately from the class.
OBJECTNESS = ('loss_obj', 'loss_conf', 'center_prior')


def why_no_sigmoid_scores(head: nn.Module) -> str | None:
    """The reason why a dense head has no sigmoid class logits, or None.

    Scores of anchors that the head itself predicts do not count: no other
    head's are of the same anchors.
    """
    loss = getattr(head, 'loss_cls', None)
    if any(hasattr(head, part) for part in OBJECTNESS):
        return 'predicts objectness separately from the class'
    # Guided anchors.
    if hasattr(head, 'loss_shape'):
        return 'predicts more than scores and boxes: their anchors as well'
    if (
        not getattr(loss, 'use_sigmoid', False)
        or getattr(loss, 'activated', False)
        or not getattr(head, 'cls_out_channels', 0)
    ):
        return 'has no sigmoid scores'
    return None


@explain_unknown_keys
class DenseTerm(DetectorTerm):
    """``DetectorTerm`` for dense heads, anchor-based or anchor-free.

    Rows are anchors or points, p and q sigmoid scores, w the teacher's
    highest score there. Heads without sigmoid class logits are refused:
    softmax, probabilities (TOOD), scores that are multiplied by an objectness
    (YOLO, AutoAssign), and guided anchors, which each head predicts itself.
    Boxes are compared if both heads are of the same type and encode boxes
    alike; if they predict distributions (GFL), by KL(t_r || b_r), in the same
    kind of unit as the scores.

    Source: ours.

    Args:
        weight: Weight of the scores.
        box_weight: Weight of the boxes.
        topk: Number of anchors per image.
    """

    #: Settings, besides type and coder, that define a head's box outputs.
    BOX_SETTINGS = ('norm_on_bbox', 'reg_max', 'reg_decoded_bbox')

    sources = ('bbox_head',)

    def __init__(
        self, weight: float = 1.0, box_weight: float = 1.0, topk: int = 100
    ) -> None:
        super().__init__(weight, box_weight, topk)
        self.num_levels = self.num_classes = self.box_width = 0

    def prepare(
        self,
        *,
        head: TWIHead,
        student: nn.Module | None,
        student_feats: Features,
        teacher_feats: Sequence[Tensor],
    ) -> str | None:
        """As in the base class."""
        if not isinstance(head, DenseTWIHead):
            return f'{type(head.head).__name__} is not a dense head'
        theirs = head.head
        own = theirs if student is None else student.bbox_head
        reason = self._why_not_scored(own, theirs)
        if reason is not None:
            return reason
        outs = head.training_forward(teacher_feats)
        self.num_levels = len(outs[0])
        if student is not None:
            found = student_feats[self.sources[0]][: self.num_levels]
            own_shapes, shapes = (
                [tuple(level.shape[1:]) for level in scores]
                for scores in (found, outs[0])
            )
            if own_shapes != shapes:
                return (
                    f'the student scores {own_shapes} and the teacher '
                    f'{shapes}: anchors and classes must agree'
                )
            if not same_priors(own, theirs, outs[0]):
                return (
                    'the anchors of the two have different sizes or positions'
                )
        self.num_classes = theirs.cls_out_channels
        self.bins = getattr(theirs, 'reg_max', 0) + 1
        self.box_width = 4 * self.bins
        if self.box_weight:
            reason = self._why_no_boxes(own, theirs, outs)
            if reason is not None:
                self._leave_boxes(reason)
        self._set_up_units(self.num_classes, self.box_width)
        return None

    def _why_no_scores(self, head: nn.Module) -> str | None:
        return why_no_sigmoid_scores(head)

    def _why_no_boxes(
        self, own: nn.Module, theirs: nn.Module, outs: Outputs
    ) -> str | None:
        names = [type(head).__name__ for head in (own, theirs)]
        if type(own) is not type(theirs):
            return f'{names[0]} and {names[1]} encode them differently'
        if coder_of(own) != coder_of(theirs) or any(
            getattr(own, name, None) != getattr(theirs, name, None)
            for name in self.BOX_SETTINGS
        ):
            return f'the two {names[0]}s encode them with different settings'
        anchors = outs[0][0].shape[1] // self.num_classes
        widths = {level.shape[1] for level in outs[1]}
        if widths != {anchors * self.box_width}:
            return f'{names[1]} does not predict the four sides of a box'
        return None

    def _outputs_at(
        self, outs: Outputs, rows: Rows
    ) -> tuple[Tensor, Tensor | None]:
        # If padding made the student's maps larger, they were cropped.
        logits = rows.of(outs[0]).flatten(0, 1)
        if not self.box_weight:
            return logits, None
        found = rows.of(outs[1]).flatten(0, 1)
        if self.bins > 1:
            found = found.unflatten(1, (4, self.bins))
        return logits, found

    def target(
        self, head: TWIHead, teacher_feats: Sequence[Tensor], samples: list
    ) -> Said:
        """As in the base class."""
        outs = head.training_forward(teacher_feats)
        rows = best_rows(outs[0], self.num_classes, self.topk)
        logits, boxes = self._outputs_at(outs, rows)
        scores = full_precision(logits).sigmoid()
        if boxes is not None:
            boxes = full_precision(boxes)
            boxes = boxes.softmax(dim=2) if self.bins > 1 else boxes
        sure = scores.amax(dim=1)
        return Said(rows, scores, boxes, sure, len(scores))

    def of_student(
        self, student_feats: Features, said: Said
    ) -> dict[str, Tensor]:
        """As in the base class."""
        # All scores, then all boxes, as the recorder flattens them.
        found, levels = student_feats[self.sources[0]], self.num_levels
        return self.of_outputs(
            [found[:levels], found[levels : 2 * levels]], said
        )

    def of_estimate(
        self, head: TWIHead, feats: Sequence[Tensor], said: Said
    ) -> dict[str, Tensor]:
        """As in the base class."""
        return self.of_outputs(head.training_forward(feats), said)

    def of_outputs(self, outs: Outputs, said: Said) -> dict[str, Tensor]:
        """The terms of a dense head's raw outputs in training form."""
        return self._compare(*self._outputs_at(outs, said.rows), said)

    def _entropy(self, scores: Tensor) -> Tensor:
        return bernoulli_entropy(scores).sum(dim=1)

    def _score_gap(self, logits: Tensor, scores: Tensor) -> Tensor:
        return bernoulli_kl(student_logits=logits, target=scores)
