"""Write the digit crops data set; needs no download.

python tools/make_digit_crops.py --contact-sheet sheet.png
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from era_mm.datasets.command import main
from era_mm.datasets.digit_crops import CropParams, make_digit_crops
from era_mm.datasets.digit_drawing import SPLITS
from era_mm.visualization.panels import Panel, save_grid


def save_contact_sheet(
    root: Path, path: Path, columns: int = 20, rows_per_split: int = 4
) -> None:
    """Draw the first crops of each split; equal classes are in a column."""
    rows = []
    for split in SPLITS:
        entries = json.loads((root / 'sources' / f'{split}.json').read_text())
        panels = [
            Panel(np.asarray(Image.open(root / split / entry['file_name'])))
            for entry in entries[: columns * rows_per_split]
        ]
        rows += [
            panels[start : start + columns]
            for start in range(0, len(panels), columns)
        ]
    save_grid(rows, path, scale=2)


if __name__ == '__main__':
    main(
        __doc__.splitlines()[0],
        'data/digit_crops',
        CropParams,
        make_digit_crops,
        save_contact_sheet,
    )
