"""Chosen images: what each model sees in them, and what it makes of them.

Read in this order: `look_at_images`, `Found`, `DetectionPanels`,
`ClassifierPanels`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from era_mm.core import Distillation
from era_mm.engine.summary import flops_text
from era_mm.methods.era.decompose import Decomposition

from .figures import Figure, level_bars
from .heat import coloured, data_uri, heat_rows
from .models import (
    batch_of,
    build_dataset,
    build_pair,
    build_student,
    number_of_parameters,
    quiet,
)
from .parts import parts_of
from .runs import Comparison, Group, Run, _first_line

#: A detection counts as one from this score and this overlap on.
LEAST_SCORE = 0.3
LEAST_IOU = 0.5
#: Longest side of a picture on the page, in pixels.
LARGEST_SIDE = 640
#: Images on which levels are compared; the means settle soon.
DECOMPOSED = 32


@dataclass
class Options:
    """How much is looked at.

    Args:
        images: Images of val that are gone through at most.
        shown: Of these, how many are shown.
        seconds: After which no further image begins.
    """

    images: int = 200
    shown: int = 6
    seconds: float = 120.0


@dataclass
class Mark:
    """A box on an image.

    Args:
        box: ``x1, y1, x2, y2`` in pixels of the picture.
        text: Class and score.
        kind: 'truth', 'right', 'gained', 'wrong', 'lost' or 'missed'.
    """

    box: tuple[float, float, float, float]
    text: str
    kind: str


@dataclass
class Column:
    """One model's view of an image."""

    title: str
    marks: list[Mark] = field(default_factory=list)
    alt: str = ''
    #: Of classifiers: class and share, best first, and whether it is right.
    scores: list[tuple[str, float, bool]] = field(default_factory=list)


@dataclass
class HeatCell:
    """One heat map on the page."""

    name: str
    uri: str


@dataclass
class HeatLine:
    """Heat maps of one level on one scale."""

    level: str
    title: str
    cells: list[HeatCell | None]


@dataclass
class Picture:
    """An image with every model's view of it."""

    name: str
    title: str
    uri: str
    width: int
    height: int
    columns: list[Column]
    heats: list[HeatLine] = field(default_factory=list)


@dataclass
class Found:
    """What weights and data gave.

    Args:
        pictures: The chosen images.
        summary: How many images gained and lost.
        figures: By level.
        by_class: A group's name, plain's values by class, its own.
        class_metric: What these values are.
        number: Images that were gone through.
        deployed: Parameters and FLOPs, by group's name.
        missing: What could not be shown, and why.
    """

    pictures: list[Picture] = field(default_factory=list)
    summary: str = ''
    figures: list[Figure] = field(default_factory=list)
    by_class: list[tuple[str, dict[str, float], dict[str, float]]] = field(
        default_factory=list
    )
    class_metric: str = ''
    number: int = 0
    deployed: dict[str, tuple[int, str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


@dataclass
class Subject:
    """A model that is looked at.

    Args:
        title: Above its column.
        group: Whose it is.
        predict: Of a batch as the dataloader gives it.
        role: 'teacher', 'plain' or 'distilled'.
        found: Its predictions, one for each image.
    """

    title: str
    group: Group
    predict: Callable[[Any], list]
    role: str
    found: list[Any] = field(default_factory=list)


def look_at_images(
    comparison: Comparison,
    options: Options,
    tell: Callable[[str], None] = lambda text: None,
) -> Found:
    """Run the models of a comparison on images of val.

    What cannot be built or read is left out and named in ``missing``.

    Args:
        comparison: The runs.
        options: How much.
        tell: Told what is being done.
    """
    found = Found()
    groups = comparison.distilled or [
        group for group in comparison.groups if group.role == 'plain'
    ]
    if not groups:
        found.missing.append('images: no run with a config is there')
        return found
    subjects, pair = _build_subjects(comparison, found, tell)
    main = next(
        (run for run in groups[0].runs if run.checkpoint), groups[0].runs[0]
    )
    try:
        dataset = build_dataset(main)
        batch = batch_of(dataset, [0])
    except Exception as error:
        found.missing.append(
            f'images: the val data of {main.name} could not be read '
            f'({_first_line(error)}). Relative paths in its config are '
            'looked up from where the report runs'
        )
        dataset = batch = None
    for subject in subjects:
        _count(subject, batch, found)
    if dataset is None or not subjects:
        return found
    began = time.monotonic()
    for index in range(min(options.images, len(dataset))):
        if index and time.monotonic() - began > options.seconds:
            break
        if index % 20 == 0:
            tell(f'image {index} of {min(options.images, len(dataset))}')
        batch = batch_of(dataset, [index])
        try:
            results = [
                subject.predict(copy.deepcopy(batch))[0]
                for subject in subjects
            ]
        except Exception as error:
            found.missing.append(
                f'images: predicting failed ({_first_line(error)})'
            )
            return found
        for subject, result in zip(subjects, results, strict=True):
            subject.found.append(result)
        found.number = index + 1
    sample = subjects[0].found[0]
    kind: type[_Panels]
    if hasattr(sample, 'pred_instances'):
        kind = DetectionPanels
    elif hasattr(sample, 'pred_score'):
        kind = ClassifierPanels
    else:
        found.missing.append(
            'images: predictions are neither boxes nor scores of classes'
        )
        return found
    kind(dataset, subjects, found, options, comparison.plain).fill()
    if pair is not None:
        _decompose(pair, dataset, found, tell)
    return found


def _build_subjects(
    comparison: Comparison, found: Found, tell: Callable[[str], None]
) -> tuple[list[Subject], tuple[Run, Any] | None]:
    """The models that can be built, and the pair that is taken apart."""
    subjects: list[Subject] = []
    pair = None
    teacher: Subject | None = None
    for group in comparison.groups:
        run = next((r for r in group.runs if r.checkpoint), group.runs[0])
        if group.role == 'unknown' or run.config is None:
            continue
        tell(f'building {run.name}')
        try:
            model = build_student(run)
        except Exception as error:
            found.missing.append(
                f'{group.name}: its model could not be built '
                f'({_first_line(error)})'
            )
            continue
        title = group.name if len(group.runs) == 1 else run.name
        subject = Subject(title, group, _predictor(model), group.role)
        if group.role == 'teacher':
            teacher = teacher or subject
        else:
            subjects.append(subject)
        if group.role == 'distilled' and pair is None:
            try:
                pair = (run, build_pair(run))
            except Exception as error:
                found.missing.append(
                    f'{group.name}: no heat maps ({_first_line(error)})'
                )
    if pair is not None and isinstance(pair[1], Distillation):
        # With the preprocessing that the distillation gives it.
        own = next(iter(pair[1].teachers.values()), None)
        if own is not None:
            group = (
                teacher.group if teacher else Group('teacher', 'teacher', [])
            )
            teacher = Subject('teacher', group, own.predict, 'teacher')
    if teacher is not None:
        subjects.insert(0, teacher)
    return subjects, pair


def _predictor(model: nn.Module) -> Callable[[Any], list]:
    def predict(batch: Any) -> list:
        with torch.no_grad():
            return model.test_step(batch)

    predict.model = model  # type: ignore[attr-defined]
    return predict


def _count(subject: Subject, batch: Any, found: Found) -> None:
    model = getattr(subject.predict, 'model', None)
    if model is None:
        model = subject.predict.__self__.model  # type: ignore[attr-defined]
    with quiet():
        text = (
            'GFLOPs not counted (no data)'
            if batch is None
            else flops_text(model, batch)
        )
    found.deployed[subject.group.name] = (number_of_parameters(model), text)


# -- detectors and classifiers -----------------------------------------------


class _Panels:
    """What is common to both: choosing images, drawing them."""

    #: What an image is scored by.
    unit = ''

    def __init__(
        self,
        dataset: Any,
        subjects: Sequence[Subject],
        found: Found,
        options: Options,
        plain: Group | None,
    ) -> None:
        self.dataset = dataset
        self.subjects = list(subjects)
        self.found = found
        self.options = options
        self.classes = list(dataset.metainfo.get('classes') or [])
        self.plain = next((s for s in subjects if s.group is plain), None)
        self.taught = next(
            (s for s in subjects if s.role == 'distilled'), None
        )

    def class_name(self, label: int) -> str:
        """By its number."""
        known = 0 <= label < len(self.classes)
        return str(self.classes[label]) if known else str(label)

    def value(self, subject: Subject, index: int) -> float:
        """How well a model does on an image."""
        raise NotImplementedError

    def columns(self, index: int, scale: float) -> list[Column]:
        """Every model's view of an image."""
        raise NotImplementedError

    def by_class(self, subject: Subject) -> dict[str, float]:
        """Its metric by class."""
        raise NotImplementedError

    def fill(self) -> None:
        """Choose, draw, compare by class."""
        chosen = self._choose()
        for index, why in chosen:
            try:
                picture, scale = self._draw(index)
            except Exception as error:
                self.found.missing.append(
                    f'image {index} could not be read ({_first_line(error)})'
                )
                continue
            picture.title = f'Image {index}: {why}'
            picture.columns = self.columns(index, scale)
            self.found.pictures.append(picture)
        if self.plain is not None:
            base = self.by_class(self.plain)
            for subject in self.subjects:
                if subject.role == 'distilled':
                    self.found.by_class.append(
                        (subject.group.name, base, self.by_class(subject))
                    )

    def _choose(self) -> list[tuple[int, str]]:
        """The most improved and the most spoilt images, each once."""
        number = self.found.number
        shown = min(self.options.shown, number)
        if self.plain is None or self.taught is None:
            return [(i, 'one of the first of val') for i in range(shown)]
        gains = [
            self.value(self.taught, i) - self.value(self.plain, i)
            for i in range(number)
        ]
        order = sorted(range(number), key=lambda i: (-gains[i], i))
        up = sum(gain > 1e-9 for gain in gains)
        down = sum(gain < -1e-9 for gain in gains)
        self.found.summary = (
            f'Of {number} images of val {self.taught.title} does better than '
            f'{self.plain.title} on {up} and worse on {down}, by '
            f'{self.unit}. Shown are the most improved and the most spoilt.'
        )
        best = order[: (shown + 1) // 2]
        worst = [i for i in order[::-1][: shown // 2] if i not in best]
        return [
            *((i, f'improved by {gains[i]:+.2g}') for i in best),
            *(
                (
                    i,
                    f'{"spoilt" if gains[i] < 0 else "changed"} by '
                    f'{gains[i]:+.2g}',
                )
                for i in worst
            ),
        ]

    def _draw(self, index: int) -> tuple[Picture, float]:
        from PIL import Image

        info = self.dataset.get_data_info(index)
        if 'img' in info:
            image = Image.fromarray(np.asarray(info['img']).astype(np.uint8))
        else:
            image = Image.open(info['img_path'])
        image = image.convert('RGB')
        scale = min(1.0, LARGEST_SIDE / max(image.size))
        if scale < 1:
            image = image.resize(
                (round(image.width * scale), round(image.height * scale)),
                Image.Resampling.LANCZOS,
            )
        kind = 'PNG' if max(image.size) <= 160 else 'JPEG'
        return (
            Picture(
                f'image-{index}',
                '',
                data_uri(np.asarray(image), kind),
                image.width,
                image.height,
                [],
            ),
            scale,
        )


class ClassifierPanels(_Panels):
    """Images by the share that the right class is given."""

    unit = 'the share given to the right class'

    def _truth(self, index: int) -> int:
        label = self.dataset.get_data_info(index)['gt_label']
        return int(np.ravel(np.asarray(label))[0])

    def value(self, subject: Subject, index: int) -> float:
        """The share of the right class."""
        return float(subject.found[index].pred_score[self._truth(index)])

    def columns(self, index: int, scale: float) -> list[Column]:
        """The three likeliest classes of each model."""
        truth = self._truth(index)
        columns = []
        for subject in self.subjects:
            score = subject.found[index].pred_score.cpu()
            top = score.topk(min(3, len(score)))
            scores = [
                (self.class_name(label), value, label == truth)
                for value, label in zip(
                    top.values.tolist(), top.indices.tolist(), strict=True
                )
            ]
            if not any(right for _, _, right in scores):
                scores.append(
                    (self.class_name(truth), float(score[truth]), True)
                )
            alt = f'{subject.title}: ' + ', '.join(
                f'{name} {100 * value:.0f} %' for name, value, _ in scores
            )
            columns.append(Column(subject.title, alt=alt, scores=scores))
        return [
            Column(
                f'truth: {self.class_name(truth)}',
                alt=f'The image, of class {self.class_name(truth)}.',
            ),
            *columns,
        ]

    def by_class(self, subject: Subject) -> dict[str, float]:
        """Accuracy by class, in percent."""
        self.found.class_metric = 'accuracy'
        right: dict[int, list[int]] = {}
        for index, sample in enumerate(subject.found):
            truth = self._truth(index)
            hit = int(sample.pred_score.argmax()) == truth
            right.setdefault(truth, []).append(hit)
        return {
            self.class_name(label): 100 * sum(hits) / len(hits)
            for label, hits in sorted(right.items())
        }


class DetectionPanels(_Panels):
    """Images by the objects found and the false alarms."""

    unit = 'objects found minus false alarms'

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._matched: dict[tuple[int, int], tuple] = {}

    def _truth(self, index: int) -> tuple[np.ndarray, list[int]]:
        info = self.dataset.get_data_info(index)
        objects = [
            item
            for item in info.get('instances', [])
            if not item.get('ignore_flag')
        ]
        boxes = np.array([item['bbox'] for item in objects], np.float64)
        return boxes.reshape(-1, 4), [i['bbox_label'] for i in objects]

    def _match(self, subject: Subject, index: int) -> tuple:
        """Kept boxes, their texts, which are right, what was found."""
        key = (id(subject), index)
        if key not in self._matched:
            instances = subject.found[index].pred_instances
            instances = instances[instances.scores >= LEAST_SCORE]
            instances = instances[instances.scores.argsort(descending=True)]
            boxes = instances.bboxes.cpu().numpy().astype(np.float64)
            labels = instances.labels.tolist()
            texts = [
                f'{self.class_name(label)} {score:.2f}'
                for label, score in zip(
                    labels, instances.scores.tolist(), strict=True
                )
            ]
            truth, true_labels = self._truth(index)
            overlaps = _iou(boxes, truth)
            right, taken = [], {}
            for i, label in enumerate(labels):
                free = [
                    j
                    for j, other in enumerate(true_labels)
                    if other == label
                    and j not in taken
                    and overlaps[i, j] >= LEAST_IOU
                ]
                best = max(free, key=lambda j: overlaps[i, j], default=None)
                if best is not None:
                    taken[best] = i
                right.append(best)
            self._matched[key] = (boxes, texts, right, set(taken))
        return self._matched[key]

    def value(self, subject: Subject, index: int) -> float:
        """Objects found minus false alarms."""
        _, _, right, taken = self._match(subject, index)
        return len(taken) - sum(match is None for match in right)

    def columns(self, index: int, scale: float) -> list[Column]:
        """Ground truth, and every model's boxes against it."""
        truth, labels = self._truth(index)
        names = [self.class_name(label) for label in labels]
        columns = [
            Column(
                'ground truth',
                [
                    Mark(_scaled(box, scale), name, 'truth')
                    for box, name in zip(truth, names, strict=True)
                ],
                f'Ground truth: {len(names)} objects, {", ".join(names)}.',
            )
        ]
        base = self._match(self.plain, index)[3] if self.plain else set()
        for subject in self.subjects:
            boxes, texts, right, taken = self._match(subject, index)
            compared = bool(self.plain) and subject.role == 'distilled'
            marks = []
            for box, text, match in zip(boxes, texts, right, strict=True):
                kind = 'right' if match is not None else 'wrong'
                if compared and match is not None and match not in base:
                    kind = 'gained'
                marks.append(Mark(_scaled(box, scale), text, kind))
            for j, (box, name) in enumerate(zip(truth, names, strict=True)):
                if j not in taken:
                    kind = 'lost' if compared and j in base else 'missed'
                    marks.append(Mark(_scaled(box, scale), name, kind))
            counts = {
                word: sum(mark.kind == kind for mark in marks)
                for kind, word in (
                    ('right', 'right'),
                    ('gained', 'gained'),
                    ('lost', 'lost'),
                    ('missed', 'missed'),
                )
            }
            alarms = sum(mark.kind == 'wrong' for mark in marks)
            columns.append(
                Column(
                    subject.title,
                    marks,
                    f'{subject.title}: '
                    + ', '.join(f'{n} {k}' for k, n in counts.items() if n)
                    + f' of {len(names)} objects; {alarms} false alarms.',
                )
            )
        return columns

    def by_class(self, subject: Subject) -> dict[str, float]:
        """COCO AP by class, in percent, by pycocotools."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        self.found.class_metric = 'AP'
        images: list[dict] = []
        objects: list[dict] = []
        results: list[dict] = []
        for index, sample in enumerate(subject.found):
            images.append({'id': index})
            info = self.dataset.get_data_info(index)
            for item in info.get('instances', []):
                x1, y1, x2, y2 = item['bbox']
                objects.append(
                    {
                        'id': len(objects) + 1,
                        'image_id': index,
                        'category_id': item['bbox_label'],
                        'bbox': [x1, y1, x2 - x1, y2 - y1],
                        'area': (x2 - x1) * (y2 - y1),
                        'iscrowd': int(bool(item.get('ignore_flag'))),
                    }
                )
            instances = sample.pred_instances
            for (x1, y1, x2, y2), score, label in zip(
                instances.bboxes.tolist(),
                instances.scores.tolist(),
                instances.labels.tolist(),
                strict=True,
            ):
                results.append(
                    {
                        'image_id': index,
                        'category_id': label,
                        'bbox': [x1, y1, x2 - x1, y2 - y1],
                        'score': score,
                    }
                )
        if not results or not objects:
            return {}
        with quiet():
            truth = COCO()
            truth.dataset = {
                'info': {},
                'images': images,
                'annotations': objects,
                'categories': [
                    {'id': label, 'name': self.class_name(label)}
                    for label in sorted({o['category_id'] for o in objects})
                ],
            }
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(results), 'bbox')
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval['precision'][..., 0, -1]
        values = {}
        for i, label in enumerate(evaluation.params.catIds):
            own = precision[:, :, i]
            own = own[own > -1]
            if own.size:
                values[self.class_name(label)] = 100 * float(own.mean())
        return values


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    inside = np.clip(high - low, 0, None).prod(axis=-1)
    areas = [
        (item[:, 2:] - item[:, :2]).prod(axis=-1) for item in (boxes, others)
    ]
    union = areas[0][:, None] + areas[1][None, :] - inside
    return inside / np.maximum(union, 1e-9)


def _scaled(box: np.ndarray, scale: float) -> tuple:
    return tuple(round(float(value) * scale, 1) for value in box)


# -- heat maps ----------------------------------------------------------------


def _decompose(
    pair: tuple[Run, Any],
    dataset: Any,
    found: Found,
    tell: Callable[[str], None],
) -> None:
    """Heat maps of the chosen images, and the shares by level."""
    run, model = pair
    if not isinstance(model, Distillation):
        found.missing.append(
            f'{run.name}: no heat maps: two students that teach each other '
            'have no teacher to stand beside'
        )
        return
    tell('heat maps')
    try:
        for picture in found.pictures:
            index = int(picture.name.rpartition('-')[2])
            parts = parts_of(model, batch_of(dataset, [index]))
            if parts is None:
                found.missing.append(
                    f'{run.name}: no heat maps: {"+".join(run.methods)} '
                    "compares no feature of the teacher's shape"
                )
                return
            picture.heats = _heat_lines(*parts)
        shares = []
        for index in range(min(DECOMPOSED, found.number)):
            parts = parts_of(model, batch_of(dataset, [index]))
            if parts is not None and parts[0].shares is not None:
                shares.append(parts[0].shares)
        if shares:
            found.figures.append(
                level_bars(
                    run.name,
                    torch.stack(shares).mean(dim=0).tolist(),
                    len(shares),
                    0,
                )
            )
    except Exception as error:
        found.missing.append(
            f'{run.name}: no heat maps ({_first_line(error)})'
        )


def _heat_lines(parts: Decomposition, names: list[str]) -> list[HeatLine]:
    lines = []
    for level, target in enumerate(parts.teacher):
        estimates = [step[level][0] for step in parts.estimates]
        for row in heat_rows(target[0], estimates, names):
            cells = [
                None
                if values is None
                else HeatCell(name, data_uri(coloured(values, row.most)))
                for name, values in zip(row.names, row.maps, strict=True)
            ]
            lines.append(
                HeatLine(
                    f'level {level}',
                    f'{row.title} (0 to {row.most:.2g})',
                    cells,
                )
            )
    return lines
