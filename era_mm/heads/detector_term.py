"""The base of losses between the outputs of detectors' heads.

``dense_term`` and ``roi_term`` have the losses; ``logit`` has the same for
classifiers.

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
from torch.nn.functional import log_softmax

from ..core import Features
from ..layers import (
    FirstBatches,
    Measured,
    full_precision,
)
from .twi_heads import TWIHead


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


def _summed(*sums: Tensor) -> Tensor:
    """A batch's sums in one vector, over all ranks."""
    summed = torch.cat([part.flatten() for part in sums])
    all_reduce(summed)
    return summed


class Unit(Measured, nn.Module):
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

    def add(self, new: Tensor) -> Tensor:
        """Add a batch's sums over all ranks; returns the totals so far."""
        self.sums += new
        return self.sums

    def reset(self) -> None:
        """Back to a unit of 1 and no sums."""
        self.sums.zero_()
        self.value.fill_(1.0)

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
        """Add a batch to the units; no effect once they are fixed.

        A batch whose outputs are not finite, on any rank, is left out.
        """
        if self.moves or self.first_batches.are_over:
            return
        sums = [self._sums_of_scores(said.scores)]
        if said.boxes is not None:
            sums.append(self._sums_of_boxes(said.boxes, said.sure))
        if not self.first_batches.count(*sums):
            return
        self._set_score_unit(self.score_unit.add(sums[0]))
        if said.boxes is not None:
            self._set_box_unit(self.box_unit.add(sums[1]), said.boxes)

    def _sums_of_scores(self, scores: Tensor) -> Tensor:
        scores = scores.double()
        return _summed(
            scores.new_tensor(len(scores)),
            self._entropy(scores).sum(),
            scores.sum(dim=0),
        )

    def _set_score_unit(self, sums: Tensor) -> None:
        rows, ent, total = sums.tensor_split([1, 2])
        guess = self._entropy((total / rows)[None])
        self.score_unit.set(torch.maximum(guess - ent / rows, guess / 10)[0])

    def _sums_of_boxes(self, boxes: Tensor, sure: Tensor) -> Tensor:
        boxes, sure = boxes.double(), sure.double()
        if self.bins > 1:
            spread = (
                sure * torch.special.entr(boxes).sum(dim=2).mean(dim=1)
            ).sum()
        else:
            spread = (sure[:, None] * boxes**2).sum(dim=0)
        boxes = boxes.flatten(1)
        return _summed(
            sure.new_tensor(len(sure)),
            sure.sum(),
            (sure[:, None] * boxes).sum(dim=0),
            spread,
        )

    def _set_box_unit(self, sums: Tensor, boxes: Tensor) -> None:
        rows, sureness, first, spread = sums.tensor_split(
            [1, 2, 2 + boxes.shape[1:].numel()]
        )
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
