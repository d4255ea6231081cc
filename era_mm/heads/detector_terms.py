"""Distillation of the outputs of detectors' heads.

``DenseTerm`` is for dense heads, ``RoITerm`` for RoI heads; ``logit`` has the
same for classifiers.

Legend: N batch, K classes, R rows (anchors or regions), k rows of an image,
L levels, B numbers that encode a box.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from mmengine.dist import all_reduce
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from ..core import Features, Unregistered
from ..core.utils import evaluating
from ..layers import (
    FirstBatches,
    Rows,
    bernoulli_entropy,
    bernoulli_kl,
    best_rows,
    full_precision,
)
from ..registry import explain_unknown_keys
from .twi_blend import coder_of, same_priors
from .twi_heads import DenseTWIHead, TWIHead
from .two_stage import TwoStageTWIHead

Outputs = Any


class Said(NamedTuple):
    """The teacher's outputs at its most confident rows.

    Args:
        rows: The rows.
        scores: Its scores there, ``(R, K)``.
        boxes: Its boxes there, ``(R, B)`` numbers or ``(R, 4, bins)``
            probabilities; None: not compared.
        sure: Its confidence, ``(R,)``.
        number: Number of rows to average over, the same for every image,
            whether it has that many or not.
        rpn: What its RPN says; None: not compared.
    """

    rows: Any
    scores: Tensor
    boxes: Tensor | None
    sure: Tensor
    number: int
    rpn: 'Said | None' = None


class Unit(nn.Module):
    """The unit of a term, from sums over the first batches.

    The sums are over all ranks, so a term is linear in the images.

    Args:
        size: Number of sums.
        shape: Shape of the unit.
    """

    sums: Tensor
    value: Tensor

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        # In double precision, because many values are summed.
        self.register_buffer('sums', torch.zeros(size).double())
        self.register_buffer('value', torch.ones(shape))

    def add(self, *sums: Tensor) -> Tensor:
        """Add a batch's sums; returns the totals so far."""
        new = torch.cat([part.double().flatten() for part in sums])
        all_reduce(new)
        self.sums += new
        return self.sums

    def set(self, value: Tensor) -> None:
        """Set the unit; 1 where the teacher's outputs are all the same."""
        self.value.copy_(torch.where(value > 1e-6, value, 1.0))


class DetectorTerm(nn.Module, ABC):
    """Scores and boxes of a detector's head, in units of the teacher's own.

        logit = weight * mean_r KL(q_r || p_r) / unit_score
        box   = box_weight * mean_r w_r |b_r - t_r| / unit_box

    over the k rows of each image where the teacher is most confident; q and p
    are scores of teacher and student, t and b their raw box outputs, w the
    teacher's confidence. ``unit_score`` is mean_r KL(q_r || mean_r q_r), the
    loss of the best prediction that does not depend on the image.
    ``unit_box`` is mean_r w_r times the standard deviation of t, per
    coordinate and weighted by w. So both terms are about 1 for a student that
    knows only the class frequencies, and 0 for one that equals the teacher,
    for any number of anchors and classes. A teacher whose outputs hardly
    differ between images has little to teach:
    ``unit_score`` is at least a tenth of the entropy of mean_r q_r. Where a
    head's raw
    outputs are pixels (RTMDet, VFNet), large boxes weigh more than small ones.

    The units are measured on the first 20 batches of all ranks, then fixed;
    they are saved and resumed. Of a teacher that trains as well (``moves``)
    they stay 1: its first outputs tell nothing of the later ones, and two
    students that are measured by each other agree on constant boxes.

    Source: ours. Boxes of a dense head weighted by the teacher's score:
    CrossKD (arXiv 2306.11369).

    Args:
        weight: Weight of the scores.
        box_weight: Weight of the boxes. 0: no boxes.
        topk: k.

    Raises:
        ValueError: A weight below 0, a ``topk`` below 1.
    """

    #: The student's modules whose outputs are compared.
    sources: tuple[str, ...] = ()
    #: Number of bins if a coordinate is predicted as a distribution; 1 if it
    #: is predicted directly.
    bins = 1
    #: Whether the teacher trains as well.
    moves = False

    def __init__(self, weight: float, box_weight: float, topk: int) -> None:
        super().__init__()
        if weight < 0 or box_weight < 0 or topk < 1:
            raise ValueError(
                '`logit` needs weights of at least 0 and a `topk` of at least '
                f'1, but got {weight}, {box_weight} and {topk}.'
            )
        self.weight, self.box_weight, self.topk = weight, box_weight, topk
        self.first_batches = FirstBatches()

    def loss_weights(self) -> dict[str, float]:
        """The weight of each term by its name."""
        weights = {'logit': self.weight}
        if self.box_weight:
            weights['box'] = self.box_weight
        return weights

    @abstractmethod
    def prepare(
        self,
        *,
        head: TWIHead,
        student: nn.Module | None,
        student_feats: Features,
        teacher_feats: Sequence[Tensor],
    ) -> str | None:
        """Prepare for the pair.

        If boxes cannot be compared, only the scores are, with a message.

        Args:
            head: The teacher's head.
            student: The student. None: its own head is not compared, so
                there is no ``of_student``; the teacher's head is compared
                with itself, by ``of_estimate``.
            student_feats: The student's features of one image by source;
                not read without a student.
            teacher_feats: The input of the teacher's head.

        Returns:
            The reason why the scores cannot be compared; None if they can.
        """

    @abstractmethod
    def target(
        self, head: TWIHead, teacher_feats: Sequence[Tensor], samples: list
    ) -> Said:
        """The teacher's outputs, without graph."""

    @abstractmethod
    def of_student(
        self, student_feats: Features, said: Said
    ) -> dict[str, Tensor]:
        """The terms of the student's own head."""

    @abstractmethod
    def of_estimate(
        self, head: TWIHead, feats: Sequence[Tensor], said: Said
    ) -> dict[str, Tensor]:
        """The terms of the teacher's head on an estimate."""

    @abstractmethod
    def _why_no_scores(self, head: nn.Module) -> str | None:
        """The reason why a head's scores cannot be compared, or None."""

    def _why_not_scored(self, own: nn.Module, theirs: nn.Module) -> str | None:
        heads = {'student': own, 'teacher': theirs}
        if own is theirs:
            del heads['student']
        for owner, head in heads.items():
            reason = self._why_no_scores(head)
            if reason is not None:
                return f"the {owner}'s {type(head).__name__} {reason}"
        return None

    # -- units -------------------------------------------------------------

    def _leave_boxes(self, reason: str) -> None:
        self.box_weight = 0.0
        print_log(
            f'Boxes are not distilled: {reason}.',
            logger='current',
            level=logging.WARNING,
        )

    def _set_up_units(self, num_scores: int, num_boxes: int) -> None:
        self.score_unit = Unit(2 + num_scores, ())
        if self.box_weight:
            spread = 1 if self.bins > 1 else num_boxes
            self.box_unit = Unit(
                2 + num_boxes + spread, () if self.bins > 1 else (num_boxes,)
            )

    @abstractmethod
    def _entropy(self, scores: Tensor) -> Tensor:
        """Entropy of the scores of each row, ``(R, K)`` to ``(R,)``."""

    @torch.no_grad()
    def measure(self, said: Said) -> None:
        """Add a batch to the units; no effect once they are fixed."""
        if self.moves or not self.first_batches.take():
            return
        number = said.sure.new_tensor(len(said.sure))
        scores, sure = said.scores.double(), said.sure.double()
        rows, ent, total = self.score_unit.add(
            number, self._entropy(scores).sum(), scores.sum(dim=0)
        ).split([1, 1, scores.shape[1]])
        guess = self._entropy((total / rows)[None])
        self.score_unit.set(torch.maximum(guess - ent / rows, guess / 10)[0])
        if said.boxes is None:
            return
        boxes = said.boxes.double()
        if self.bins > 1:
            spread = (
                sure * torch.special.entr(boxes).sum(dim=2).mean(dim=1)
            ).sum()
        else:
            spread = (sure[:, None] * boxes**2).sum(dim=0)
        boxes = boxes.flatten(1)
        rows, sureness, first, spread = self.box_unit.add(
            number, sure.sum(), (sure[:, None] * boxes).sum(dim=0), spread
        ).split([1, 1, boxes.shape[1], spread.numel()])
        mean, spread = first / sureness, spread / sureness
        if self.bins > 1:
            guess = torch.special.entr(mean).sum() / 4 - spread[0]
        else:
            guess = (spread - mean**2).clamp(min=0).sqrt()
        self.box_unit.set((sureness / rows)[0] * guess)

    @abstractmethod
    def _score_gap(self, logits: Tensor, scores: Tensor) -> Tensor:
        """KL from the student's scores to the teacher's, ``(R,)``."""

    def _compare(
        self, logits: Tensor, boxes: Tensor | None, said: Said
    ) -> dict[str, Tensor]:
        """The terms, from outputs at the teacher's rows.

        Shape:
            - logits: as ``said.scores``
            - boxes: as ``said.boxes``, before any softmax
        """
        logits = full_precision(logits)
        gap = self._score_gap(logits, said.scores).sum() / said.number
        terms = {'logit': self.weight * gap / self.score_unit.value}
        if self.box_weight:
            assert boxes is not None
            assert said.boxes is not None
            boxes = full_precision(boxes)
            if self.bins > 1:
                distance = (
                    (
                        torch.special.xlogy(said.boxes, said.boxes)
                        - said.boxes * log_softmax(boxes, dim=2)
                    )
                    .sum(dim=2)
                    .mean(dim=1)
                ) / self.box_unit.value
            else:
                distance = (
                    (boxes - said.boxes).abs() / self.box_unit.value
                ).mean(dim=1)
            distance = (said.sure * distance).sum() / said.number
            terms['box'] = self.box_weight * distance
        return terms


#: Attributes of heads that predict objectness separately from the class.
OBJECTNESS = ('loss_obj', 'loss_conf', 'center_prior')


def why_no_sigmoid_scores(head: nn.Module) -> str | None:
    """The reason why a dense head has no sigmoid class logits, or None."""
    loss = getattr(head, 'loss_cls', None)
    if any(hasattr(head, part) for part in OBJECTNESS):
        return 'predicts objectness separately from the class'
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
    (YOLO, AutoAssign). Boxes are compared if both heads are of the same type
    and encode boxes alike; if they predict distributions (GFL), by
    KL(t_r || b_r), in the same kind of unit as the scores.

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
