"""TWIHook: guards the teacher's weights and reports each inference mode."""

from collections.abc import Sequence
from typing import Any

from mmengine.model import is_model_wrapper

from ...core import Distillation
from ...hooks import ModesHook
from ...registry import HOOKS


@HOOKS.register_module()
class TWIHook(ModesHook):
    """Guards the teacher's weights and evaluates the inference modes.

    Before and after training it checks, bit for bit, that the teacher is what
    its checkpoint holds. In validation and test it is a ``ModesHook``: every
    mode asked for is evaluated in the one pass that the loop makes, the
    student's features computed once, and reported under the mode's name:
    ``T/coco/bbox_mAP``. The student's own (S) are the loop's ordinary
    metrics, under the ordinary names.

    Source: ERA's three modes ([note] in its dossier); the rest is ours.

    Args:
        modes: Any of 'T' (final estimate through the teacher's head), 'ST'
            (blend), 'E0', 'E1', ... (the estimates before). 'S' may be named
            and changes nothing.
    """

    def __init__(self, modes: Sequence[str] = ('T', 'ST')) -> None:
        super().__init__(modes)

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
