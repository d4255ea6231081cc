"""Write the digit scenes data set; needs no download.

python tools/make_digit_scenes.py --contact-sheet sheet.png
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from era_mm.datasets.command import main
from era_mm.datasets.digit_scenes import (
    CLASSES,
    SPLITS,
    SceneParams,
    make_digit_scenes,
)
from era_mm.visualization.panels import Panel, save_grid


def save_contact_sheet(
    root: Path, path: Path, columns: int = 8, rows_per_split: int = 2
) -> None:
    """Draw the first scenes of each split with their boxes."""
    rows = []
    for split in SPLITS:
        coco = json.loads((root / 'annotations' / f'{split}.json').read_text())
        panels = []
        for image in coco['images'][: columns * rows_per_split]:
            found = [
                item
                for item in coco['annotations']
                if item['image_id'] == image['id']
            ]
            boxes = [
                (x, y, x + width, y + height)
                for x, y, width, height in (item['bbox'] for item in found)
            ]
            pixels = np.asarray(Image.open(root / split / image['file_name']))
            panels.append(
                Panel(
                    pixels,
                    boxes,
                    [CLASSES[item['category_id']] for item in found],
                )
            )
        rows += [
            panels[start : start + columns]
            for start in range(0, len(panels), columns)
        ]
    save_grid(rows, path, scale=2)


if __name__ == '__main__':
    main(
        __doc__.splitlines()[0],
        'data/digit_scenes',
        SceneParams,
        make_digit_scenes,
        save_contact_sheet,
    )
