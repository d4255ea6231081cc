"""The command: runs a suite and writes its rows and the page."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console

from era_mm.engine.preflight import config_folders
from era_mm.errors import UserError

from .cells import ROOT, Cell, all_cells
from .page import write_page
from .results import read_results
from .rows import (
    Row,
    cell_key_of,
    header_of,
    key_of,
    read_rows,
    rows_of_others,
    write_rows,
)
from .running import Command, Matrix, worker_command
from .screen import open_screen
from .spec import read_suite


def run_suite(
    file: str | Path,
    *,
    jobs: int | None = None,
    work_dir: Path | None = None,
    results: Path = Path('results'),
    page: Path = Path('docs/results.md'),
    only: Sequence[str] = (),
    again: Sequence[str] = (),
    dry_run: bool = False,
    commit: str | None = None,
    command: Command = worker_command,
    console: Console | None = None,
) -> bool:
    """Run the unfinished part of a suite, and write its rows and the page.

    Rows are written whenever a run finishes, so an interruption loses only
    the epochs since the last checkpoints.

    Args:
        file: The suite file, see :mod:`~era_mm.engine.suite.spec`.
        jobs: Number of concurrent runs. None: as many as there are cores; 0:
            run nothing, and write the page from the existing rows.
        work_dir: Folder of the runs. None: work_dirs/suites/<name>.
        results: Folder of the rows.
        page: File of the page.
        only: Patterns of cells, 'pair/method/s0'; none: all. A teacher that
            they need is run as well.
        again: Patterns of cells to run again, from the beginning.
        dry_run: Only list what would be run.
        commit: Commit of the code. None: from git.
        command: See :data:`~era_mm.engine.suite.running.Command`.
        console: Where to report progress.

    Returns:
        Whether nothing failed.

    Raises:
        UserError: A wrong suite file, a missing config, a pattern that
            matches nothing, or another suite in the same folder.
    """
    suite = read_suite(file)
    jobs = len(os.sched_getaffinity(0)) if jobs is None else jobs
    if jobs < 0:
        raise UserError(f'--jobs: expected 0 or more, but got {jobs}.')
    for out in (results, page.parent):
        if not out.is_dir():
            raise UserError(
                f'suite: expected the folder {out} for the results. '
                'Run it in a checkout, or give another path.'
            )
    console = console or Console()
    rows_file = results / f'{suite.name}.jsonl'
    header = header_of(suite)
    _, rows = read_rows(rows_file)

    def save(found: Sequence[Row]) -> None:
        write_rows(rows_file, header, found)

    done = True
    work_dir = work_dir or Path('work_dirs/suites', suite.name)
    cells = all_cells(suite, work_dir)
    repeated = _matching(cells, again)
    others = [
        row
        for other, found in read_results(results)
        if other['suite'] != suite.name
        for row in found
    ]
    present = {
        key_of(row): row
        for row in [*rows, *rows_of_others(cells, rows, others)]
    }
    rows = list(present.values())
    if jobs or dry_run:
        keys = {cell.key for cell in repeated}
        with open_screen(jobs, console) as screen:
            matrix = Matrix(
                _chosen(cells, only),
                [row for row in rows if cell_key_of(row) not in keys],
                jobs=jobs,
                watcher=screen,
                save=save,
                commit=lambda: commit or commit_of_code(),
                command=command,
                gpus=_gpus(),
            )
            if dry_run:
                for line in _listing(matrix):
                    console.print(line, highlight=False, soft_wrap=True)
                return True
            with alone(work_dir), _stopped_as_by_keyboard():
                for cell in repeated:
                    shutil.rmtree(cell.folder, ignore_errors=True)
                done = matrix.run()
        rows = list(matrix.rows.values())
    save(rows)
    write_page(page, results, config_folders())
    console.print(f'{rows_file}\n{page}', highlight=False, soft_wrap=True)
    return done


def _chosen(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    if not only:
        return list(cells)
    chosen = _matching(cells, only)
    teachers = [cell.teacher for cell in chosen if cell.has_teacher]
    return [cell for cell in cells if cell in chosen or cell in teachers]


def _matching(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            raise UserError(
                f'suite: no cell matches {pattern!r}. Cells are named '
                f'pair/method/s0, for instance {cells[-1].name!r}.'
            )
    return [
        cell
        for cell in cells
        if any(fnmatchcase(cell.name, pattern) for pattern in patterns)
    ]


def _listing(matrix: Matrix) -> Iterator[str]:
    """A line for each cell with its state."""
    to_run = matrix.to_run()
    for cell in matrix.cells:
        state = 'finished'
        if cell in to_run:
            row = matrix.row(cell)
            state = 'to run'
            if matrix.current(cell):
                state = 'finished, but its weights are not here: to run'
            elif row is not None:
                state = 'failed before' if 'error' in row else 'changed since'
        unit, length = cell.length
        yield f'{cell.name}: {cell.config_name}, {length} {unit}: {state}'


def commit_of_code() -> str:
    """The commit of the code, with '-dirty' if it was changed since.

    Only files that affect results count; the suite itself writes results.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ['git', '-C', str(ROOT), *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    try:
        if Path(git('rev-parse', '--show-toplevel')).resolve() != ROOT:
            return 'not known'
        commit = git('rev-parse', '--short=12', 'HEAD')
        dirty = git('status', '--porcelain', '--', 'era_mm', 'configs')
    except (OSError, subprocess.CalledProcessError):
        return 'not known'
    return f'{commit}-dirty' if dirty else commit


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


@contextlib.contextmanager
def alone(work_dir: Path) -> Iterator[None]:
    """Refuse a second suite in the same folder.

    Raises:
        UserError: There is one.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(work_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f'suite: another one is running in {work_dir}. Wait for it, '
                'stop it, or give another folder with --work-dir.'
            ) from None
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _stopped_as_by_keyboard() -> Iterator[None]:
    """Let SIGTERM end the runs as Ctrl-C does."""
    before: Callable | int | None = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
