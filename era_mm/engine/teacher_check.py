"""Checks the teachers before training: class names and a short test.

A teacher with the wrong file, class order or preprocessing raises no error;
the student just learns nothing.
"""

import contextlib
import copy
import io
import itertools
import json
import math
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import mmengine.fileio
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.runner import Runner

from era_mm.core import Teacher
from era_mm.core.classes import plain_name
from era_mm.core.host_models import num_classes_of
from era_mm.core.utils import errors_only
from era_mm.errors import UserError, first_line

#: A useful teacher is at least this share of the way from chance to perfect.
USEFUL = 0.2
#: Outcomes with a probability below this are taken as impossible.
UNLIKELY = 0.01
#: AP at IoU 0.5 below which a detector cannot teach. With the classes of a
#: good one (0.85) in the wrong order it is 0.04, without normalisation 0.01.
MIN_AP = 0.05
#: With fewer objects than this, a detector's AP is not judged.
MIN_OBJECTS = 50
#: A detector that finds none of at least so many objects cannot teach.
MIN_TO_FIND = 10

TURN_OFF = (
    'If this is intended, preflight=False in the config (--cfg-options '
    'preflight=False) turns these checks off.'
)


def compare_classes(
    student: Sequence[str] | None,
    teacher: Sequence[str] | None,
    name: str,
    judges: bool = True,
) -> str:
    """Compare the names of the student's classes with a teacher's.

    Args:
        student: Of the data that the student trains on.
        teacher: Of the teacher's checkpoint.
        name: The teacher's name.
        judges: Whether a method learns from its predictions.

    Returns:
        How they differ; '' if they agree or one side is not known.

    Raises:
        UserError: It judges, and the same names are in another order.
    """
    if student is None or teacher is None:
        return ''
    pairs = list(
        zip(map(plain_name, student), map(plain_name, teacher), strict=False)
    )
    differing = [i for i, (own, their) in enumerate(pairs) if own != their]
    if len(student) != len(teacher):
        return (
            f'The {name} knows {len(teacher)} classes and the data has '
            f'{len(student)}'
            + _example(differing, student, teacher)
            + '. Its features can teach, its predictions cannot.'
        )
    if not differing:
        return ''
    theirs = {their for _, their in pairs}
    moved = [i for i in differing if pairs[i][0] in theirs]
    if len(moved) > 1 and not judges:
        return (
            f'The {name} has the classes of the data in another order, '
            f'{len(moved)} of {len(student)} are elsewhere'
            + _example(moved, student, teacher)
            + '. Its features can teach, its predictions cannot.'
        )
    if len(moved) > 1:
        raise UserError(
            f'pre-flight: the {name} has the classes of the data in another '
            f'order, {len(moved)} of {len(student)} are elsewhere'
            + _example(moved, student, teacher)
            + '. Its predictions would be read as other classes. Set the '
            "data's `metainfo.classes` to the order that the "
            f'{name} was trained with, or give a {name} with this order. '
            + TURN_OFF
        )
    return (
        f'{len(differing)} of {len(student)} classes have another name in '
        f'the {name}' + _example(differing, student, teacher) + '.'
    )


def _example(
    indices: list[int], student: Sequence[str], teacher: Sequence[str]
) -> str:
    if not indices:
        return ''
    first = indices[0]
    return (
        f' (first, class {first}: {student[first]!r} in the data, '
        f'{teacher[first]!r} in the teacher)'
    )


def has_classes_of(
    student: Sequence[str] | None, teacher: Sequence[str] | None
) -> bool:
    """Whether a teacher can be tested on the data.

    True unless the numbers differ or most names do.
    """
    if student is None or teacher is None:
        return True
    if len(student) != len(teacher):
        return False
    pairs = zip(
        map(plain_name, student), map(plain_name, teacher), strict=True
    )
    return 2 * sum(own == their for own, their in pairs) >= len(student)


def is_near_chance(right: int, total: int, num_classes: int) -> bool:
    """Whether so many right answers are likely those of guessing.

    Only if both hold: guessing, ``p = 1 / num_classes``, gives at least as
    many with a probability above 1 %; and a classifier a fifth of the way
    from chance to perfect gives no more with a probability below 1 %. So a
    few images decide nothing.

    Source: ours.
    """
    chance = 1 / num_classes
    useful = chance + USEFUL * (1 - chance)
    by_chance = 1 - _binomial(right - 1, total, chance)
    by_skill = _binomial(right, total, useful)
    return by_chance > UNLIKELY and by_skill < UNLIKELY


def _binomial(most: int, total: int, p: float) -> float:
    """P(X <= most) of X right answers among ``total``."""
    return math.fsum(
        math.comb(total, k) * p**k * (1 - p) ** (total - k)
        for k in range(most + 1)
    )


@dataclass(frozen=True)
class Evaluation:
    """A teacher's result with the run's val evaluator.

    Args:
        metrics: Values by the evaluator's names.
        num_images: Number of images.
        num_objects: Number of objects in them; None if not known.
        seconds: Time taken.
        num_found: Number of detections; None if it is no detector.
        parts: The result on each val set by the set's prefix, if the
            evaluator separates several; metrics are named without the prefix.
    """

    metrics: Mapping[str, float]
    num_images: int
    num_objects: int | None
    seconds: float
    num_found: int | None = None
    parts: Mapping[str, 'Evaluation'] = field(default_factory=dict)


class _NoSplitError(Exception):
    """The evaluator cannot be used on a part of val."""


class _Part(NamedTuple):
    """A val set with its own metrics.

    Args:
        prefix: The evaluator's name for it; '' if it is the only one.
        config: Config of its evaluator.
        meta: The set's meta data.
        indices: Indices of its images in the dataset.
    """

    prefix: str
    config: Any
    meta: Any
    indices: range


def _parts_of(runner: Runner) -> list[_Part]:
    """The val sets that the run's evaluator separates.

    Raises:
        _NoSplitError: It, or a metric, combines results in its own way.
    """
    evaluator = runner.val_evaluator
    config = runner.cfg.val_evaluator
    own = [
        type(metric).__name__
        for metric in evaluator.metrics
        if type(metric).evaluate is not BaseMetric.evaluate
    ]
    if own:
        raise _NoSplitError(f'{own[0]} combines results in its own way')
    way = type(evaluator).evaluate
    meta = evaluator.dataset_meta
    if way is Evaluator.evaluate:
        total = len(runner.val_dataloader.dataset)
        return [_Part('', config, meta, range(total))]
    # A class of mmdet, which may not be installed.
    if way.__qualname__ != 'MultiDatasetsEvaluator.evaluate':
        raise _NoSplitError(
            f'{type(evaluator).__name__} combines results in its own way'
        )
    prefixes = evaluator.dataset_prefixes
    metas = (
        list(meta) if isinstance(meta, Sequence) else [meta] * len(prefixes)
    )
    ends = (metas[0] or {}).get('cumulative_sizes', ())
    metrics = config.metrics
    if isinstance(metrics, Mapping):
        metrics = [metrics]
    if not len(prefixes) == len(ends) == len(metrics) == len(metas):
        raise _NoSplitError(
            f'MultiDatasetsEvaluator has {len(prefixes)} dataset_prefixes and '
            f'{len(metrics)} metrics for {len(ends)} val sets'
        )
    starts = [0, *ends[:-1]]
    return [
        _Part(prefix, metric, own, range(start, end))
        for prefix, metric, own, start, end in zip(
            prefixes, metrics, metas, starts, ends, strict=True
        )
    ]


def evaluate_teacher(
    teacher: Teacher, runner: Runner, num_images: int, seconds: float
) -> Evaluation:
    """Test a teacher on some val images with the run's own evaluator.

    The images are drawn from the whole split, which may be sorted, by a
    separate generator. If the evaluator separates several val sets (mmdet's
    ``MultiDatasetsEvaluator``), each image is judged by the metric of its
    set; a set without drawn images is left out. Images are read in this
    process: a data loader's workers would change the run's random state.

    Args:
        teacher: The teacher.
        runner: The run, for its val data and the config of its evaluator. The
            evaluator itself is not used, because it may have state.
        num_images: Number of images.
        seconds: Time limit, after which no further batch is started.
    """
    loader = runner.val_dataloader
    dataset = loader.dataset
    parts = _parts_of(runner)
    number = min(num_images, len(dataset))
    drawn = random.Random(0).sample(range(len(dataset)), number)
    size = loader.batch_size or 1
    began = time.monotonic()
    seen: dict[int, list[tuple[dict, list]]] = {}
    for which, indices in _batches(drawn, parts, size):
        if seen and time.monotonic() - began > seconds:
            break
        batch = loader.collate_fn([dataset[index] for index in indices])
        found = [sample.cpu() for sample in teacher.predict(batch)]
        # Images are large, and evaluators do not need them.
        rest = {k: v for k, v in batch.items() if k != 'inputs'}
        seen.setdefault(which, []).append((rest, found))
    judged = {
        parts[which].prefix: _judge(runner, parts[which], seen[which])
        for which in sorted(seen)
    }
    took = time.monotonic() - began
    if len(parts) == 1:
        return replace(next(iter(judged.values())), seconds=took)
    return Evaluation(
        {
            f'{prefix}/{key}': value
            for prefix, part in judged.items()
            for key, value in part.metrics.items()
        },
        sum(part.num_images for part in judged.values()),
        _sum(part.num_objects for part in judged.values()),
        took,
        _sum(part.num_found for part in judged.values()),
        judged,
    )


def _batches(
    drawn: Sequence[int], parts: Sequence[_Part], size: int
) -> Iterator[tuple[int, list[int]]]:
    """Batches with images of one part each, the parts in turn."""
    queues = []
    for which, part in enumerate(parts):
        own = [index for index in drawn if index in part.indices]
        queues.append(
            [
                (which, own[start : start + size])
                for start in range(0, len(own), size)
            ]
        )
    for turn in itertools.zip_longest(*queues):
        yield from (batch for batch in turn if batch is not None)


def _sum(numbers: Iterable[int | None]) -> int | None:
    """The sum; None if one of them is not known."""
    known = list(numbers)
    return None if None in known else sum(n for n in known if n is not None)


def _judge(
    runner: Runner, part: _Part, seen: Sequence[tuple[dict, list]]
) -> Evaluation:
    """Evaluate predictions on a val set."""
    images = [sample for _, found in seen for sample in found]
    with TemporaryDirectory() as folder, _silence():
        config, num_objects = _for_images(part.config, images, Path(folder))
        evaluator = runner.build_evaluator(config)
        evaluator.dataset_meta = part.meta
        for batch, found in seen:
            evaluator.process(data_samples=found, data_batch=batch)
        metrics = {}
        for metric in evaluator.metrics:
            # Not `evaluate`, which gathers from all ranks: only one is here.
            for key, value in metric.compute_metrics(metric.results).items():
                name = f'{metric.prefix}/{key}' if metric.prefix else key
                metrics[name] = value
    if num_objects is None and all('gt_instances' in s for s in images):
        num_objects = sum(len(sample.gt_instances) for sample in images)
    return Evaluation(
        {k: v for k, v in metrics.items() if isinstance(v, (int, float))},
        len(images),
        num_objects,
        0.0,
        sum(len(sample.pred_instances) for sample in images)
        if all('pred_instances' in sample for sample in images)
        else None,
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hide what evaluators print: it would look like the run's results."""
    with errors_only(), contextlib.redirect_stdout(io.StringIO()):
        yield


def _for_images(
    config: Any, samples: Sequence[Any], folder: Path
) -> tuple[Any, int | None]:
    """An evaluator's config for some images, and the number of their objects.

    COCO-like metrics score all images of their annotation file, so they get
    one with these images only. Files that metrics write go to the folder.
    """
    config = copy.deepcopy(config)
    if isinstance(config, (list, tuple)):
        items = list(config)
    else:
        metrics = config.get('metrics', [])
        one = isinstance(metrics, Mapping)
        items = [config, *([metrics] if one else metrics)]
    num_objects = None
    for number, item in enumerate(items):
        if item.get('outfile_prefix'):
            item['outfile_prefix'] = str(folder / f'out{number}')
            item.pop('format_only', None)
        if item.get('out_file_path'):
            item['out_file_path'] = str(folder / f'out{number}.pkl')
        if item.get('ann_file'):
            content = mmengine.fileio.load(
                item['ann_file'], backend_args=item.pop('backend_args', None)
            )
            ids = {sample.img_id for sample in samples}
            content['images'] = [
                image for image in content['images'] if image['id'] in ids
            ]
            content['annotations'] = [
                entry
                for entry in content['annotations']
                if entry['image_id'] in ids
            ]
            num_objects = len(content['annotations'])
            file = folder / f'annotations{number}.json'
            file.write_text(json.dumps(content))
            item['ann_file'] = str(file)
    return config, num_objects


def find_fault(evaluation: Evaluation, num_classes: int | None) -> str:
    """Why a teacher with this result cannot teach; '' if it can.

    Top-1 accuracy is judged by :func:`is_near_chance`; the box AP of COCO,
    LVIS and VOC metrics at IoU 0.5 by ``MIN_AP``, if there are
    ``MIN_OBJECTS``. Other metrics are not judged. Over several val sets it is
    the mean weighted by objects, or by images if these are not known: a
    teacher that is good on one of them is useful. A detector that finds none
    of ``MIN_TO_FIND`` or more objects is refused without any metric, because
    evaluators return none for it.
    """
    if (
        evaluation.num_found == 0
        and (evaluation.num_objects or 0) >= MIN_TO_FIND
    ):
        return (
            f'it finds nothing on {evaluation.num_images} images of val with '
            f'{evaluation.num_objects} objects'
        )
    figures = _pooled(evaluation)
    for key, (value, total, _) in figures.items():
        if key == 'accuracy/top1' and num_classes is not None:
            if is_near_chance(round(value / 100 * total), total, num_classes):
                return (
                    f'{key} is {value:.1f} on {total} images of val, and '
                    f'guessing among {num_classes} classes gives '
                    f'{100 / num_classes:.1f}'
                )
    for pattern in ('bbox_mAP_50', 'bbox_AP50', 'AP50', 'mAP'):
        for key, (value, total, objects) in figures.items():
            if not re.search(rf'(^|/){pattern}$', key):
                continue
            if 0 <= value < MIN_AP and objects >= MIN_OBJECTS:
                return (
                    f'{key} is {value:.3f} on {total} images of val with '
                    f'{objects} objects'
                )
            return ''
    return ''


class _Figure(NamedTuple):
    """A metric's value, and the numbers of images and objects it is from."""

    value: float
    num_images: int
    num_objects: int


def _pooled(evaluation: Evaluation) -> dict[str, _Figure]:
    """Each metric, over the val sets that have it."""
    figures: dict[str, list[_Figure]] = {}
    for part in evaluation.parts.values() or (evaluation,):
        for key, value in part.metrics.items():
            figures.setdefault(key, []).append(
                _Figure(value, part.num_images, part.num_objects or 0)
            )
    return {key: _mean(own) for key, own in figures.items()}


def _mean(figures: Sequence[_Figure]) -> _Figure:
    if len(figures) == 1:
        return figures[0]
    _, images, objects = zip(*figures, strict=True)
    # A set without objects has no AP; metrics write -1.
    weights = objects if any(objects) else images
    return _Figure(
        sum(f.value * w for f, w in zip(figures, weights, strict=True))
        / sum(weights),
        sum(images),
        sum(objects),
    )


def check_teacher(
    teacher: Teacher,
    runner: Runner,
    classes: Sequence[str] | None,
    num_images: int,
    seconds: float,
) -> str:
    """Evaluate a teacher; returns the result as one line for the log.

    Args:
        teacher: The teacher.
        runner: The run.
        classes: Names of the data's classes, None if not known.
        num_images: See :func:`evaluate_teacher`.
        seconds: Likewise.

    Raises:
        UserError: The teacher is near chance.
    """
    name = teacher.name
    if teacher.is_random:
        return f'{name}: random weights, not evaluated'
    if runner.val_loop is None:
        return f'{name}: not evaluated, the config has no val_dataloader'
    named_alike = has_classes_of(classes, teacher.classes)
    if not (named_alike or teacher.same_classes):
        return f'{name}: not evaluated, its classes are not those of the data'
    known = num_classes_of(teacher.model)
    if known is not None and classes is not None and known != len(classes):
        return (
            f'{name}: not evaluated, its head has {known} classes and the '
            f'data {len(classes)}'
        )
    try:
        found = evaluate_teacher(teacher, runner, num_images, seconds)
    except _NoSplitError as reason:
        return f'{name}: not evaluated, {reason}'
    except Exception as error:
        # A run that would train must not fail because its teacher cannot be
        # tested: it may have no head, or the evaluator may need all images.
        return (
            f'{name}: not evaluated, this raised {type(error).__name__}: '
            f'{first_line(error)}'
        )
    fault = find_fault(found, known or (len(classes) if classes else None))
    if fault:
        settings = getattr(teacher, 'config', {}).get('data_preprocessor')
        raise UserError(
            f'pre-flight: the {name} is near chance: {fault}. It would teach '
            'noise. What usually causes this:\n'
            f'  - the checkpoint does not belong to the config, or is not '
            f'fully trained: {teacher.checkpoint}\n'
            f'  - its classes are in another order than those of the data\n'
            f'  - it was trained with other preprocessing than\n'
            f'    {dict(settings) if settings else "the default"}\n'
            f'What to do: test the {name} alone with its own config. '
            + TURN_OFF
        )
    metrics = list(found.metrics.items())[:2]
    if found.parts:
        # The first of each set.
        metrics = [
            (f'{prefix}/{key}', value)
            for prefix, part in found.parts.items()
            for key, value in list(part.metrics.items())[:1]
        ]
    shown = ', '.join(f'{key} {value:g}' for key, value in metrics)
    return (
        f'{name}: {shown or "no metric"} on {found.num_images} images of val '
        f'({found.seconds:.1f} s)'
    )
