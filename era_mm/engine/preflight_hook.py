"""What is looked at when everything is built and nothing has trained yet."""

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

    Before the first step, on one rank: the run is compared with the phases of
    the distillers; a summary is logged; the class names
    of each teacher are compared with the data's; each teacher is evaluated on
    some images of val, by the run's own evaluator. The run's random state and
    the student stay as they are.

    ``train`` adds it to every run; ``preflight = False`` in the config leaves
    it out, ``preflight = dict(num_images=...)`` gives it arguments. A run
    that goes on (``--resume``) has been evaluated when it began, so that is
    not done again. Random teachers, teachers of other classes, and runs
    without val data are not evaluated; the log says so.

    Source: ours.

    Args:
        num_images: How many images of val a teacher is evaluated on. 0: none.
        seconds: After which no further batch of them begins.

    Raises:
        UserError: A teacher is near chance
            (:func:`~era_mm.engine.teacher_check.find_fault`), or has the
            data's classes in another order where its predictions were to
            teach; the run ends before the last
            phase of a distiller begins.
    """

    # After what the run's own hooks set up and check.
    priority = 'LOWEST'

    def __init__(self, num_images: int = 64, seconds: float = 60.0) -> None:
        self.num_images = num_images
        self.seconds = seconds

    def before_train(self, runner: Runner) -> None:
        """Look, on one rank, and stop all of them if need be."""
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        if not isinstance(model, (Distillation, MutualDistillation)):
            return
        problem = ['']
        if get_rank() == 0:
            with preserve_rng():
                try:
                    self._look(runner, model)
                except UserError as error:
                    problem[0] = str(error)
        broadcast_object_list(problem)
        if problem[0]:
            raise UserError(problem[0])

    def _look(
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
    """Whether a method learns, or would have, from what it predicts."""
    return not teacher.same_classes and any(
        distiller.uses_predictions or distiller.left_predictions
        for distiller in model.distillers.values()
        if model.teachers.get(distiller.teacher) is teacher
    )


def unknown_classes(dataset: Any) -> str:
    """Whether a COCO-like data set has classes that no annotation has.

    Args:
        dataset: Of mmdet, in wrappers or not.

    Returns:
        A remark, '' where there is none to make.
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
        UserError: It does. What trains in that phase would not train at all.
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
                        f'`schedules` lets {key!r} begin in iteration '
                        f'{schedule.start}, but the run has {max_iters}, so '
                        'that term would never count. Lower `start` or '
                        'lengthen the run.'
                    )
            least = distiller.min_iters
            if least and least >= max_iters:
                raise UserError(
                    f'distiller {name!r} ({type(distiller).__name__}): '
                    'expected a run that is longer than the '
                    f'{least} iterations before its last phase, but this one '
                    f'has {max_iters}, so what trains last would not train '
                    'at all. Shorten the phases (`phases`, '
                    '`pretrain_iters`) or lengthen the run; another batch '
                    'size means another number of iterations.'
                )


def _one_image(runner: Runner) -> Any:
    """The first image of val as its dataloader gives it, if it does."""
    if runner.val_loop is None:
        return None
    try:
        loader = runner.val_dataloader
        return loader.collate_fn([loader.dataset[0]])
    except Exception:
        # A loop of another kind, or data that only validation should meet.
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
