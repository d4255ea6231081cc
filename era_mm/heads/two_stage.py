"""TWI with two-stage heads, on the student's proposals."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor, nn

from ..core import Unregistered
from .head_views import (
    assigning_once,
    assigning_regions_once,
    with_children,
)
from .twi_heads import (
    DetectorTWIHead,
    ProposalTWIHead,
    one_class,
)


class TwoStageTWIHead(DetectorTWIHead):
    """A region proposal network and a RoI head.

    Losses: the RPN's on the estimate, and the RoI head's on the estimate with
    the student's proposals, which ``StudentProposals`` puts in
    ``data_sample.proposals`` (mmdet's own place for given proposals). The
    teacher's assigners and samplers choose among them. Predictions use the
    proposals of the teacher's RPN.

    Source: ours.

    Args:
        rpn_head: The RPN's head.
        roi_head: The RoI head, also one of Cascade R-CNN.
    """

    def __init__(self, rpn_head: nn.Module, roi_head: nn.Module) -> None:
        super().__init__(rpn_head, roi_head)
        #: Called before the losses of each estimate.
        self._begin: Callable[[], None] = lambda: None

    @property
    def rpn(self) -> ProposalTWIHead:
        """The RPN alone, as a dense head of one class."""
        return ProposalTWIHead(self._first)

    @property
    def has_masks(self) -> bool:
        """Whether the RoI head predicts masks."""
        return self.head.with_mask

    def without_masks(self) -> 'TwoStageTWIHead':
        """The same without the mask branch."""
        return type(self)(
            self._first, with_children(self.head, mask_head=None)
        )

    def forward(self, feats: Sequence[Tensor]) -> Any:
        """Raw outputs of the RPN on an estimate."""
        return self._first(tuple(feats))

    def why_not_judged(
        self, feats: Sequence[Tensor], *, training: bool
    ) -> str | None:
        """As in the base class."""
        # Learnt proposals and cascaded RPNs have none.
        priors = getattr(self._first, 'prior_generator', None)
        if priors is not None and priors.num_levels != len(feats):
            return (
                f'its RPN has priors for {priors.num_levels} levels, but got '
                f'{len(feats)}'
            )
        found = super().why_not_judged(feats, training=training)
        if found:
            return found
        sample = self.trial_sample(feats)
        try:
            self.head(tuple(feats), [sample.proposals], [sample])
        except Exception as error:
            return f'its RoI head raises {type(error).__name__}: {error}'
        return None

    def trial_sample(self, feats: Sequence[Tensor]) -> BaseDataElement:
        sample = super().trial_sample(feats)
        if self.has_masks:
            from mmdet.structures.mask import BitmapMasks

            height, width = sample.img_shape
            sample.gt_instances.masks = BitmapMasks(
                np.ones((1, height, width), np.uint8), height, width
            )
        return sample

    def judge(
        self,
        steps: Sequence[Sequence[Tensor]],
        data_samples: list,
        **judges: Any,
    ) -> list[dict[str, Tensor]]:
        """As in the base class; anchors and proposals are assigned once."""
        rpn_head, begin = assigning_once(self._first)
        once = type(self)(rpn_head, assigning_regions_once(self.head))
        once._begin = begin
        return super(TwoStageTWIHead, once).judge(
            steps, data_samples, **judges
        )

    def _losses(self, feats: tuple[Tensor, ...], data_samples: list) -> Any:
        self._begin()
        rpn_head, roi_head = self.heads
        losses = {}
        for key, value in rpn_head.loss(
            feats, [one_class(sample) for sample in data_samples]
        ).items():
            losses[key if 'rpn' in key else f'rpn_{key}'] = value
        # RoI heads rename the boxes of given proposals.
        proposals = [sample.proposals.new() for sample in data_samples]
        return losses | roi_head.loss(feats, proposals, data_samples)

    def _instances(
        self, feats: tuple[Tensor, ...], data_samples: list
    ) -> list[InstanceData]:
        rpn_head, roi_head = self.heads
        proposals = rpn_head.predict(feats, data_samples, rescale=False)
        return roi_head.predict(feats, proposals, data_samples, rescale=True)


class StudentProposals:
    """The proposals of the student's RPN in its own training pass.

    The raw outputs of its RPN are recorded, so nothing runs twice, and
    decoded as in the student's training. The teacher's RoI head gets them, so
    both heads judge the same regions. No gradient flows through them.

    Source: ours; DIST likewise gives the teacher's RoI head the student's
    RoIs.

    Args:
        student: A two-stage detector.

    Raises:
        ValueError: It has no RPN that ends with plain convolutions.
    """

    SOURCES = ('rpn_head.rpn_cls', 'rpn_head.rpn_reg')

    def __init__(self, student: nn.Module) -> None:
        rpn_head = getattr(student, 'rpn_head', None)
        if not all(hasattr(rpn_head, name) for name in ('rpn_cls', 'rpn_reg')):
            raise ValueError(
                "The teacher's RoI head needs the student's proposals, but "
                f'{type(student).__name__} has no RPN with `rpn_cls` and '
                '`rpn_reg`. Take a two-stage student, or a teacher with a '
                "dense head, or set twi_steps='none' for ERA without TWI."
            )
        self._student = Unregistered(student)

    @torch.no_grad()
    def attach(
        self, student_feats: Mapping[str, Sequence[Tensor]], data_samples: list
    ) -> list:
        """Copies of the data samples, with ``proposals``."""
        student = self._student.module
        found = student.rpn_head.predict_by_feat(
            *(list(student_feats[source]) for source in self.SOURCES),
            batch_img_metas=[sample.metainfo for sample in data_samples],
            cfg=student.train_cfg.get('rpn_proposal', student.test_cfg.rpn),
        )
        samples = [sample.new() for sample in data_samples]
        for sample, proposals in zip(samples, found, strict=True):
            sample.proposals = proposals
        return samples
