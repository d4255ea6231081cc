"""Evaluates further inference modes of a model."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.evaluator import Evaluator
from mmengine.hooks import EMAHook as HostEMAHook
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ..core import Distillation
from ..registry import HOOKS
from .ema import EMAHook


def for_mode(config: Any, mode: str) -> Any:
    """An evaluator's config for a mode; its files get names of their own."""
    if isinstance(config, (list, tuple)):
        return [for_mode(item, mode) for item in config]
    config = copy.deepcopy(config)
    metrics = config.get('metrics', [])
    # An evaluator may have one metric by itself.
    metrics = [metrics] if isinstance(metrics, dict) else metrics
    for item in (config, *metrics):
        if item.get('outfile_prefix'):
            item['outfile_prefix'] = f'{item["outfile_prefix"]}.{mode}'
        if item.get('out_file_path'):
            path = Path(item['out_file_path'])
            item['out_file_path'] = str(
                path.with_name(f'{path.stem}.{mode}{path.suffix}')
            )
    return config


@HOOKS.register_module()
class ModesHook(Hook):
    """Evaluates further modes of a model in the same pass over the data.

    In validation and test each mode has its own evaluators. Their metrics
    are logged under the mode's name: ``second/coco/bbox_mAP`` in addition to
    ``coco/bbox_mAP``. The model must have ``check_modes``, ``absent_modes``,
    ``active_modes`` and ``mode_predictions``, like ``Distillation`` and
    ``MutualDistillation``.

    Modes that the method has but not for this pair, such as those through the
    head of a teacher with other classes, are left out with a message. Other
    unknown modes are refused.

    Source: ours.

    Args:
        modes: A distiller's modes, or the second student of a
            ``MutualDistillation``. 'S', the student alone, is allowed and has
            no effect.

    Raises:
        ValueError: Before the run, for a mode that no pair could have.
    """

    # Before mmengine's own hooks use the metrics for log and best file.
    priority = 'HIGHEST'

    def __init__(self, modes: Sequence[str]) -> None:
        self.modes = tuple(mode for mode in modes if mode != 'S')
        self._evaluators: dict[str, Evaluator] = {}

    @staticmethod
    def _model(runner: Any) -> Any:
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        if not hasattr(model, 'check_modes'):
            raise TypeError(
                'ModesHook needs a model of type era_mm.Distillation or '
                'era_mm.MutualDistillation, but the runner has a '
                f'{type(model).__name__}. Remove the hook.'
            )
        return model

    def before_run(self, runner: Any) -> None:
        """Refuse unknown modes before the run starts."""
        self.leave_absent(runner)
        model = self._model(runner)
        model.check_modes(self.modes)
        if (
            self.modes
            and isinstance(model, Distillation)
            and any(
                isinstance(hook, HostEMAHook) and not isinstance(hook, EMAHook)
                for hook in runner.hooks
            )
        ):
            runner.logger.warning(
                f'EMAHook averages the student alone: {", ".join(self.modes)} '
                'use the averaged student with extras of the distillers that '
                "are not averaged. dict(type='era_mm.EMAHook') averages both."
            )

    def leave_absent(self, runner: Any) -> None:
        """Go on without the modes that the model's pair does not have."""
        absent = self._model(runner).absent_modes()
        left_out: dict[str, list[str]] = {}
        for mode in self.modes:
            if mode in absent:
                left_out.setdefault(absent[mode], []).append(mode)
        for reason, modes in left_out.items():
            self._check_not_watched(runner, modes, reason)
            runner.logger.warning(
                f'{type(self).__name__} without {", ".join(modes)}: {reason}.'
            )
        self.modes = tuple(mode for mode in self.modes if mode not in absent)

    @staticmethod
    def _check_not_watched(
        runner: Any, modes: Sequence[str], reason: str
    ) -> None:
        for hook in runner.hooks:
            for key in ('save_best', 'monitor'):
                watched = getattr(hook, key, None)
                names = [watched] if isinstance(watched, str) else watched
                for name in names or ():
                    if str(name).partition('/')[0] in modes:
                        raise ValueError(
                            f'{type(hook).__name__} has {key}={name!r}, but '
                            'this pair does not have that mode: '
                            f'{reason}. Choose a metric of the student.'
                        )

    def _begin(self, runner: Any, config: Any, loop: Any) -> None:
        self._model(runner).active_modes = self.modes
        self._loop = loop
        self._evaluators = {}
        for mode in self.modes:
            evaluator = runner.build_evaluator(for_mode(config, mode))
            evaluator.dataset_meta = loop.evaluator.dataset_meta
            self._evaluators[mode] = evaluator

    def before_val_epoch(self, runner: Any) -> None:
        """Ask the model for the modes."""
        self._begin(runner, runner.cfg.val_evaluator, runner.val_loop)

    def before_test_epoch(self, runner: Any) -> None:
        """Ask the model for the modes."""
        self._begin(runner, runner.cfg.test_evaluator, runner.test_loop)

    def after_val_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Give the modes' predictions to their evaluators."""
        model = self._model(runner)
        for mode, evaluator in self._evaluators.items():
            evaluator.process(
                data_samples=model.mode_predictions[mode],
                data_batch=data_batch,
            )
        model.mode_predictions = {}

    def after_val_epoch(
        self, runner: Any, metrics: dict | None = None
    ) -> None:
        """Add the modes' metrics to the model's own."""
        self._model(runner).active_modes = ()
        for mode, evaluator in self._evaluators.items():
            found = evaluator.evaluate(len(self._loop.dataloader.dataset))
            if metrics is not None:
                metrics |= {f'{mode}/{k}': v for k, v in found.items()}
        self._evaluators = {}

    after_test_iter = after_val_iter
    after_test_epoch = after_val_epoch
