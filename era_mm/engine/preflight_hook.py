"""Checks of a run that is built but has not trained yet."""

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from era_mm.core import Distillation, MutualDistillation
from era_mm.core.teacher import Teacher, classes_of
from era_mm.core.utils import preserve_rng
from era_mm.engine.summary import summary_of
from era_mm.engine.teacher_check import check_teacher, compare_classes
from era_mm.errors import UserError
from era_mm.registry import HOOKS


@HOOKS.register_module()
class PreflightHook(Hook):
    """Shows what will be trained, and stops a run whose teacher knows nothing.

    Before the first step, one rank checks that the run is long enough for the
    phases of the distillers, logs a summary, compares the class names of each
    teacher with the data's, and evaluates each teacher on some val images
    with the run's own evaluator. The run's random state and the student do
    not change.

    ``train`` adds it to every run; ``preflight = False`` in the config leaves
    it out, ``preflight = dict(num_images=...)`` sets its arguments. A resumed
    run does not evaluate its teachers again. Random teachers, teachers with
    other classes, and runs without val data are not evaluated; the log says
    so.

    Source: ours.

    Args:
        num_images: Number of val images to evaluate a teacher on. 0: none.
        seconds: Time limit, after which no further batch is started.

    Raises:
        UserError: A teacher is near chance
            (:func:`~era_mm.engine.teacher_check.find_fault`); or a method
            learns from its predictions, and it has the data's classes in
            another order; or the run ends before the last phase of a
            distiller begins.
    """

    # After what the run's own hooks set up and check.
    priority = 'LOWEST'

    def __init__(self, num_images: int = 64, seconds: float = 60.0) -> None:
        self.num_images = num_images
        self.seconds = seconds

    def before_train(self, runner: Runner) -> None:
        """Check on one rank; stop all ranks if something is wrong."""
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        if not isinstance(model, (Distillation, MutualDistillation)):
            return
        fault = ['']
        if get_rank() == 0:
            with preserve_rng():
                try:
                    self._check(runner, model)
                except UserError as error:
                    fault[0] = str(error)
        broadcast_object_list(fault)
        if fault[0]:
            raise UserError(fault[0])

    def _check(
        self, runner: Runner, model: Distillation | MutualDistillation
    ) -> None:
        check_length(model, runner.max_iters)
        runner.logger.info(
            'What will be trained:\n' + summary_of(model, _one_image(runner))
        )
        metainfo = getattr(runner.train_dataloader.dataset, 'metainfo', {})
        classes = classes_of(metainfo)
        remark = unknown_classes(runner.train_dataloader.dataset)
        if remark:
            runner.logger.warning(remark)
        teachers = model.teachers if isinstance(model, Distillation) else {}
        for teacher in teachers.values():
            remark = compare_classes(
                classes,
                teacher.classes,
                teacher.name,
                judges=_judges(model, teacher),
            )
            if remark and not teacher.same_classes:
                runner.logger.warning(remark)
            if self.num_images and runner.iter == 0:
                runner.logger.info(
                    check_teacher(
                        teacher,
                        runner,
                        classes,
                        self.num_images,
                        self.seconds,
                    )
                )


def _judges(model: Distillation, teacher: Teacher) -> bool:
    """Whether a method learns from its predictions."""
    return not teacher.same_classes and any(
        distiller.uses_predictions
        for distiller in model.distillers.values()
        if model.teachers.get(distiller.teacher) is teacher
    )


def unknown_classes(dataset: Any) -> str:
    """A remark on class names of a COCO-like data set without annotations.

    Args:
        dataset: A data set of mmdet, wrapped or not.

    Returns:
        The remark; '' if all classes are annotated.
    """
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    classes = classes_of(getattr(dataset, 'metainfo', {})) or ()
    found = getattr(dataset, 'cat_ids', None)
    if found is None:
        return ''
    images = getattr(dataset, 'cat_img_map', None)
    if len(found) >= len(classes):
        unseen = [
            name
            for name, number in zip(classes, found, strict=False)
            if images is not None and not images.get(number)
        ]
        if not unseen:
            return ''
        return (
            f'{len(unseen)} of the {len(classes)} classes '
            f'({", ".join(unseen[:5])}{", ..." if len(unseen) > 5 else ""}) '
            'have no training annotation, so the student cannot learn them.'
        )
    return (
        f'Only {len(found)} of the {len(classes)} classes '
        f'({", ".join(classes[:5])}{", ..." if len(classes) > 5 else ""}) '
        'are categories of the training annotations. The others are never '
        "seen, and labels may be shifted. Set the data's `metainfo.classes` "
        'to the names in the annotation file.'
    )


def check_length(
    model: Distillation | MutualDistillation, max_iters: int
) -> None:
    """Refuse a run that ends before a phase or a term of a distiller begins.

    Args:
        model: What will be trained.
        max_iters: The run's iterations.

    Raises:
        UserError: It does, so what trains in that phase would never train.
    """
    halves = (
        [model] if isinstance(model, Distillation) else model.students.values()
    )
    for half in halves:
        for name, distiller in half.distillers.items():
            for key, schedule in distiller.schedules.items():
                if schedule.start >= max_iters:
                    raise UserError(
                        f'distiller {name!r} ({type(distiller).__name__}): '
                        f'`schedules` starts {key!r} in iteration '
                        f'{schedule.start}, but the run has {max_iters}, so '
                        'that term would never be used. Lower `start` or '
                        'lengthen the run.'
                    )
            least = distiller.min_iters
            if least and least >= max_iters:
                raise UserError(
                    f'distiller {name!r} ({type(distiller).__name__}): '
                    'expected a run that is longer than the '
                    f'{least} iterations before its last phase, but this one '
                    f'has {max_iters}, so what trains in that phase would '
                    'never train. Shorten the phases (`phases`, '
                    '`pretrain_iters`) or lengthen the run; another batch '
                    'size means another number of iterations.'
                )


def _one_image(runner: Runner) -> Any:
    """The first val image as its dataloader returns it; None if it fails."""
    if runner.val_loop is None:
        return None
    try:
        loader = runner.val_dataloader
        return loader.collate_fn([loader.dataset[0]])
    except Exception:
        # An unknown kind of loop, or bad data: validation will say so.
        return None


def add_preflight(runner: Runner, cfg: Config) -> None:
    """Give a runner the hook, as the config's ``preflight`` says.

    Raises:
        UserError: ``preflight`` is neither true, false nor a dict.
    """
    options = cfg.get('preflight', True)
    if not isinstance(options, (bool, Mapping)):
        raise UserError(
            'preflight: expected True, False, or a dict with arguments of '
            f'era_mm.PreflightHook, but got {options!r}.'
        )
    has_one = any(isinstance(h, PreflightHook) for h in runner.hooks)
    if options is not False and not has_one:
        arguments = dict(options) if isinstance(options, Mapping) else {}
        runner.register_hook(PreflightHook(**arguments))
