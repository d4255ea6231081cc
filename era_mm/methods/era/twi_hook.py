"""TWIHook: guards the teacher's weights and reports each inference mode."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ...core import Distillation
from ...registry import HOOKS


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
        self._loop = loop
        self._evaluators = {}
        for mode in self.modes:
            evaluator = runner.build_evaluator(_for_mode(config, mode))
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
        """Hand the modes' predictions to their evaluators."""
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
        """Add the modes' metrics to the student's."""
        self._model(runner).active_modes = ()
        for mode, evaluator in self._evaluators.items():
            found = evaluator.evaluate(len(self._loop.dataloader.dataset))
            if metrics is not None:
                metrics |= {f'{mode}/{k}': v for k, v in found.items()}
        self._evaluators = {}

    after_test_iter = after_val_iter
    after_test_epoch = after_val_epoch
