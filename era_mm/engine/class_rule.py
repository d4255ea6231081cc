"""A teacher's head judges only what it knows the classes of."""

from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from era_mm.core import Distillation
from era_mm.core.classes import why_other_classes
from era_mm.core.teacher import classes_of
from era_mm.errors import UserError
from era_mm.hooks import ModesHook

ADVICE = (
    "Give the data's `metainfo.classes` and the teacher the same classes in "
    'the same order. Where only their names differ, say so: '
    'teacher=dict(..., same_classes=True).'
)


def leave_other_heads(runner: Runner, dataset: Any) -> None:
    """Let no teacher's head judge that knows other classes than the data.

    As soon as the teachers' files are read, which tell their classes. A
    method that can goes on without its terms on predictions and says so in
    one line; one that has no others, or whose config asks for them by name,
    is refused. Hooks go on without modes through such a head. See
    :func:`~era_mm.core.classes.why_other_classes`.

    Source: ours.

    Args:
        runner: The run. Its model may be of another kind.
        dataset: Its data.

    Raises:
        UserError: A method cannot go without, or ``inference_mode`` is one
            that needs such a head.
    """
    model: Any = runner.model
    model = model.module if is_model_wrapper(model) else model
    if not isinstance(model, Distillation):
        return
    classes = classes_of(getattr(dataset, 'metainfo', {}))
    for name, teacher in model.teachers.items():
        reason = why_other_classes(classes, teacher.classes)
        if reason is None or teacher.same_classes:
            continue
        for key, distiller in model.distillers.items():
            if distiller.teacher != name or not distiller.uses_predictions:
                continue
            try:
                distiller.leave_predictions(reason)
            except ValueError as error:
                raise UserError(
                    f'distiller {key!r}: {error} {ADVICE}'
                ) from error
    if model.inference_mode is not None:
        try:
            model.check_modes([model.inference_mode])
        except ValueError as error:
            raise UserError(
                f'model.inference_mode: {error} {ADVICE}'
            ) from error
    for hook in runner.hooks:
        if isinstance(hook, ModesHook):
            hook.leave_absent(runner)


def load_for_modes(runner: Runner) -> None:
    """Load the teachers if a test asks for modes, which may use their heads.

    Args:
        runner: The run. Its model may be of another kind.
    """
    model: Any = runner.model
    model = model.module if is_model_wrapper(model) else model
    if isinstance(model, Distillation) and (
        model.inference_mode is not None
        or any(isinstance(h, ModesHook) and h.modes for h in runner.hooks)
    ):
        model.load_teachers()
