"""Losses between the outputs of RoI heads.

Legend: N batch, K classes, R rows (anchors or regions), k rows of an image,
L levels, B numbers that encode a box.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from ..core import Features, Unregistered
from ..core.utils import evaluating
from ..layers import (
    full_precision,
)
from ..registry import explain_unknown_keys
from .dense_term import DenseTerm
from .detector_term import DetectorTerm, Said
from .twi_blend import coder_of
from .twi_heads import TWIHead
from .two_stage import TwoStageTWIHead


@explain_unknown_keys
class RoITerm(DetectorTerm):
    """``DetectorTerm`` for RoI heads.

    Rows are the top proposals of the student's RPN, the same for both heads;
    p and q are softmax scores with background, w the teacher's probability
    that a region holds an object. If boxes are predicted per class, those of
    the teacher's best class are compared.

    The student's RoI head runs on these regions a second time, in eval mode,
    so that its norms do not count a batch twice.

    After ``add_rpn``, ``of_estimate`` has two terms more, ``rpn_logit`` and
    ``rpn_box``: those of a ``DenseTerm`` with the same arguments, which
    compares the teacher's RPN on an estimate with the same RPN on the
    teacher's feature. Their rows are the anchors of the teacher's RPN, their
    units its own. The student's RPN has no part in them.

    Source: ours; that both heads judge the same regions is DIST's (arXiv
    2205.10536).

    Args:
        weight: Weight of the scores.
        box_weight: Weight of the boxes.
        topk: Number of regions per image, and of the RPN's anchors.
    """

    def __init__(
        self, weight: float = 1.0, box_weight: float = 1.0, topk: int = 100
    ) -> None:
        super().__init__(weight, box_weight, topk)
        self._student: Unregistered | None = None
        self._source = ''
        # Boxes of the RoI heads may be left out, those of the RPN not.
        self._settings = weight, box_weight, topk
        #: The term of the teacher's RPN; None: it is not compared.
        self.rpn: DenseTerm | None = None

    def add_rpn(
        self, head: TwoStageTWIHead, teacher_feats: Sequence[Tensor]
    ) -> str | None:
        """Compare the teacher's RPN in ``of_estimate`` as well.

        Args:
            head: The teacher's head.
            teacher_feats: Its input.

        Returns:
            The reason why the RPN cannot be compared; None if it can.
        """
        term = DenseTerm(*self._settings)
        reason = term.prepare(
            head=head.rpn,
            student=None,
            student_feats={},
            teacher_feats=teacher_feats,
        )
        if reason is not None:
            return reason
        outs = head.rpn.training_forward(teacher_feats)
        if len(outs) != 2:
            # Guided anchors: what a box means depends on a third output.
            return (
                f"the teacher's {type(head.rpn.head).__name__} predicts more "
                'than scores and boxes'
            )
        self.rpn = term
        return None

    def prepare(
        self,
        *,
        head: TWIHead,
        student: nn.Module | None,
        student_feats: Features,
        teacher_feats: Sequence[Tensor],
    ) -> str | None:
        """As in the base class."""
        if not isinstance(head, TwoStageTWIHead):
            return f'{type(head.head).__name__} is not a RoI head'
        theirs = head.head
        own = theirs if student is None else student.roi_head
        reason = self._why_not_scored(own, theirs)
        if reason is not None:
            return reason
        boxes = [one.bbox_head for one in (own, theirs)]
        classes = [one.num_classes for one in boxes]
        if classes[0] != classes[1]:
            return f'student and teacher have {classes} classes'
        if student is not None:
            self._student = Unregistered(own)
            self._source = next(iter(student_feats))
            size = 8 * teacher_feats[0].shape[-1]
            rois = teacher_feats[0].new_tensor([[0, 0, 0, size, size]])
            try:
                with torch.no_grad(), evaluating(own):
                    self._run(own, student_feats[self._source], rois)
            except Exception as error:
                return (
                    f"the student's RoI head cannot read {self._source!r} "
                    f'({type(error).__name__}: {error})'
                )
        if self.box_weight and (
            coder_of(boxes[0]) != coder_of(boxes[1])
            or boxes[0].reg_class_agnostic != boxes[1].reg_class_agnostic
        ):
            self._leave_boxes(
                'the two RoI heads encode them with different settings'
            )
        self._set_up_units(classes[1] + 1, 4)
        return None

    def _why_no_scores(self, head: nn.Module) -> str | None:
        bbox_head: Any = getattr(head, 'bbox_head', None)
        if isinstance(bbox_head, nn.ModuleList):
            return 'has several stages'
        if not all(
            isinstance(getattr(bbox_head, name, None), nn.Module)
            for name in ('fc_cls', 'fc_reg', 'loss_cls')
        ):
            return (
                'has no linear layers for classes and boxes (fc_cls, fc_reg)'
            )
        if bbox_head.custom_cls_channels or bbox_head.loss_cls.use_sigmoid:
            return 'has no softmax scores'
        return None

    @staticmethod
    def _run(
        roi_head: nn.Module, feats: Sequence[Tensor], rois: Tensor
    ) -> tuple[Tensor, Tensor]:
        extractor = roi_head.bbox_roi_extractor
        found = extractor(tuple(feats[: extractor.num_inputs]), rois)
        if roi_head.with_shared_head:
            found = roi_head.shared_head(found)
        return roi_head.bbox_head(found)

    def _boxes_at(self, boxes: Tensor, classes: Tensor) -> Tensor | None:
        if not self.box_weight:
            return None
        if boxes.shape[1] == 4:
            return boxes
        index = torch.arange(len(boxes), device=boxes.device)
        return boxes.unflatten(1, (-1, 4))[index, classes]

    def target(
        self, head: TWIHead, teacher_feats: Sequence[Tensor], samples: list
    ) -> Said:
        """As in the base class."""
        boxes = [s.proposals.bboxes[: self.topk] for s in samples]
        rois = torch.cat(
            [
                torch.cat([b.new_full((len(b), 1), index), b], dim=1)
                for index, b in enumerate(boxes)
            ]
        )
        logits, coded = self._run(head.head, teacher_feats, rois)
        scores = full_precision(logits).softmax(dim=1)
        # The last score is the background's.
        classes = scores[:, :-1].argmax(dim=1)
        at = self._boxes_at(full_precision(coded), classes)
        number = len(samples) * self.topk
        said = Said((rois, classes), scores, at, 1 - scores[:, -1], number)
        if self.rpn is None:
            return said
        assert isinstance(head, TwoStageTWIHead)
        return said._replace(
            rpn=self.rpn.target(head.rpn, teacher_feats, samples)
        )

    def measure(self, said: Said) -> None:
        """As in the base class."""
        super().measure(said)
        if self.rpn is not None:
            assert said.rpn is not None
            self.rpn.measure(said.rpn)

    def of_student(
        self, student_feats: Features, said: Said
    ) -> dict[str, Tensor]:
        """As in the base class."""
        assert self._student is not None
        own = self._student.module
        with evaluating(own):
            return self._of(own, student_feats[self._source], said)

    def of_estimate(
        self, head: TWIHead, feats: Sequence[Tensor], said: Said
    ) -> dict[str, Tensor]:
        """As in the base class."""
        terms = self._of(head.head, feats, said)
        if self.rpn is not None:
            assert isinstance(head, TwoStageTWIHead)
            assert said.rpn is not None
            found = self.rpn.of_estimate(head.rpn, feats, said.rpn)
            terms |= {f'rpn_{name}': value for name, value in found.items()}
        return terms

    def _of(
        self, roi_head: nn.Module, feats: Sequence[Tensor], said: Said
    ) -> dict[str, Tensor]:
        rois, classes = said.rows
        logits, coded = self._run(roi_head, feats, rois)
        return self._compare(logits, self._boxes_at(coded, classes), said)

    def _entropy(self, scores: Tensor) -> Tensor:
        return torch.special.entr(scores).sum(dim=1)

    def _score_gap(self, logits: Tensor, scores: Tensor) -> Tensor:
        return kl_div(
            log_softmax(logits, dim=1), scores, reduction='none'
        ).sum(dim=1)
