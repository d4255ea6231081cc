"""Contact sheet of a data set of made scenes.

Source: ours.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from .panels import Panel, save_grid


def save_scene_sheet(
    root: Path, path: Path, columns: int = 8, rows_per_split: int = 2
) -> None:
    """Draw the first scenes of each split with their boxes.

    Args:
        root: Folder of the data set.
        path: The picture.
        columns: Scenes in a row.
        rows_per_split: Rows for each split.
    """
    rows = []
    for split in ('train', 'val', 'test'):
        coco = json.loads((root / 'annotations' / f'{split}.json').read_text())
        names = {item['id']: item['name'] for item in coco['categories']}
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
                    [names[item['category_id']] for item in found],
                )
            )
        rows += [
            panels[start : start + columns]
            for start in range(0, len(panels), columns)
        ]
    save_grid(rows, path, scale=2)
