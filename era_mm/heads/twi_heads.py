"""The teacher's head applied to estimates, one class per kind of head.

``TWIHead`` is for classifiers, ``DenseTWIHead`` and ``PredictorTWIHead`` are
for dense heads, ``TwoStageTWIHead`` for a region proposal network with its
RoI head.

Legend: N batch, C_t channels of the teacher, L levels, * any spatial
dimensions.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModule
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor, nn

from ..core import Unregistered
from ..core.host_models import blank_sample
from ..core.utils import preserve_rng
from .head_views import assigning_once, with_children
from .twi_blend import blend_raw, can_blend_raw, merge

#: mmpretrain's heads with a `loss_module`: for one label, for several.
CLS_HEADS = {'ClsHead', 'MultiLabelClsHead'}


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """Pretend that a run is at its first step, for heads that ask for it.

    TOOD's assigner depends on the epoch; others may use the iteration.
    """
    hub = MessageHub.get_current_instance()
    missing = [key for key in ('iter', 'epoch') if hub.get_info(key) is None]
    for key in missing:
        hub.update_info(key, 0)
    try:
        yield
    finally:
        for key in missing:
            hub.pop_info(key)


def _summed(losses: Mapping[str, Any]) -> dict[str, Any]:
    """A head's losses, with lists over levels summed."""
    return {
        key: sum(term.mean() for term in value)
        if isinstance(value, (list, tuple))
        else value.mean()
        for key, value in losses.items()
        if 'loss' in key
    }


class TWIHead(BaseModule):
    """The teacher's head, applied to estimates of the teacher's features.

    Its weights never change and are not this module's parameters; gradients
    flow through it to the estimates. Losses are the head's own, with its own
    assigner. This class is for classifiers, its subclasses for detectors.

    Source: ERA's ``H_t`` [official code] is the last linear layer of a
    classifier; detectors' heads are [ours].

    Args:
        heads: The teacher's head, or heads.
    """

    def __init__(self, *heads: nn.Module) -> None:
        super().__init__()
        self._heads = tuple(Unregistered(head) for head in heads)

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        """The teacher's heads themselves."""
        return tuple(head.module for head in self._heads)

    @property
    def head(self) -> nn.Module:
        """The last of them, which gives the predictions."""
        return self.heads[-1]

    def forward(self, feats: Sequence[Tensor]) -> Any:
        """The head's raw outputs on an estimate; a classifier's logits."""
        return self.head(tuple(feats))

    def why_not_judged(
        self, feats: Sequence[Tensor], *, training: bool
    ) -> str | None:
        """The reason why the head cannot judge such features, or None.

        Args:
            feats: Features of one image, like the teacher's.
            training: Whether its losses are needed as well.
        """
        try:
            self(feats)
        except Exception as error:
            shapes = [tuple(feat.shape) for feat in feats]
            return f'{type(error).__name__} on {shapes}: {error}'
        return None

    def training_forward(self, feats: Sequence[Tensor]) -> Any:
        """As ``forward``, with outputs as in training, for the losses."""
        with self._training_outputs():
            return self(feats)

    @contextlib.contextmanager
    def _training_outputs(self) -> Iterator[None]:
        # A head's own training flag decides what it outputs: FCOS scales its
        # distances by the stride and RepPoints decodes its points only at
        # test. Losses need the outputs of training. The flags of the layers
        # below do not change, so norms and dropout remain in eval mode.
        for head in self.heads:
            head.training = True
        try:
            yield
        finally:
            for head in self.heads:
                head.training = False

    @contextlib.contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Restore buffers and random state after each estimate of a step."""
        # Some losses update buffers (GHM's running bins).
        buffers = [
            (buffer, buffer._version, buffer.clone())
            for head in self.heads
            for buffer in head.buffers()
        ]
        try:
            # Samplers draw random numbers, which must not affect the run.
            with preserve_rng():
                yield
        finally:
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)

    def _losses(self, feats: tuple[Tensor, ...], data_samples: list) -> Any:
        return self.head.loss(feats, data_samples)

    def loss(
        self, feats: Sequence[Tensor], data_samples: list
    ) -> dict[str, Any]:
        """The head's own losses on an estimate.

        Shape:
            - feats: L of ``(N, C_t, *)``

        Returns:
            Its terms under its own names, with lists over levels summed.
        """
        with self._training_outputs(), self._as_it_was():
            return _summed(self._losses(tuple(feats), data_samples))

    def judge(
        self,
        steps: Sequence[Sequence[Tensor]],
        data_samples: list,
        *,
        by_labels: bool = True,
        term: Any = None,
        said: Any = None,
    ) -> list[dict[str, Tensor]]:
        """The losses of the head on several estimates of one batch.

        Args:
            steps: The estimates, each L of ``(N, C_t, *)``.
            data_samples: The batch's ground truth.
            by_labels: Whether to compare with the ground truth, as
                :meth:`loss` does.
            term: The term that compares with the teacher's own outputs; None:
                no such comparison.
            said: The result of its ``target``.

        Returns:
            The terms of each estimate. A classifier's head runs once for
            all: its norms are frozen, so an image's logits do not depend on
            the rest of the batch.
        """
        if len(steps) > 1 and self._loss_is_of_logits:
            return self._judge_logits(
                steps, data_samples, by_labels=by_labels, term=term, said=said
            )
        judged = []
        for step in steps:
            terms = self.loss(step, data_samples) if by_labels else {}
            if term is not None:
                terms = terms | term.of_estimate(self, step, said)
            judged.append(terms)
        return judged

    @property
    def _loss_is_of_logits(self) -> bool:
        """Whether the head's loss is a forward pass, then a comparison."""
        kinds = type(self.head).__mro__
        owner = next((kind for kind in kinds if 'loss' in vars(kind)), None)
        return owner is not None and owner.__name__ in CLS_HEADS

    def _judge_logits(
        self,
        steps: Sequence[Sequence[Tensor]],
        data_samples: list,
        *,
        by_labels: bool,
        term: Any,
        said: Any,
    ) -> list[dict[str, Tensor]]:
        feats = [torch.cat(level) for level in zip(*steps, strict=True)]
        outs = self.training_forward(feats) if by_labels else None
        told = None if term is None else self(feats)
        view: Any = with_children(self.head)
        batch = len(data_samples)
        judged = []
        for index in range(len(steps)):
            here = slice(index * batch, (index + 1) * batch)
            terms = {}
            if by_labels:
                own = _part(outs, here)
                # The head's own loss, on outputs that are there.
                view.forward = lambda _, own=own: own
                with self._as_it_was():
                    terms = _summed(view.loss((), data_samples))
            if term is not None:
                terms |= term.of_outputs(_part(told, here), said)
            judged.append(terms)
        return judged

    def trial_sample(self, feats: Sequence[Tensor]) -> BaseDataElement:
        """Data of an image to try the head on."""
        sample = blank_sample(1, 1)
        sample.gt_label = torch.zeros(
            1, dtype=torch.long, device=feats[0].device
        )
        return sample

    def predict(self, feats: Sequence[Tensor], data_samples: list) -> list:
        """The head's predictions on an estimate, as new data samples."""
        samples = [sample.new() for sample in data_samples]
        return self.head.predict(tuple(feats), samples)

    def predict_blend(
        self,
        feats: Sequence[Tensor],
        data_samples: list,
        *,
        student_head: 'TWIHead',
        student_feats: Sequence[Tensor],
        alpha: float,
    ) -> list:
        """Predictions of student and teacher head together (ST).

            z = (1 - alpha) * z_student + alpha * z_teacher

        on raw outputs (logits, box deltas) if both heads have the same
        outputs on the same priors. Otherwise each head decodes its own, and
        the boxes are merged by NMS. With alpha 0 or 1 a detector's
        predictions are those of the one side.

        Source: ERA [official code] for logits; detectors are [ours].
        """
        logits = (1 - alpha) * student_head(student_feats)
        logits = logits + alpha * self(feats)
        samples = [sample.new() for sample in data_samples]
        # The host's head knows if images have one class or several.
        return student_head.head._get_predictions(logits, samples)


class DetectorTWIHead(TWIHead):
    """Base class for the heads of detectors."""

    @property
    def _first(self) -> nn.Module:
        """The head that has the priors."""
        return self.heads[0]

    @abstractmethod
    def _instances(
        self, feats: tuple[Tensor, ...], data_samples: list
    ) -> list[InstanceData]:
        """The detections of the head in each image."""

    def why_not_judged(
        self, feats: Sequence[Tensor], *, training: bool
    ) -> str | None:
        """As in the base class; losses are tried on noise with one object."""
        found = super().why_not_judged(feats, training=training)
        if found or not training:
            return found
        # Not the features of the dry run: those of a blank image are constant,
        # and PAA's mixture model cannot be fitted to them.
        generator = torch.Generator().manual_seed(0)
        noise = [
            torch.randn(feat.shape, generator=generator).to(feat)
            for feat in feats
        ]
        try:
            with _progress():
                self.judge([noise], [self.trial_sample(feats)])
        except Exception as error:
            if self.head.train_cfg is None:
                return 'it has no `train_cfg`, so it cannot assign targets'
            return f'its losses raise {type(error).__name__}: {error}'
        return None

    def trial_sample(self, feats: Sequence[Tensor]) -> BaseDataElement:
        """An image with one object, of the size that gives these maps."""
        priors = getattr(self._first, 'prior_generator', None)
        stride = priors.strides[0] if priors is not None else 8
        stride = stride if isinstance(stride, int) else stride[0]
        height, width = (size * stride for size in feats[0].shape[-2:])
        sample = blank_sample(height, width)
        boxes = feats[0].new_tensor([[0, 0, width / 2, height / 2]])
        labels = torch.zeros(1, dtype=torch.long, device=boxes.device)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        # Pipelines always set it; CrowdDet's head reads it.
        sample.ignored_instances = InstanceData(
            bboxes=boxes[:0], labels=labels[:0]
        )
        sample.proposals = InstanceData(
            bboxes=boxes, labels=labels, scores=boxes.new_ones(1)
        )
        return sample

    def predict(self, feats: Sequence[Tensor], data_samples: list) -> list:
        """The head's predictions on an estimate, as new data samples."""
        return _with_instances(
            data_samples, self._instances(tuple(feats), data_samples)
        )

    def predict_blend(
        self,
        feats: Sequence[Tensor],
        data_samples: list,
        *,
        student_head: 'TWIHead',
        student_feats: Sequence[Tensor],
        alpha: float,
    ) -> list:
        """As in the base class."""
        assert isinstance(student_head, DetectorTWIHead)
        # One side alone is what it predicts, by its own `test_cfg`.
        if alpha == 0:
            return student_head.predict(student_feats, data_samples)
        if alpha == 1:
            return self.predict(feats, data_samples)
        pairs = zip(
            student_head._instances(tuple(student_feats), data_samples),
            self._instances(tuple(feats), data_samples),
            strict=True,
        )
        test_cfg = self.head.test_cfg
        return _with_instances(
            data_samples, [merge(pair, alpha, test_cfg) for pair in pairs]
        )


def _with_instances(
    data_samples: list, results: Sequence[InstanceData]
) -> list:
    samples = [sample.new() for sample in data_samples]
    for sample, result in zip(samples, results, strict=True):
        sample.pred_instances = result
    return samples


def _part(outs: Any, images: slice) -> Any:
    """Raw outputs of some images, nested as heads nest them."""
    if isinstance(outs, Tensor):
        return outs[images]
    if isinstance(outs, (list, tuple)):
        return type(outs)(_part(item, images) for item in outs)
    return outs


class DenseTWIHead(DetectorTWIHead):
    """A dense head, anchor-based or anchor-free, with all of its layers."""

    def _levels(self, feats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(feats)

    def forward(self, feats: Sequence[Tensor]) -> Any:
        """The head's raw outputs on an estimate."""
        return self.head(self._levels(feats))

    def why_not_judged(
        self, feats: Sequence[Tensor], *, training: bool
    ) -> str | None:
        """As in the base class."""
        priors = getattr(self.head, 'prior_generator', None)
        levels = len(self._levels(feats))
        if priors is not None and priors.num_levels != levels:
            return (
                f'it has priors for {priors.num_levels} levels, but got '
                f'{levels}'
            )
        return super().why_not_judged(feats, training=training)

    def _losses(self, feats: tuple[Tensor, ...], data_samples: list) -> Any:
        return self.head.loss(self._levels(feats), data_samples)

    def _truth(self, data_samples: list) -> list:
        """The ground truth as the head is trained with."""
        return data_samples

    def judge(
        self,
        steps: Sequence[Sequence[Tensor]],
        data_samples: list,
        *,
        by_labels: bool = True,
        term: Any = None,
        said: Any = None,
    ) -> list[dict[str, Tensor]]:
        """As in the base class, with one forward pass for all estimates.

        The norms of the head are frozen, so an image's outputs do not depend
        on the rest of the batch.
        """
        from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
        from mmdet.models.utils import unpack_gt_instances

        own: Any = type(self.head)
        if own.loss is not BaseDenseHead.loss:
            return super().judge(
                steps,
                data_samples,
                by_labels=by_labels,
                term=term,
                said=said,
            )
        batch = len(data_samples)
        truth, ignored, metas = unpack_gt_instances(self._truth(data_samples))
        levels = [self._levels(step) for step in steps]
        judged = []
        with self._training_outputs():
            # A single estimate need not be copied.
            outs = self.head(
                levels[0]
                if len(levels) == 1
                else tuple(
                    torch.cat(level) for level in zip(*levels, strict=True)
                )
            )
            head, begin = assigning_once(self.head)
            for index in range(len(steps)):
                own = _part(outs, slice(index * batch, (index + 1) * batch))
                terms = {}
                if by_labels:
                    begin()
                    with self._as_it_was():
                        terms = _summed(
                            head.loss_by_feat(*own, truth, metas, ignored)
                        )
                if term is not None:
                    terms |= term.of_outputs(own, said)
                judged.append(terms)
        return judged

    def _instances(
        self, feats: tuple[Tensor, ...], data_samples: list
    ) -> list[InstanceData]:
        return self.head.predict(
            self._levels(feats), data_samples, rescale=True
        )

    def predict_blend(
        self,
        feats: Sequence[Tensor],
        data_samples: list,
        *,
        student_head: TWIHead,
        student_feats: Sequence[Tensor],
        alpha: float,
    ) -> list:
        """As in the base class."""
        if 0 < alpha < 1 and isinstance(student_head, DenseTWIHead):
            student_outs = student_head(student_feats)
            teacher_outs = self(feats)
            if can_blend_raw(
                student_head.head, student_outs, self.head, teacher_outs
            ):
                results = self.head.predict_by_feat(
                    *blend_raw(student_outs, teacher_outs, alpha),
                    batch_img_metas=[s.metainfo for s in data_samples],
                    rescale=True,
                )
                return _with_instances(data_samples, results)
        return super().predict_blend(
            feats,
            data_samples,
            student_head=student_head,
            student_feats=student_feats,
            alpha=alpha,
        )


class ProposalTWIHead(DenseTWIHead):
    """The head of a region proposal network that is used as a detector.

    It separates objects from background, so all ground truth has one class,
    as in mmdet's ``RPN``.

    Source: ours.
    """

    def _truth(self, data_samples: list) -> list:
        return [one_class(sample) for sample in data_samples]

    def _losses(self, feats: tuple[Tensor, ...], data_samples: list) -> Any:
        return super()._losses(feats, self._truth(data_samples))


class PredictorTWIHead(DenseTWIHead):
    """The last layers of a dense head, on estimates of its towers' outputs.

    In a detector they correspond most closely to the last linear layer of a
    classifier.

    Source: ours.

    Args:
        head: The result of ``twi.predictors_of``.

    Shape:
        - feats: 2 L of ``(N, C_t, H, W)``, the levels of the classification
          tower before those of the other
    """

    def _levels(self, feats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        half = len(feats) // 2
        return tuple(
            torch.cat(pair, dim=1)
            for pair in zip(feats[:half], feats[half:], strict=True)
        )


def one_class(sample: BaseDataElement) -> BaseDataElement:
    """The ground truth of an RPN, made as mmdet's detectors do."""
    copied = sample.new()
    copied.gt_instances = sample.gt_instances.new()
    copied.gt_instances.labels = torch.zeros_like(sample.gt_instances.labels)
    return copied
