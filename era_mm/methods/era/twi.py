"""Teacher Weight Integration: the teacher's frozen head on the student side.

``TWIHead`` applies the head; ``TWIHook`` guards its weights and reports what
each inference mode reaches.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModule, is_model_wrapper
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ...core import Distillation, Unregistered
from ...registry import HOOKS, MODELS


def find_head(model: nn.Module) -> nn.Module | None:
    """The head TWI can use: a dense head or a classifier's; else None."""
    for name in ('bbox_head', 'head'):
        head = getattr(model, name, None)
        if head is not None and all(
            hasattr(head, method) for method in ('loss', 'predict')
        ):
            return head
    return None


@MODELS.register_module()
class TWIHead(BaseModule):
    """The teacher's head, applied to estimates of the teacher's features.

    Its weights never change and are not this module's parameters; gradients
    pass through it to the estimates. Dense heads (anchor-based and
    anchor-free) run with their own assigner and their own losses,
    classification heads with theirs.

    Source: ERA's ``H_t`` [official code] is the last linear layer of a
    classifier; a whole dense head in its place is [ours].

    Args:
        head: The teacher's head.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._head = Unregistered(head)

    @property
    def head(self) -> nn.Module:
        """The teacher's head itself."""
        return self._head.module

    @property
    def is_dense(self) -> bool:
        """Whether it is a detector's dense head, else a classifier's."""
        return hasattr(self.head, 'predict_by_feat')

    def forward(self, feats: Sequence[Tensor]) -> Any:
        """The head's raw outputs on an estimate; a classifier's logits."""
        return self.head(tuple(feats))

    @contextlib.contextmanager
    def _training_outputs(self) -> Iterator[None]:
        # Heads look at their own flag to decide what they put out: FCOS
        # scales its distances by the stride and RepPoints decodes its points
        # only at test. Losses need the training form. The flags of the
        # layers below stay as they are, so norms and dropout remain frozen.
        self.head.training = True
        # Some losses count in buffers (GHM's running bins).
        buffers = [(b, b._version, b.clone()) for b in self.head.buffers()]
        try:
            yield
        finally:
            self.head.training = False
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)

    def loss(
        self, feats: Sequence[Tensor], data_samples: list
    ) -> dict[str, Any]:
        """The head's own losses on an estimate.

        Shape:
            - feats: L of ``(N, C_t, *)``

        Returns:
            Its terms under its own names, lists over levels summed up.
        """
        with self._training_outputs():
            losses = self.head.loss(tuple(feats), data_samples)
        return {
            key: sum(term.mean() for term in value)
            if isinstance(value, (list, tuple))
            else value.mean()
            for key, value in losses.items()
            if 'loss' in key
        }

    def predict(self, feats: Sequence[Tensor], data_samples: list) -> list:
        """The head's predictions on an estimate, as new data samples."""
        samples = [sample.new() for sample in data_samples]
        if not self.is_dense:
            return self.head.predict(tuple(feats), samples)
        results = self.head.predict(tuple(feats), samples, rescale=True)
        return _with_instances(samples, results)

    def predict_blend(
        self,
        feats: Sequence[Tensor],
        data_samples: list,
        *,
        student_head: nn.Module,
        student_feats: Sequence[Tensor],
        alpha: float,
    ) -> list:
        """Predictions of student and teacher head together (ST).

            z = (1 - alpha) * z_student + alpha * z_teacher

        on raw outputs (logits, box deltas) where both heads have the same
        outputs on the same priors; else both decode by themselves and their
        boxes are merged by NMS.

        Source: ERA [official code] for logits; dense heads are [ours].
        """
        samples = [sample.new() for sample in data_samples]
        if not self.is_dense:
            logits = (1 - alpha) * student_head(tuple(student_feats))
            logits = logits + alpha * self(feats)
            for sample, scores in zip(
                samples, logits.softmax(dim=1), strict=True
            ):
                sample.set_pred_score(scores)
                sample.set_pred_label(scores.argmax(dim=0, keepdim=True))
            return samples
        student_outs = student_head(tuple(student_feats))
        teacher_outs = self(feats)
        metas = [sample.metainfo for sample in samples]
        if can_blend_raw(student_head, student_outs, self.head, teacher_outs):
            outs = [
                [
                    (1 - alpha) * s + alpha * t
                    for s, t in zip(*pair, strict=True)
                ]
                for pair in zip(student_outs, teacher_outs, strict=True)
            ]
            results = self.head.predict_by_feat(
                *outs, batch_img_metas=metas, rescale=True
            )
        else:
            results = [
                _merge(pair, alpha, self.head.test_cfg)
                for pair in zip(
                    student_head.predict_by_feat(
                        *student_outs, batch_img_metas=metas, rescale=True
                    ),
                    self.head.predict_by_feat(
                        *teacher_outs, batch_img_metas=metas, rescale=True
                    ),
                    strict=True,
                )
            ]
        return _with_instances(samples, results)


def can_blend_raw(
    student_head: nn.Module,
    student_outs: Sequence,
    teacher_head: nn.Module,
    teacher_outs: Sequence,
) -> bool:
    """Whether two dense heads' raw outputs mean the same."""
    if type(student_head) is not type(teacher_head):
        return False
    if not all(
        hasattr(teacher_head, part)
        for part in ('prior_generator', 'bbox_coder')
    ):
        return False
    if len(student_outs) != len(teacher_outs):
        return False
    for student_maps, teacher_maps in zip(
        student_outs, teacher_outs, strict=True
    ):
        if [m.shape for m in student_maps] != [m.shape for m in teacher_maps]:
            return False
    sizes = [m.shape[-2:] for m in student_outs[0]]
    device = student_outs[0][0].device
    priors = [
        head.prior_generator.grid_priors(sizes, device=device)
        for head in (student_head, teacher_head)
    ]
    if any(
        not torch.equal(s, t)
        for s, t in zip(priors[0], priors[1], strict=True)
    ):
        return False
    coders = [
        {
            key: value
            for key, value in vars(head.bbox_coder).items()
            if not isinstance(value, nn.Module)
        }
        for head in (student_head, teacher_head)
    ]
    return coders[0] == coders[1]


def _with_instances(samples: list, results: Sequence[InstanceData]) -> list:
    for sample, result in zip(samples, results, strict=True):
        sample.pred_instances = result
    return samples


def _merge(
    pair: Sequence[InstanceData], alpha: float, test_cfg: Any
) -> InstanceData:
    from mmcv.ops import batched_nms

    student, teacher = pair
    # The heavier side keeps its scores, so that thresholds still mean what
    # they meant.
    heavier = max(alpha, 1 - alpha)
    student.scores = student.scores * (1 - alpha) / heavier
    teacher.scores = teacher.scores * alpha / heavier
    both = InstanceData.cat([student, teacher])
    both = both[both.scores > 0]
    if not len(both):
        return both
    nms = test_cfg.get('nms', dict(type='nms', iou_threshold=0.5))
    _, keep = batched_nms(both.bboxes, both.scores, both.labels, dict(nms))
    return both[keep[: test_cfg.get('max_per_img', len(keep))]]


def _for_mode(config: Any, mode: str) -> Any:
    """An evaluator's config whose files do not overwrite the student's."""
    if isinstance(config, (list, tuple)):
        return [_for_mode(item, mode) for item in config]
    config = copy.deepcopy(config)
    for item in (config, *config.get('metrics', [])):
        if item.get('outfile_prefix'):
            item['outfile_prefix'] = f'{item["outfile_prefix"]}.{mode}'
        if item.get('out_file_path'):
            path = Path(item['out_file_path'])
            item['out_file_path'] = str(
                path.with_name(f'{path.stem}.{mode}{path.suffix}')
            )
    return config


@HOOKS.register_module()
class TWIHook(Hook):
    """Guards the teacher's weights and evaluates the inference modes.

    Before and after training it checks, bit for bit, that the teacher is what
    its checkpoint holds. In validation and test it evaluates every mode asked
    for with evaluators of its own in the one pass that the loop makes, the
    student's features computed once, and adds the results under the mode's
    name: ``T/coco/bbox_mAP``. The student's own (S) are the loop's ordinary
    metrics, under the ordinary names.

    Source: ERA's three modes ([note] in its dossier); the rest is ours.

    Args:
        modes: Any of 'T' (final estimate through the teacher's head), 'ST'
            (blend), 'E0', 'E1', ... (the estimates before). 'S' may be named
            and changes nothing.
    """

    # Before mmengine's own hooks take the metrics for log and best file.
    priority = 'HIGHEST'

    def __init__(self, modes: Sequence[str] = ('T', 'ST')) -> None:
        self.modes = tuple(mode for mode in modes if mode != 'S')
        self._evaluators: dict[str, Evaluator] = {}

    @staticmethod
    def _model(runner: Any) -> Distillation:
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        if not isinstance(model, Distillation):
            raise TypeError(
                'TWIHook needs a model of type era_mm.Distillation, but the '
                f'runner trains a {type(model).__name__}.'
            )
        return model

    def before_run(self, runner: Any) -> None:
        """Refuse unknown modes before anything is computed."""
        self._model(runner).check_modes(self.modes)

    def before_train(self, runner: Any) -> None:
        """Check that the teachers hold their checkpoints' weights."""
        self._model(runner).load_teachers()
        self._check_teachers(runner, 'before training')

    def after_train(self, runner: Any) -> None:
        """Check that training has not changed the teachers."""
        self._check_teachers(runner, 'after training')

    def _check_teachers(self, runner: Any, when: str) -> None:
        for teacher in self._model(runner).teachers.values():
            if teacher.fingerprint() != teacher.loaded_fingerprint:
                raise RuntimeError(
                    f'The weights of the {teacher.name} {when} are not those '
                    f'of {teacher.checkpoint!r}: something has written to '
                    'them. A hook or a wrapper that trains, averages or '
                    'fuses the teacher must not.'
                )

    def _begin(self, runner: Any, config: Any, loop: Any) -> None:
        model = self._model(runner)
        model.active_modes = self.modes
        self._evaluators = {}
        for mode in self.modes:
            evaluator = runner.build_evaluator(_for_mode(config, mode))
            evaluator.dataset_meta = loop.evaluator.dataset_meta
            self._evaluators[mode] = evaluator

    def _process(self, runner: Any, data_batch: Any) -> None:
        predictions = self._model(runner).mode_predictions
        for mode, evaluator in self._evaluators.items():
            evaluator.process(
                data_samples=predictions[mode], data_batch=data_batch
            )
        self._model(runner).mode_predictions = {}

    def _finish(self, runner: Any, loop: Any, metrics: dict | None) -> None:
        self._model(runner).active_modes = ()
        for mode, evaluator in self._evaluators.items():
            found = evaluator.evaluate(len(loop.dataloader.dataset))
            if metrics is not None:
                metrics |= {f'{mode}/{k}': v for k, v in found.items()}
        self._evaluators = {}

    def before_val_epoch(self, runner: Any) -> None:
        """Ask the model for the modes."""
        self._begin(runner, runner.cfg.val_evaluator, runner.val_loop)

    def after_val_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Hand the modes' predictions to their evaluators."""
        self._process(runner, data_batch)

    def after_val_epoch(
        self, runner: Any, metrics: dict | None = None
    ) -> None:
        """Add the modes' metrics to the student's."""
        self._finish(runner, runner.val_loop, metrics)

    def before_test_epoch(self, runner: Any) -> None:
        """Ask the model for the modes."""
        self._begin(runner, runner.cfg.test_evaluator, runner.test_loop)

    def after_test_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Hand the modes' predictions to their evaluators."""
        self._process(runner, data_batch)

    def after_test_epoch(
        self, runner: Any, metrics: dict | None = None
    ) -> None:
        """Add the modes' metrics to the student's."""
        self._finish(runner, runner.test_loop, metrics)
