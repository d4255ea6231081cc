"""Grids of images with boxes, written as one PNG.

Read in this order: `Panel`, `draw_panel`, `save_grid`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

#: Ten colours that stay apart on photographs, one per class id modulo ten.
PALETTE = (
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (67, 133, 255),
    (245, 130, 48),
    (200, 80, 220),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
)


@dataclass
class Panel:
    """One image with its boxes.

    Args:
        image: RGB, uint8.
        boxes: `x1, y1, x2, y2` in pixels of `image`.
        labels: Text beside each box; its first character chooses the colour
            where it is a digit.
    """

    image: np.ndarray
    boxes: Sequence[Sequence[float]] = field(default_factory=list)
    labels: Sequence[str] = field(default_factory=list)


def draw_panel(panel: Panel, scale: int = 3) -> Image.Image:
    """Enlarge an image and draw its boxes and labels on it."""
    height, width = panel.image.shape[:2]
    picture = Image.fromarray(panel.image).resize(
        (width * scale, height * scale), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=4 * scale)
    for box, label in zip(panel.boxes, panel.labels, strict=True):
        index = ord(label[0]) - ord('0') if label else 0
        colour = PALETTE[index % len(PALETTE)]
        x1, y1, x2, y2 = (scale * value for value in box)
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=colour)
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
        text_height = bottom - top + 2
        text_y = y1 - text_height if y1 >= text_height else y2
        draw.rectangle(
            (x1, text_y, x1 + right - left + 2, text_y + text_height),
            fill=colour,
        )
        draw.text(
            (x1 + 1 - left, text_y + 1 - top), label, fill=(0, 0, 0), font=font
        )
    return picture


def save_grid(
    rows: Sequence[Sequence[Panel]],
    path: str | Path,
    titles: Sequence[str] = (),
    scale: int = 3,
) -> None:
    """Write panels as a grid.

    Args:
        rows: One sequence of panels per row, all images of one size.
        path: The PNG to write; its folder is made.
        titles: One line above each column, or empty.
        scale: Enlargement of the images.
    """
    gap = 2 * scale
    drawn = [[draw_panel(panel, scale) for panel in row] for row in rows]
    width, height = drawn[0][0].size
    title_height = 8 * scale if titles else 0
    columns = max(len(row) for row in drawn)
    sheet = Image.new(
        'RGB',
        (
            gap + columns * (width + gap),
            gap + title_height + len(drawn) * (height + gap),
        ),
        'white',
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=5 * scale)
    for column, title in enumerate(titles):
        draw.text(
            (gap + column * (width + gap), gap),
            title,
            fill=(0, 0, 0),
            font=font,
        )
    for i, row in enumerate(drawn):
        for j, picture in enumerate(row):
            sheet.paste(
                picture,
                (
                    gap + j * (width + gap),
                    gap + title_height + i * (height + gap),
                ),
            )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
