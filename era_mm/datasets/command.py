"""The command line of the tools that make a data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from era_mm.datasets.made_folder import SplitParams


def main(
    description: str,
    out: str,
    params: type[SplitParams],
    make: Callable[..., bool],
    save_contact_sheet: Callable[[Path, Path], None],
) -> None:
    """Make a data set and, if asked for, its contact sheet.

    Args:
        description: Description of the tool.
        out: Default folder of the data set.
        params: Its parameters' class; each of them becomes an option.
        make: Writes it.
        save_contact_sheet: Draws the first images of each split.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--out', type=Path, default=out, help='its folder')
    for item in fields(params):
        parser.add_argument(
            f'--{item.name.replace("_", "-")}',
            type=int,
            default=item.default,
            help=item.name.replace('_', ' ').replace('num', 'images in'),
        )
    parser.add_argument(
        '--contact-sheet',
        type=Path,
        metavar='PNG',
        help='also draw the first images of each split',
    )
    args = vars(parser.parse_args())
    root, sheet = args.pop('out'), args.pop('contact_sheet')
    try:
        # No bar in a log.
        with tqdm(
            desc='images', unit='image', leave=False, disable=None
        ) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            written = make(root, params(**args), progress)
    except (FileExistsError, ValueError) as error:
        raise SystemExit(f'{Path(sys.argv[0]).name}: {error}') from None
    print(f'{root}: {"written" if written else "already there"}')
    if sheet:
        save_contact_sheet(root, sheet)
        print(f'{sheet}: written')
