"""Images with the predictions of each model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from era_mm.core.teacher import classes_of

from .comparison import Group
from .heat import data_uri
from .models import quiet
from .panel_parts import Column, Found, Mark, Options, Picture, Subject
from .runs import said_by

#: A detection counts as one from this score and this overlap on.
LEAST_SCORE = 0.3
LEAST_IOU = 0.5
#: Longest side of a picture on the page, in pixels.
LARGEST_SIDE = 640


class Panels(ABC):
    """Common base: chooses and draws images."""

    #: The score of an image.
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
        self.classes = list(classes_of(dataset.metainfo) or [])
        self.plain = next((s for s in subjects if s.group is plain), None)
        self.taught = next(
            (s for s in subjects if s.role == 'distilled'), None
        )

    def class_name(self, label: int) -> str:
        """Name of a class by its number."""
        known = 0 <= label < len(self.classes)
        return str(self.classes[label]) if known else str(label)

    @abstractmethod
    def value(self, subject: Subject, index: int) -> float:
        """Score of a model on an image."""

    @abstractmethod
    def columns(self, index: int, scale: float) -> list[Column]:
        """Predictions of every model for an image."""

    @abstractmethod
    def by_class(self, subject: Subject) -> dict[str, float]:
        """Its metric by class."""

    def fill(self) -> None:
        """Choose, draw, compare by class."""
        chosen = self._choose()
        for index, why in chosen:
            try:
                picture, scale = self._draw(index)
            except Exception as error:
                self.found.missing.append(
                    f'image {index} could not be read ({said_by(error)})'
                )
                continue
            picture.title = f'Image {index}: {why}'
            picture.columns = self.columns(index, scale)
            self.found.pictures.append(picture)
        if self.plain is not None:
            base = self.by_class(self.plain)
            for subject in self.subjects:
                # A mode that the run has not evaluated is in no figure.
                if (
                    subject.role == 'distilled'
                    and subject.mode in subject.group.modes
                ):
                    self.found.by_class.append(
                        (subject.name, base, self.by_class(subject))
                    )

    def _choose(self) -> list[tuple[int, str]]:
        """The most improved and the most degraded images, each once."""
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
            f'Of {number} images of val, {self.taught.title} does better than '
            f'{self.plain.title} on {up} and worse on {down}, by '
            f'{self.unit}. Shown are the most improved and the most degraded.'
        )
        best = order[: (shown + 1) // 2]
        worst = [i for i in order[::-1][: shown // 2] if i not in best]
        return [(i, _change(gains[i])) for i in best + worst]

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


class ClassifierPanels(Panels):
    """Images by the probability of the true class."""

    unit = 'the probability of the true class'

    def _truth(self, index: int) -> int:
        label = self.dataset.get_data_info(index)['gt_label']
        return int(np.ravel(np.asarray(label))[0])

    def value(self, subject: Subject, index: int) -> float:
        """The probability of the true class."""
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


class DetectionPanels(Panels):
    """Images by detected objects and false positives."""

    unit = 'detected objects minus false positives'

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
        """Kept boxes, their texts, their matches, and the found objects."""
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
        """Detected objects minus false positives."""
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
                    + f' of {len(names)} objects; {alarms} false positives.',
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


def _change(gain: float) -> str:
    """What is said of an image by the difference to plain on it."""
    if abs(gain) < 1e-9:
        return 'unchanged'
    return f'{"improved" if gain > 0 else "degraded"} by {abs(gain):.2g}'


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
