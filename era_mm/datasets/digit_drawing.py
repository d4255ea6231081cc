"""Sources of the digit data sets, and drawing of all made ones.

The sources are the handwritten digits and the two photographs in the
scikit-learn package. They are split into train, val and test so that no two
splits share a digit or a part of a photograph. Digits, clutter and
backgrounds are painted from them.

Source: ours. Digits: `sklearn.datasets.load_digits` (the test part of the UCI
ML hand-written digits data set). Photographs:
`sklearn.datasets.load_sample_images` (china.jpg and flower.jpg, CC BY).

Read in this order: `Material`, `split_material`, `draw_background`,
`draw_digit`, `blend`, `add_clutter`, `finish`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from sklearn.datasets import load_digits, load_sample_images

CLASSES = tuple(str(digit) for digit in range(10))
SPLITS = ('train', 'val', 'test')
#: A pixel belongs to the ink where the digit covers at least this much of it.
INK = 0.5
#: What is painted later leaves at least this share of a digit's ink visible.
MIN_VISIBLE = 0.75

#: Of ten digits (or photo tiles), how many go to train, val and test.
_SHARES = {'train': 6, 'val': 2, 'test': 2}
#: Photographs are cut into tiles of this side; a crop never leaves its tile.
_TILE = 106
#: Digits are enlarged this much once, smoothly, and then drawn from there: a
#: glyph has twelve cells of this side, and its digit the eight in the middle.
ZOOM = 6


@dataclass(frozen=True)
class Material:
    """Digits, or letters, and photo tiles that one split may use.

    Args:
        split: 'train', 'val' or 'test'.
        digit_ids: Their numbers: of digits, indices into `load_digits`.
        labels: The class of each.
        glyphs: Each of them, in twelve by twelve cells of side `ZOOM`.
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
    """A digit in an image: its class, sample index and visible ink."""

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

    @classmethod
    def inside(
        cls, coverage: np.ndarray, top: int, left: int, size: int
    ) -> Layer:
        """Cut off what lies outside an image of side ``size``."""
        y, x = max(top, 0), max(left, 0)
        bottom, right = max(size - top, 0), max(size - left, 0)
        return cls(coverage[y - top : bottom, x - left : right], y, x)

    @property
    def window(self) -> tuple[slice, slice]:
        """The rows and columns of the image that it touches."""
        height, width = self.coverage.shape
        return (
            slice(self.top, self.top + height),
            slice(self.left, self.left + width),
        )


def split_material(seed: int) -> dict[str, Material]:
    """Share out digits and photo tiles; no two splits get the same one."""
    rng = np.random.default_rng([seed, 0])
    bunch = load_digits()
    padded = np.pad(bunch.images / 16.0, ((0, 0), (2, 2), (2, 2)))
    glyphs = np.stack(
        [
            ndimage.zoom(
                digit, ZOOM, order=3, mode='grid-constant', grid_mode=True
            )
            for digit in padded
        ]
    )
    # The shares are taken class by class, so that every split has them all.
    digit_ids: dict[str, list[int]] = {split: [] for split in SPLITS}
    for label in range(len(CLASSES)):
        ids = rng.permutation(np.flatnonzero(bunch.target == label))
        for split, part in shares(ids).items():
            digit_ids[split].extend(int(i) for i in part)

    tiles, regions = split_photos(rng)
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


def split_photos(
    rng: np.random.Generator,
) -> tuple[
    dict[str, list[np.ndarray]],
    dict[str, list[tuple[str, int, int, int, int]]],
]:
    """Share out the photo tiles; returns their pixels and regions."""
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
        for split, part in shares(order).items():
            for index in part:
                x, y = corners[index]
                name = Path(filename).name
                regions[split].append((name, x, y, _TILE, _TILE))
                tiles[split].append(photo[y : y + _TILE, x : x + _TILE])
    return tiles, regions


def draw_background(
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


def draw_digit(
    material: Material,
    size: int,
    rng: np.random.Generator,
    heights: tuple[float, float],
    max_angle: float,
) -> tuple[int, np.ndarray]:
    """Choose a digit of the split and draw it.

    Args:
        material: What may be used.
        size: Side of the image.
        rng: Random stream.
        heights: Least and greatest height, as a share of ``size``.
        max_angle: Greatest rotation in radians.

    Returns:
        Its position in ``material`` and its coverage.
    """
    index = int(rng.integers(len(material.digit_ids)))
    low, high = (math.log(height) for height in heights)
    coverage = _warp_digit(
        material.glyphs[index],
        size * math.exp(rng.uniform(low, high)),
        rng.uniform(-max_angle, max_angle),
        rng.uniform(-0.2, 0.2),
        rng.uniform(0.75, 1.25),
    )
    return index, coverage


def place(
    coverage: np.ndarray, size: int, rng: np.random.Generator, beyond: float
) -> Layer:
    """Put coverage at a random place of an image.

    Args:
        coverage: What to place.
        size: Side of the image.
        rng: Random stream.
        beyond: Share of the coverage that may lie outside, per axis.
    """
    corner = []
    for extent in coverage.shape:
        slack = int(beyond * extent)
        corner.append(
            int(rng.integers(-slack, max(size - extent + slack, 0) + 1))
        )
    return Layer.inside(coverage, corner[0], corner[1], size)


def choose_colour(
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


def blend(
    canvas: np.ndarray,
    digits: list[Digit],
    layer: Layer,
    colour: np.ndarray,
    opacity: float,
) -> bool:
    """Paint a layer, unless it would hide too much of a digit."""
    shown = opacity * layer.coverage
    hidden = shown >= INK
    if any(
        (digit.ink[layer.window] & hidden).sum()
        > digit.ink.sum() - MIN_VISIBLE * digit.ink_drawn
        for digit in digits
    ):
        return False
    for digit in digits:
        digit.ink[layer.window] &= ~hidden
    window = canvas[layer.window]
    window += shown[..., None] * (colour - window)
    return True


def add_clutter(
    canvas: np.ndarray,
    digits: list[Digit],
    clutter_ids: list[int],
    material: Material,
    rng: np.random.Generator,
    heights: tuple[float, float],
) -> None:
    """Try to add one thing that is no digit.

    Args:
        canvas: What to paint on.
        digits: Digits that must stay visible.
        clutter_ids: Gets the sample of a digit whose fragment is painted.
        material: What may be used.
        rng: Random stream.
        heights: Of the digit a fragment is from; see `draw_digit`.
    """
    size = len(canvas)
    kind = rng.choice(['fragment', 'stroke', 'blob'])
    index = None
    if kind == 'fragment':
        index, coverage = draw_digit(material, size, rng, heights, math.pi)
        layer = place(_fragment(coverage, rng), size, rng, 0.3)
    elif kind == 'stroke':
        layer = _stroke(size, rng)
    else:
        layer = place(_blob(size, rng), size, rng, 0.5)
    if layer.coverage.max(initial=0) < INK:
        return
    colour = choose_colour(canvas, layer, rng.uniform(0.1, 0.65), rng)
    painted = blend(canvas, digits, layer, colour, rng.uniform(0.5, 1.0))
    if painted and index is not None:
        clutter_ids.append(int(material.digit_ids[index]))


def finish(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur some images, add noise to all; returns ``uint8`` pixels."""
    if rng.random() < 0.3:
        canvas = ndimage.gaussian_filter(
            canvas, (rng.uniform(0.3, 0.8),) * 2 + (0,)
        )
    canvas = canvas + rng.uniform(0, 0.025) * rng.standard_normal(
        canvas.shape, dtype=np.float32
    )
    return np.rint(255 * np.clip(canvas, 0, 1)).astype(np.uint8)


def shares(items: np.ndarray) -> dict[str, np.ndarray]:
    """Cut a shuffled array into the splits' shares."""
    parts = {}
    start, given = 0, 0
    for split, share in _SHARES.items():
        given += share
        stop = round(len(items) * given / sum(_SHARES.values()))
        parts[split] = items[start:stop]
        start = stop
    return parts


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
    to_glyph *= 8 * ZOOM / height
    # The eight cells and a little around them, as far as they reach.
    reach = np.abs(np.linalg.inv(to_glyph)) @ np.full(2, 4.7 * ZOOM)
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


def _fragment(coverage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keep the third of a digit that lies to one side of a line."""
    angle = rng.uniform(0, 2 * math.pi)
    rows, cols = np.indices(coverage.shape)
    along = math.cos(angle) * cols + math.sin(angle) * rows
    limit = np.quantile(along[coverage >= INK], 0.35)
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
