"""Digit scenes: a detection data set that needs no download.

The handwritten digits and the two photographs that come inside the
scikit-learn package are composed into scenes: digits of several sizes,
colours and contrasts over photo crops, with clutter and some occlusion. The
result is an ordinary COCO data set with the classes '0' to '9'; mmdet's
`CocoDataset` reads it.

Source: ours. Digits: `sklearn.datasets.load_digits` (the test part of the UCI
ML hand-written digits data set). Photographs:
`sklearn.datasets.load_sample_images` (china.jpg and flower.jpg, CC BY).

Read in this order: `SceneParams`, `make_digit_scenes`, `Material`,
`compose_scene`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from sklearn.datasets import load_digits, load_sample_images

CLASSES = tuple(str(digit) for digit in range(10))
SPLITS = ('train', 'val', 'test')
MANIFEST = 'digit_scenes.json'

#: Raised whenever the same parameters would give other bytes.
_FORMAT = 1
#: Of ten digits (or photo tiles), how many go to train, val and test.
_SHARES = {'train': 6, 'val': 2, 'test': 2}
#: Photographs are cut into tiles of this side; a crop never leaves its tile.
_TILE = 106
#: Digits are enlarged this much once, smoothly, and then drawn from there.
_ZOOM = 6
#: A pixel belongs to the ink where the digit covers at least this much of it.
_INK = 0.5
#: A digit stays annotated only while this share of its ink can be seen.
_MIN_VISIBLE = 0.75


@dataclass(frozen=True)
class SceneParams:
    """What the data set depends on; equal parameters give equal bytes.

    Args:
        seed: Seed of every random choice.
        num_train: Scenes in the train split.
        num_val: Scenes in the val split.
        num_test: Scenes in the test split.
        image_size: Side of the square images in pixels.
    """

    seed: int = 0
    num_train: int = 1200
    num_val: int = 500
    num_test: int = 1000
    image_size: int = 128

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            lowest = {'seed': 0, 'image_size': 64}.get(item.name, 1)
            if not isinstance(value, int) or value < lowest:
                raise ValueError(
                    f'`{item.name}` must be an integer of at least {lowest}, '
                    f'but got {value!r}.'
                )

    def num_scenes(self, split: str) -> int:
        """Return the number of scenes of a split."""
        return getattr(self, f'num_{split}')


@dataclass(frozen=True)
class Material:
    """Digits and photo tiles that one split may use.

    Args:
        split: 'train', 'val' or 'test'.
        digit_ids: Indices into `load_digits`.
        labels: The class of each digit.
        glyphs: Each digit, zero-padded and smoothly enlarged.
        tiles: RGB pixels of each photo tile.
        regions: `photo file, x, y, width, height` of each tile.
    """

    split: str
    digit_ids: np.ndarray
    labels: np.ndarray
    glyphs: np.ndarray
    tiles: list[np.ndarray]
    regions: list[tuple[str, int, int, int, int]]


@dataclass
class Digit:
    """A digit in a scene: its class, sample index and visible ink."""

    label: int
    digit_id: int
    ink: np.ndarray
    ink_drawn: int

    @property
    def visible(self) -> float:
        """Share of the drawn ink that can still be seen."""
        return self.ink.sum() / max(self.ink_drawn, 1)

    @property
    def bbox(self) -> tuple[int, int, int, int]:
        """`x, y, width, height` of the visible ink in pixels."""
        rows = np.flatnonzero(self.ink.any(axis=1))
        cols = np.flatnonzero(self.ink.any(axis=0))
        return (
            int(cols[0]),
            int(rows[0]),
            int(cols[-1] - cols[0] + 1),
            int(rows[-1] - rows[0] + 1),
        )


@dataclass(frozen=True)
class Layer:
    """Something to paint: its coverage and the corner where it goes."""

    coverage: np.ndarray
    top: int
    left: int

    @property
    def window(self) -> tuple[slice, slice]:
        """The rows and columns of the scene that it touches."""
        height, width = self.coverage.shape
        return (
            slice(self.top, self.top + height),
            slice(self.left, self.left + width),
        )


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

    Everything is written into a temporary folder beside `out`, which is then
    renamed: `out` never exists in part.

    Args:
        out: Folder of the data set.
        params: What to make.
        progress: Called with the number of scenes done and the total.

    Returns:
        True if the data set was written, False if it was there already.

    Raises:
        FileExistsError: If `out` holds something else.
    """
    out = Path(out)
    params = params or SceneParams()
    if _is_there(out, params):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    with _temporary_folder(out) as folder:
        _write(folder, params, progress)
        try:
            folder.rename(out)
        except OSError:
            # Another process may have finished the same set meanwhile.
            if _is_there(out, params):
                return False
            raise
    return True


def split_material(seed: int) -> dict[str, Material]:
    """Share out digits and photo tiles; no two splits get the same one."""
    rng = np.random.default_rng([seed, 0])
    bunch = load_digits()
    padded = np.pad(bunch.images / 16.0, ((0, 0), (2, 2), (2, 2)))
    glyphs = np.stack(
        [
            ndimage.zoom(
                digit, _ZOOM, order=3, mode='grid-constant', grid_mode=True
            )
            for digit in padded
        ]
    )
    # The shares are taken class by class, so that every split has them all.
    digit_ids: dict[str, list[int]] = {split: [] for split in SPLITS}
    for label in range(len(CLASSES)):
        ids = rng.permutation(np.flatnonzero(bunch.target == label))
        for split, part in _shares(ids).items():
            digit_ids[split].extend(int(i) for i in part)

    photos = load_sample_images()
    regions: dict[str, list[tuple[str, int, int, int, int]]] = {
        split: [] for split in SPLITS
    }
    tiles: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for filename, photo in zip(photos.filenames, photos.images, strict=True):
        height, width = photo.shape[:2]
        corners = [
            (x, y)
            for y in range(0, height - _TILE + 1, _TILE)
            for x in range(0, width - _TILE + 1, _TILE)
        ]
        order = rng.permutation(len(corners))
        for split, part in _shares(order).items():
            for index in part:
                x, y = corners[index]
                name = Path(filename).name
                regions[split].append((name, x, y, _TILE, _TILE))
                tiles[split].append(photo[y : y + _TILE, x : x + _TILE])
    return {
        split: Material(
            split,
            np.array(digit_ids[split]),
            bunch.target[digit_ids[split]],
            glyphs[digit_ids[split]],
            tiles[split],
            regions[split],
        )
        for split in SPLITS
    }


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
    canvas, region = _background(material, size, rng)
    digits: list[Digit] = []
    clutter_ids: list[int] = []

    for _ in range(rng.integers(2, 6)):
        _add_clutter(canvas, digits, clutter_ids, material, rng)
    wanted = rng.integers(3, 8)
    for _ in range(30):
        if len(digits) == wanted:
            break
        _add_digit(canvas, digits, material, rng)
    for _ in range(rng.integers(0, 4)):
        _add_clutter(canvas, digits, clutter_ids, material, rng)

    if rng.random() < 0.3:
        canvas = ndimage.gaussian_filter(
            canvas, (rng.uniform(0.3, 0.8),) * 2 + (0,)
        )
    canvas = canvas + rng.uniform(0, 0.025) * rng.standard_normal(
        canvas.shape, dtype=np.float32
    )
    image = np.rint(255 * np.clip(canvas, 0, 1)).astype(np.uint8)
    return Scene(image, digits, clutter_ids, region)


def _shares(items: np.ndarray) -> dict[str, np.ndarray]:
    """Cut a shuffled array into the splits' shares."""
    parts = {}
    start, given = 0, 0
    for split, share in _SHARES.items():
        given += share
        stop = round(len(items) * given / sum(_SHARES.values()))
        parts[split] = items[start:stop]
        start = stop
    return parts


def _background(
    material: Material, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[str, int, int, int, int]]:
    """Crop, turn and recolour a piece of one photo tile."""
    index = int(rng.integers(len(material.tiles)))
    tile = material.tiles[index]
    side = int(rng.integers(_TILE // 3, _TILE + 1))
    y, x = (int(rng.integers(_TILE - side + 1)) for _ in range(2))
    crop = Image.fromarray(
        np.ascontiguousarray(tile[y : y + side, x : x + side])
    )
    crop = crop.resize((size, size), Image.Resampling.BICUBIC)
    canvas = np.asarray(crop, dtype=np.float64) / 255
    canvas = np.rot90(canvas, int(rng.integers(4)))
    if rng.random() < 0.5:
        canvas = canvas[:, ::-1]
    grey = canvas.mean(axis=2, keepdims=True)
    canvas = grey + rng.uniform(0, 1.2) * (canvas - grey)
    canvas = rng.uniform(0.35, 0.7) * canvas + rng.uniform(0, 0.1)
    photo, left, top, _, _ = material.regions[index]
    return (np.clip(canvas, 0, 1), (photo, left + x, top + y, side, side))


def _warp_digit(
    glyph: np.ndarray,
    height: float,
    angle: float,
    shear: float,
    aspect: float,
) -> np.ndarray:
    """Draw a digit at another size and angle; returns its coverage.

    Args:
        glyph: The enlarged sample.
        height: Height of the eight sample rows in pixels.
        angle: Rotation in radians.
        shear: Horizontal shift per unit of height.
        aspect: Width over height.
    """
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.array([[cos, -sin], [sin, cos]])
    # Output pixel -> glyph pixel, rows first.
    to_glyph = np.array([[1.0, 0.0], [shear, 1.0 / aspect]]) @ rotation
    to_glyph *= 8 * _ZOOM / height
    # The eight cells and a little around them, as far as they reach.
    reach = np.abs(np.linalg.inv(to_glyph)) @ np.full(2, 4.7 * _ZOOM)
    shape = tuple(2 * np.ceil(reach).astype(int) + 1)
    centre = (np.array(glyph.shape) - 1) / 2
    offset = centre - to_glyph @ ((np.array(shape) - 1) / 2)
    value = ndimage.affine_transform(
        glyph, to_glyph, offset, shape, order=1, mode='constant'
    )
    # A steeper edge than the blurred samples have, but never a jagged one.
    coverage = np.clip(0.5 + (value - 0.4) * 1.6, 0, 1)
    coverage = coverage * coverage * (3 - 2 * coverage)
    rows = np.flatnonzero((coverage > 0.02).any(axis=1))
    cols = np.flatnonzero((coverage > 0.02).any(axis=0))
    return coverage[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]


def _random_digit(
    material: Material, rng: np.random.Generator, size: int, max_angle: float
) -> tuple[int, np.ndarray]:
    """Choose a digit of the split and draw it; returns its position, ink."""
    index = int(rng.integers(len(material.digit_ids)))
    height = size * math.exp(rng.uniform(math.log(0.14), math.log(0.4)))
    coverage = _warp_digit(
        material.glyphs[index],
        height,
        rng.uniform(-max_angle, max_angle),
        rng.uniform(-0.2, 0.2),
        rng.uniform(0.75, 1.25),
    )
    return index, coverage


def _place(
    coverage: np.ndarray, size: int, rng: np.random.Generator, beyond: float
) -> Layer:
    """Put coverage at a random place of a scene.

    Args:
        coverage: What to place.
        size: Side of the scene.
        rng: Random stream.
        beyond: Share of the coverage that may lie outside, per axis.
    """
    corner = []
    for extent in coverage.shape:
        slack = int(beyond * extent)
        corner.append(
            int(rng.integers(-slack, max(size - extent + slack, 0) + 1))
        )
    top, left = corner
    y, x = max(top, 0), max(left, 0)
    return Layer(coverage[y - top : size - top, x - left : size - left], y, x)


def _colour(
    canvas: np.ndarray,
    layer: Layer,
    contrast: float,
    rng: np.random.Generator,
    light: float = 0.5,
) -> np.ndarray:
    """Choose a colour, lighter or darker than what it will cover.

    It is lighter with probability ``light``, and where darker has no room.
    """
    beneath = np.average(
        canvas[layer.window].mean(axis=2), weights=layer.coverage
    )
    sign = 1 if rng.random() < light else -1
    if not 0 <= beneath + sign * contrast <= 1:
        sign = 1 if beneath < 0.5 else -1
    tint = rng.uniform(-1, 1, 3)
    tint -= tint.mean()
    return np.clip(beneath + sign * contrast + 0.25 * tint, 0, 1)


def _blend(
    canvas: np.ndarray,
    digits: list[Digit],
    layer: Layer,
    colour: np.ndarray,
    opacity: float,
) -> bool:
    """Paint a layer, unless it would hide too much of a digit."""
    shown = opacity * layer.coverage
    hidden = shown >= _INK
    if any(
        (digit.ink[layer.window] & hidden).sum()
        > digit.ink.sum() - _MIN_VISIBLE * digit.ink_drawn
        for digit in digits
    ):
        return False
    for digit in digits:
        digit.ink[layer.window] &= ~hidden
    window = canvas[layer.window]
    window += shown[..., None] * (colour - window)
    return True


def _add_digit(
    canvas: np.ndarray,
    digits: list[Digit],
    material: Material,
    rng: np.random.Generator,
) -> None:
    """Try to add one annotated digit."""
    size = len(canvas)
    index, coverage = _random_digit(material, rng, size, 0.25)
    layer = _place(coverage, size, rng, 0.15)
    ink = np.zeros((size, size), dtype=bool)
    ink[layer.window] = layer.coverage >= _INK
    digit = Digit(
        int(material.labels[index]),
        int(material.digit_ids[index]),
        ink,
        int((coverage >= _INK).sum()),
    )
    if digit.visible < _MIN_VISIBLE:
        return
    colour = _colour(canvas, layer, rng.uniform(0.3, 0.6), rng, light=1.0)
    if _blend(canvas, digits, layer, colour, rng.uniform(0.75, 1.0)):
        digits.append(digit)


def _add_clutter(
    canvas: np.ndarray,
    digits: list[Digit],
    clutter_ids: list[int],
    material: Material,
    rng: np.random.Generator,
) -> None:
    """Try to add one thing that is no digit."""
    size = len(canvas)
    kind = rng.choice(['fragment', 'stroke', 'blob'])
    index = None
    if kind == 'fragment':
        index, coverage = _random_digit(material, rng, size, math.pi)
        layer = _place(_fragment(coverage, rng), size, rng, 0.3)
    elif kind == 'stroke':
        layer = _stroke(size, rng)
    else:
        layer = _place(_blob(size, rng), size, rng, 0.5)
    if layer.coverage.max(initial=0) < _INK:
        return
    colour = _colour(canvas, layer, rng.uniform(0.1, 0.65), rng)
    painted = _blend(canvas, digits, layer, colour, rng.uniform(0.5, 1.0))
    if painted and index is not None:
        clutter_ids.append(int(material.digit_ids[index]))


def _fragment(coverage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keep the third of a digit that lies to one side of a line."""
    angle = rng.uniform(0, 2 * math.pi)
    rows, cols = np.indices(coverage.shape)
    along = math.cos(angle) * cols + math.sin(angle) * rows
    limit = np.quantile(along[coverage >= _INK], 0.35)
    return coverage * np.clip(limit - along + 0.5, 0, 1)


def _stroke(size: int, rng: np.random.Generator) -> Layer:
    """Draw one bent line as wide as a digit's."""
    fine = 3
    points = rng.uniform(-0.1, 1.1, (3, 2)) * size
    # Shrinking towards the first point gives lines of all lengths.
    points = points[0] + rng.uniform(0.25, 1.0) * (points - points[0])
    t = np.linspace(0, 1, 17)[:, None]
    curve = (
        (1 - t) ** 2 * points[0]
        + 2 * t * (1 - t) * points[1]
        + t**2 * points[2]
    ) * fine
    picture = Image.new('L', (size * fine, size * fine))
    width = round(
        fine * size * math.exp(rng.uniform(math.log(0.015), math.log(0.06)))
    )
    ImageDraw.Draw(picture).line(
        [tuple(point) for point in curve.tolist()],
        fill=255,
        width=width,
        joint='curve',
    )
    picture = picture.resize((size, size), Image.Resampling.BOX)
    left, top, right, bottom = picture.getbbox() or (0, 0, 0, 0)
    coverage = np.asarray(picture, dtype=np.float64) / 255
    return Layer(coverage[top:bottom, left:right], top, left)


def _blob(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one soft ellipse, filled or as a ring."""
    radii = size * np.exp(rng.uniform(math.log(0.03), math.log(0.2), 2))
    reach = math.ceil(radii.max() * 1.5) + 2
    dy, dx = np.indices((2 * reach + 1, 2 * reach + 1)) - reach
    angle = rng.uniform(0, math.pi)
    u = (math.cos(angle) * dx + math.sin(angle) * dy) / radii[0]
    v = (math.cos(angle) * dy - math.sin(angle) * dx) / radii[1]
    edge = (np.sqrt(u * u + v * v) - 1) * radii.min()
    coverage = np.clip(0.5 - edge / rng.uniform(1, 3), 0, 1)
    if rng.random() < 0.4:
        thickness = rng.uniform(0.02, 0.05) * size
        coverage *= np.clip(0.5 + edge + thickness, 0, 1)
    return coverage


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


def _write(
    folder: Path,
    params: SceneParams,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write images, annotations and, last, the manifest."""
    (folder / 'annotations').mkdir()
    total = sum(params.num_scenes(split) for split in SPLITS)
    done = 0
    checksums = {}
    for split, material in split_material(params.seed).items():
        (folder / split).mkdir()
        images: list[dict] = []
        annotations: list[dict] = []
        for index in range(params.num_scenes(split)):
            name = f'{index:06d}.jpg'
            encoded, scene = _encode_scene(material, index, params)
            (folder / split / name).write_bytes(encoded)
            photo, *region = scene.region
            images.append(
                dict(
                    id=index,
                    file_name=name,
                    width=params.image_size,
                    height=params.image_size,
                    photo=photo,
                    photo_region=region,
                    clutter_digits=scene.clutter_ids,
                )
            )
            for digit in scene.digits:
                bbox = digit.bbox
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=index,
                        category_id=digit.label,
                        bbox=list(bbox),
                        area=bbox[2] * bbox[3],
                        iscrowd=0,
                        digit=digit.digit_id,
                    )
                )
            done += 1
            if progress is not None:
                progress(done, total)
        text = json.dumps(
            dict(
                info=dict(description='Digit scenes', **asdict(params)),
                licenses=[],
                categories=[
                    dict(id=label, name=name)
                    for label, name in enumerate(CLASSES)
                ],
                images=images,
                annotations=annotations,
            )
        )
        (folder / 'annotations' / f'{split}.json').write_text(text)
        checksums[split] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(
        json.dumps(
            dict(**_recipe(params), sha256=checksums),
            indent=2,
        )
        + '\n'
    )


def _recipe(params: SceneParams) -> dict[str, int]:
    """What decides about the bytes."""
    return dict(format=_FORMAT, **asdict(params))


def _is_there(out: Path, params: SceneParams) -> bool:
    """Tell whether `out` holds the data set; refuse anything else."""
    if not out.exists():
        return False
    manifest = out / MANIFEST
    if not manifest.is_file():
        if out.is_dir() and not any(out.iterdir()):
            return False
        raise FileExistsError(
            f'{out} must be free or hold digit scenes, but it exists without '
            f'{MANIFEST}. Nothing was changed; choose another folder or '
            'move this one away.'
        )
    try:
        found = json.loads(manifest.read_text())
    except ValueError as error:
        raise FileExistsError(
            f'{manifest} must say how the digit scenes were made, but it '
            f'cannot be read: {error}. Nothing was changed; choose another '
            'folder or move this one away.'
        ) from error
    differing = ', '.join(
        f'{key} {found.get(key)} (there) and {value} (asked for)'
        for key, value in _recipe(params).items()
        if found.get(key) != value
    )
    if not differing:
        return True
    raise FileExistsError(
        f'{out} holds digit scenes made otherwise: {differing}. Nothing was '
        'changed; choose another folder or move this one away.'
    )


@contextlib.contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    """A locked folder beside `out` that is gone afterwards."""
    folder = Path(
        tempfile.mkdtemp(prefix=f'.{out.name}.partial-', dir=out.parent)
    )
    # mkdtemp makes it private; a data set is readable like any folder.
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove what a killed run left: its lock went with the process."""
    for folder in out.parent.glob(f'.{out.name}.partial-*'):
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(folder)
        finally:
            os.close(lock)
