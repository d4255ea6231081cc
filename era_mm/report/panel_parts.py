"""What panels are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .comparison import Group
from .figures import Figure


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
