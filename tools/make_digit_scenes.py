"""Write the digit scenes data set; needs no download.

python tools/make_digit_scenes.py --contact-sheet sheet.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from era_mm.datasets.digit_scenes import (
    CLASSES,
    SPLITS,
    SceneParams,
    make_digit_scenes,
)
from era_mm.visualization.panels import Panel, save_grid


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    default = SceneParams()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--out', type=Path, default='data/digit_scenes')
    parser.add_argument('--seed', type=int, default=default.seed)
    for split in SPLITS:
        parser.add_argument(
            f'--num-{split}',
            type=int,
            default=default.num_images(split),
            help=f'scenes in the {split} split',
        )
    parser.add_argument(
        '--image-size',
        type=int,
        default=default.image_size,
        help='side of the square images in pixels',
    )
    parser.add_argument(
        '--contact-sheet',
        type=Path,
        metavar='PNG',
        help='also draw the first scenes of each split with their boxes',
    )
    return parser.parse_args()


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


def main() -> None:
    """Make the data set and, if asked for, its contact sheet."""
    args = parse_args()
    try:
        params = SceneParams(
            args.seed,
            args.num_train,
            args.num_val,
            args.num_test,
            args.image_size,
        )
        with tqdm(desc='scenes', unit='scene', leave=False) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            written = make_digit_scenes(args.out, params, progress)
    except (FileExistsError, ValueError) as error:
        raise SystemExit(f'{Path(__file__).name}: {error}') from None
    print(f'{args.out}: {"written" if written else "already there"}')
    if args.contact_sheet:
        save_contact_sheet(args.out, args.contact_sheet)
        print(f'{args.contact_sheet}: written')


if __name__ == '__main__':
    main()
