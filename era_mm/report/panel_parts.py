"""The parts of image panels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .comparison import Group
from .figures import Figure


@dataclass
class Options:
    """Limits for the images.

    Args:
        images: Maximum number of val images to evaluate.
        shown: Number of images to show.
        seconds: Time after which no further image is evaluated.
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
    #: For classifiers: class and probability, best first, and if it is true.
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
    """Results from weights and data.

    Args:
        pictures: The chosen images.
        summary: A sentence with the numbers of improved and degraded images.
        figures: Figures by level.
        by_class: A subject's name, plain's values by class, its own.
        class_metric: Name of these values.
        number: Number of evaluated images.
        deployed: Parameters and FLOPs, by the subject's name.
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
    """A model whose predictions are shown.

    Args:
        title: Title of its column.
        group: Its runs.
        predict: Its predictions for a batch from a dataloader.
        role: 'teacher', 'plain' or 'distilled'.
        mode: Mode under which its metrics are logged: the second student's
            name in a ``MutualDistillation``, else ''.
        found: Its predictions, one for each image.
    """

    title: str
    group: Group
    predict: Callable[[Any], list]
    role: str
    mode: str = ''
    found: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The group's name, and the mode if there is one."""
        return (
            f'{self.group.name}, {self.mode}'
            if self.mode
            else (self.group.name)
        )
