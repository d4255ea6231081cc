"""``report``: the command, and the same as a function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from era_mm.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog='report',
        description='Write one page that shows what distillations did, from '
        'their work dirs: curves, differences, the decomposition, images. '
        'It needs no network, and nothing in the work dirs is written.',
    )
    parser.add_argument(
        'work_dirs',
        nargs='+',
        metavar='WORK_DIR',
        help='work dirs of the distillation, of the plain student and of '
        "tests of both, with several seeds. The teacher's run is found if its "
        'checkpoint is in a work dir',
    )
    parser.add_argument(
        '--out', required=True, metavar='FILE', help='the page, a .html'
    )
    parser.add_argument(
        '--title', default='What the distillation did', help='its heading'
    )
    parser.add_argument(
        '--images',
        type=int,
        default=200,
        metavar='N',
        help='maximum number of val images to evaluate; 0: read neither data '
        'nor weights (default: 200)',
    )
    parser.add_argument(
        '--shown',
        type=int,
        default=6,
        metavar='N',
        help='number of images to show (default: 6)',
    )
    parser.add_argument(
        '--seconds',
        type=float,
        default=120,
        metavar='S',
        help='time after which no further image is evaluated (default: 120)',
    )
    parser.add_argument(
        '--table',
        metavar='FILE',
        help='the table.json of a demo, shown with the summary',
    )
    parser.add_argument(
        '--traceback',
        action='store_true',
        help='print the whole traceback of an error',
    )
    parser.set_defaults(local_rank=0)
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the page and say where it is."""

    def tell(text: str) -> None:
        if sys.stderr.isatty():
            print(f'\r\033[K{text} ...', end='', file=sys.stderr, flush=True)

    path = write_report(
        args.work_dirs,
        args.out,
        title=args.title,
        images=args.images,
        shown=args.shown,
        seconds=args.seconds,
        table=args.table,
        tell=tell,
    )
    if sys.stderr.isatty():
        print('\r\033[K', end='', file=sys.stderr)
    print(path)


def write_report(
    work_dirs: Sequence[str | Path],
    out: str | Path,
    *,
    title: str = 'What the distillation did',
    images: int = 200,
    shown: int = 6,
    seconds: float = 120.0,
    table: str | Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write one page about some runs.

    If something is missing (a log, a checkpoint, data), the page is written
    without it and says so. Nothing is written to the work dirs, and nothing
    is downloaded.

    Source: ours.

    Args:
        work_dirs: Work dirs of distillations, plain runs and tests.
        out: The page to write.
        title: Its heading.
        images: Maximum number of val images to evaluate; 0: none.
        shown: Number of images to show.
        seconds: Time after which no further image is evaluated.
        table: The ``table.json`` of a demo, shown with the summary.
        tell: Called with the current activity.

    Returns:
        The page's path.

    Raises:
        UserError: A work dir is no folder, ``out`` cannot be written or lies
            in a work dir, a number is negative, plotly or jinja2 is not
            installed.
    """
    from era_mm.engine.whole_files import write_whole

    from . import figures, residual_figures
    from .comparison import compare_runs
    from .page import read_measured, render
    from .panel_parts import Found, Options
    from .panels import look_at_images

    for name, number in (
        ('images', images),
        ('shown', shown),
        ('seconds', seconds),
    ):
        if not number >= 0:
            raise UserError(f'--{name}: expected 0 or more, but got {number}.')
    out = Path(out)
    _check_out(out, work_dirs)
    _check_installed()
    tell('reading the runs')
    comparison = compare_runs(work_dirs)
    measured = None if table is None else read_measured(table)
    found = Found(missing=['images and figures by class: not asked for'])
    if images > 0:
        found = look_at_images(
            comparison, Options(images, shown, seconds), tell
        )
    look = figures.Look(comparison)
    differences = [
        figures.class_differences(
            comparison, look, found.by_class, found.number, found.class_metric
        ),
        figures.size_differences(comparison, look),
    ]
    metric = figures.metric_over_time(comparison, look)
    tell('writing the page')
    page = render(
        title=title,
        comparison=comparison,
        found=found,
        figures={
            'metric': [metric] if metric else [],
            'differences': [f for f in differences if f is not None],
            'losses': figures.loss_terms(comparison, look),
            'estimates': [
                *residual_figures.unexplained(comparison),
                *found.figures,
            ],
        },
        measured=measured,
    )
    # So that an interruption leaves no incomplete page.
    write_whole(out, page.encode())
    return out


def write_demo_report(work: str | Path, images: int = 200) -> Path:
    """Write ``report.html`` into the folder of a demo.

    Args:
        work: The demo's folder: work dirs of trainings and tests in it, and
            ``table.json`` if it has measured anything.
        images: As in :func:`write_report`.

    Returns:
        The page's path.
    """
    work = Path(work)
    table = work / 'table.json'
    return write_report(
        sorted(
            file.parents[2] for file in work.glob('*/*/vis_data/config.py')
        ),
        work / 'report.html',
        title='What the demo did',
        images=images,
        table=table if table.is_file() else None,
    )


def _check_installed() -> None:
    """Check for plotly and jinja2 before minutes are spent on images."""
    from importlib.util import find_spec

    from .page import INSTALL

    for name in ('jinja2', 'plotly'):
        if find_spec(name) is None:
            raise UserError(
                f'The page needs {name}, which is not installed. {INSTALL}'
            )


def _check_out(out: Path, work_dirs: Sequence[str | Path]) -> None:
    if out.suffix not in ('.html', '.htm'):
        raise UserError(
            f'--out: expected a name that ends in .html, but got {str(out)!r}.'
        )
    if not out.parent.is_dir():
        raise UserError(
            f'--out: expected a file in an existing folder, but '
            f'{str(out.parent)!r} is none. Create it first.'
        )
    for folder in work_dirs:
        if out.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(
                f'--out: {str(out)!r} lies in the work dir {str(folder)!r}, '
                'in which nothing is written. Choose another folder.'
            )
