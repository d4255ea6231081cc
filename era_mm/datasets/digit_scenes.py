"""Digit scenes: a detection data set that needs no download.

Digits of several sizes, colours and contrasts over photo crops, with clutter
and some occlusion (`digit_drawing`). The result is an ordinary COCO data set
with the classes '0' to '9'; mmdet's `CocoDataset` reads it.

Source: ours.

`letter_scenes` writes its scenes with the same functions.

Read in this order: `SceneParams`, `make_digit_scenes`, `write_scenes`,
`compose_scene`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .digit_drawing import (
    CLASSES,
    INK,
    MIN_VISIBLE,
    SPLITS,
    Digit,
    Material,
    add_clutter,
    blend,
    choose_colour,
    draw_background,
    draw_digit,
    finish,
    place,
    split_material,
)
from .made_folder import SplitParams, make_folder

MANIFEST = 'digit_scenes.json'

#: Raised whenever the same parameters would give other bytes.
_FORMAT = 1
#: Heights of digits, as a share of the image's side.
_HEIGHTS = (0.14, 0.4)


@dataclass(frozen=True)
class SceneParams(SplitParams):
    """What the data set depends on; equal parameters give equal bytes.

    Args:
        seed: Seed of every random choice.
        num_train: Scenes in the train split.
        num_val: Scenes in the val split.
        num_test: Scenes in the test split.
        image_size: Side of the square images in pixels, at least 64.
    """

    num_train: int = 1200
    num_val: int = 500
    num_test: int = 1000
    image_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_integer('image_size', 64)


@dataclass
class Scene:
    """A composed scene: pixels, annotated digits and where it all is from."""

    image: np.ndarray
    digits: list[Digit]
    clutter_ids: list[int]
    region: tuple[str, int, int, int, int]


def make_digit_scenes(
    out: str | Path,
    params: SceneParams | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Write the data set, or leave an equal one as it is.

    `out` never exists in part.

    Args:
        out: Folder of the data set.
        params: What to make.
        progress: Called with the number of scenes done and the total.

    Returns:
        True if the data set was written, False if it was there already.

    Raises:
        FileExistsError: If `out` holds something else.
    """
    params = params or SceneParams()
    return make_folder(
        out,
        MANIFEST,
        'digit scenes',
        dict(format=_FORMAT, **asdict(params)),
        lambda folder: write_scenes(
            folder,
            params,
            split_material(params.seed),
            'digit',
            CLASSES,
            progress,
        ),
    )


def compose_scene(
    material: Material, index: int, params: SceneParams
) -> Scene:
    """Compose one scene.

    Each scene has a random stream of its own, so it does not depend on how
    many others are made.

    Args:
        material: What may be used.
        index: Number of the scene in its split.
        params: Parameters of the data set.
    """
    rng = np.random.default_rng(
        [params.seed, 1 + SPLITS.index(material.split), index]
    )
    size = params.image_size
    canvas, region = draw_background(material, size, rng)
    digits: list[Digit] = []
    clutter_ids: list[int] = []

    for _ in range(rng.integers(2, 6)):
        add_clutter(canvas, digits, clutter_ids, material, rng, _HEIGHTS)
    wanted = rng.integers(3, 8)
    for _ in range(30):
        if len(digits) == wanted:
            break
        _add_digit(canvas, digits, material, rng)
    for _ in range(rng.integers(0, 4)):
        add_clutter(canvas, digits, clutter_ids, material, rng, _HEIGHTS)

    return Scene(finish(canvas, rng), digits, clutter_ids, region)


def _add_digit(
    canvas: np.ndarray,
    digits: list[Digit],
    material: Material,
    rng: np.random.Generator,
) -> None:
    """Try to add one annotated digit."""
    size = len(canvas)
    index, coverage = draw_digit(material, size, rng, _HEIGHTS, 0.25)
    layer = place(coverage, size, rng, 0.15)
    ink = np.zeros((size, size), dtype=bool)
    ink[layer.window] = layer.coverage >= INK
    digit = Digit(
        int(material.labels[index]),
        int(material.digit_ids[index]),
        ink,
        int((coverage >= INK).sum()),
    )
    if digit.visible < MIN_VISIBLE:
        return
    colour = choose_colour(
        canvas, layer, rng.uniform(0.3, 0.6), rng, light=1.0
    )
    if blend(canvas, digits, layer, colour, rng.uniform(0.75, 1.0)):
        digits.append(digit)


def _encode_scene(
    material: Material, index: int, params: SceneParams
) -> tuple[bytes, Scene]:
    """Compose a scene and encode its image."""
    scene = compose_scene(material, index, params)
    buffer = io.BytesIO()
    Image.fromarray(scene.image).save(
        buffer, 'JPEG', quality=95, subsampling=0
    )
    return buffer.getvalue(), scene


def write_scenes(
    folder: Path,
    params: SceneParams,
    materials: Mapping[str, Material],
    noun: str,
    classes: Sequence[str],
    progress: Callable[[int, int], None] | None,
) -> dict[str, str]:
    """Write images and annotations.

    Args:
        folder: Where to.
        params: What to make.
        materials: What each split may use.
        noun: What is drawn; an annotation's sample has this name.
        classes: Names of the classes.
        progress: Called with the number of scenes done and the total.

    Returns:
        The annotations' checksums.
    """
    (folder / 'annotations').mkdir()
    total = sum(params.num_images(split) for split in SPLITS)
    done = 0
    checksums = {}
    for split, material in materials.items():
        (folder / split).mkdir()
        images: list[dict] = []
        annotations: list[dict] = []
        for index in range(params.num_images(split)):
            name = f'{index:06d}.jpg'
            encoded, scene = _encode_scene(material, index, params)
            (folder / split / name).write_bytes(encoded)
            photo, *region = scene.region
            images.append(
                {
                    'id': index,
                    'file_name': name,
                    'width': params.image_size,
                    'height': params.image_size,
                    'photo': photo,
                    'photo_region': region,
                    f'clutter_{noun}s': scene.clutter_ids,
                }
            )
            for digit in scene.digits:
                bbox = digit.bbox
                annotations.append(
                    {
                        'id': len(annotations) + 1,
                        'image_id': index,
                        'category_id': digit.label,
                        'bbox': list(bbox),
                        'area': bbox[2] * bbox[3],
                        'iscrowd': 0,
                        noun: digit.digit_id,
                    }
                )
            done += 1
            if progress is not None:
                progress(done, total)
        text = json.dumps(
            dict(
                info=dict(
                    description=f'{noun.capitalize()} scenes', **asdict(params)
                ),
                licenses=[],
                categories=[
                    dict(id=label, name=name)
                    for label, name in enumerate(classes)
                ],
                images=images,
                annotations=annotations,
            )
        )
        (folder / 'annotations' / f'{split}.json').write_text(text)
        checksums[split] = hashlib.sha256(text.encode()).hexdigest()
    return checksums
