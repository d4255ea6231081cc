"""Digit crops: a classification data set that needs no download.

One digit in the middle of a 32 x 32 image, over a photo crop, among clutter
and pieces of neighbouring digits (`digit_drawing`). The result is a folder of
images per class; mmpretrain's `CustomDataset` reads it.

Source: ours.

Read in this order: `CropParams`, `make_digit_crops`, `compose_crop`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from .digit_drawing import (
    CLASSES,
    INK,
    MIN_VISIBLE,
    SPLITS,
    Digit,
    Layer,
    Material,
    add_clutter,
    blend,
    choose_colour,
    draw_background,
    draw_digit,
    finish,
    split_material,
)
from .made_folder import SplitParams, make_folder

MANIFEST = 'digit_crops.json'
#: Side of the images.
SIZE = 32

#: Raised whenever the same parameters would give other bytes.
_FORMAT = 1
#: Heights of digits, as a share of the image's side.
_HEIGHTS = (0.5, 0.8)
#: How far the digit may be off the middle, in pixels per axis.
_JITTER = 4.0


@dataclass(frozen=True)
class CropParams(SplitParams):
    """What the data set depends on; equal parameters give equal bytes.

    Args:
        seed: Seed of every random choice.
        num_train: Crops in the train split.
        num_val: Crops in the val split.
        num_test: Crops in the test split.
    """

    num_train: int = 2000
    num_val: int = 1500
    num_test: int = 3000


@dataclass
class Crop:
    """A composed crop: pixels, its digit and where it all is from."""

    image: np.ndarray
    digit: Digit
    clutter_ids: list[int]
    region: tuple[str, int, int, int, int]


def make_digit_crops(
    out: str | Path,
    params: CropParams | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Write the data set, or leave an equal one as it is.

    `out` never exists in part.

    Args:
        out: Folder of the data set.
        params: What to make.
        progress: Called with the number of crops done and the total.

    Returns:
        True if the data set was written, False if it was there already.

    Raises:
        FileExistsError: If `out` holds something else.
    """
    params = params or CropParams()
    return make_folder(
        out,
        MANIFEST,
        'digit crops',
        dict(format=_FORMAT, **asdict(params)),
        lambda folder: _write(folder, params, progress),
    )


def by_class(material: Material) -> list[Material]:
    """Part a split's material: the same photo tiles, the digits of a class."""
    chosen = [
        np.flatnonzero(material.labels == label)
        for label in range(len(CLASSES))
    ]
    return [
        replace(
            material,
            digit_ids=material.digit_ids[index],
            labels=material.labels[index],
            glyphs=material.glyphs[index],
        )
        for index in chosen
    ]


def compose_crop(
    material: Material,
    index: int,
    params: CropParams,
    classes: list[Material] | None = None,
) -> Crop:
    """Compose one crop, of class ``index`` modulo 10.

    Each crop has a random stream of its own, so it does not depend on how
    many others are made.

    Args:
        material: What may be used.
        index: Number of the crop in its split.
        params: Parameters of the data set.
        classes: ``by_class(material)``, if at hand.
    """
    # 10: other streams than those of the digit scenes.
    rng = np.random.default_rng(
        [params.seed, 10 + SPLITS.index(material.split), index]
    )
    own = (classes or by_class(material))[index % len(CLASSES)]
    canvas, region = draw_background(material, SIZE, rng)
    clutter_ids: list[int] = []
    for _ in range(rng.integers(1, 4)):
        add_clutter(canvas, [], clutter_ids, material, rng, _HEIGHTS)
    for _ in range(rng.integers(0, 3)):
        _add_neighbour(canvas, clutter_ids, material, rng)
    digit = _add_digit(canvas, own, rng)
    for _ in range(rng.integers(0, 3)):
        add_clutter(canvas, [digit], clutter_ids, material, rng, _HEIGHTS)
    return Crop(finish(canvas, rng), digit, clutter_ids, region)


def _around(coverage: np.ndarray, centre: tuple[float, float]) -> Layer:
    """Put coverage around a point given from the image's middle."""
    top, left = (
        round(SIZE / 2 + offset - extent / 2)
        for offset, extent in zip(centre, coverage.shape, strict=True)
    )
    return Layer.inside(coverage, top, left, SIZE)


def _add_neighbour(
    canvas: np.ndarray,
    clutter_ids: list[int],
    material: Material,
    rng: np.random.Generator,
) -> None:
    """Paint a digit that the image's edge cuts."""
    index, coverage = draw_digit(material, SIZE, rng, _HEIGHTS, 0.25)
    angle = rng.uniform(0, 2 * math.pi)
    distance = rng.uniform(0.45, 0.65) * SIZE
    layer = _around(
        coverage, (distance * math.sin(angle), distance * math.cos(angle))
    )
    if layer.coverage.max(initial=0) < INK:
        return
    colour = choose_colour(canvas, layer, rng.uniform(0.2, 0.6), rng)
    if blend(canvas, [], layer, colour, rng.uniform(0.7, 1.0)):
        clutter_ids.append(int(material.digit_ids[index]))


def _add_digit(
    canvas: np.ndarray, material: Material, rng: np.random.Generator
) -> Digit:
    """Paint the digit that the crop is of."""
    while True:
        index, coverage = draw_digit(material, SIZE, rng, _HEIGHTS, 0.25)
        row, col = rng.uniform(-_JITTER, _JITTER, 2)
        layer = _around(coverage, (row, col))
        ink = np.zeros((SIZE, SIZE), dtype=bool)
        ink[layer.window] = layer.coverage >= INK
        digit = Digit(
            int(material.labels[index]),
            int(material.digit_ids[index]),
            ink,
            int((coverage >= INK).sum()),
        )
        # The image's edge may have cut too much off.
        if digit.visible >= MIN_VISIBLE:
            break
    colour = choose_colour(
        canvas, layer, rng.uniform(0.2, 0.6), rng, light=1.0
    )
    blend(canvas, [], layer, colour, rng.uniform(0.7, 1.0))
    return digit


def _write(
    folder: Path,
    params: CropParams,
    progress: Callable[[int, int], None] | None,
) -> dict[str, str]:
    """Write images and what they are made of; returns checksums."""
    (folder / 'sources').mkdir()
    total = sum(params.num_images(split) for split in SPLITS)
    done = 0
    checksums = {}
    for split, material in split_material(params.seed).items():
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        classes = by_class(material)
        entries = []
        for index in range(params.num_images(split)):
            crop = compose_crop(material, index, params, classes)
            name = f'{crop.digit.label}/{index:06d}.png'
            Image.fromarray(crop.image).save(folder / split / name)
            photo, *region = crop.region
            entries.append(
                dict(
                    file_name=name,
                    digit=crop.digit.digit_id,
                    clutter_digits=crop.clutter_ids,
                    photo=photo,
                    photo_region=region,
                )
            )
            done += 1
            if progress is not None:
                progress(done, total)
        text = json.dumps(entries)
        (folder / 'sources' / f'{split}.json').write_text(text)
        checksums[split] = hashlib.sha256(text.encode()).hexdigest()
    return checksums
