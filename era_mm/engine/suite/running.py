"""Runs the cells of a matrix, several concurrently."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from . import logs
from .cells import Cell, read_json, write_json
from .rows import (
    Key,
    Row,
    failed_row,
    is_current,
    key_of,
    row_for,
    row_of,
)

#: Seconds between two checks of the runs.
LOOK_EVERY = 0.2
#: Number of log lines to show for an error.
ERROR_LINES = 12

#: Makes the command line of a phase of the cell in a folder.
Command = Callable[[str, Path], Sequence[str]]


def worker_command(phase: str, folder: Path) -> list[str]:
    """The command line that runs a phase."""
    return [
        sys.executable,
        '-m',
        'era_mm.engine.suite.worker',
        phase,
        str(folder),
    ]


class Watcher(Protocol):
    """Receives the progress of the matrix."""

    def expect(self, total: int) -> None:
        """The number of cells to run or to check again."""

    def started(self, cell: Cell, goes_on: bool) -> None:
        """A cell has started."""

    def at(self, cell: Cell, share: float, phase: str) -> None:
        """Progress of a running cell."""

    def ended(self, cell: Cell, row: Row, seconds: float) -> None:
        """A cell is finished, or failed with ``row['error']``."""

    def left(self, cell: Cell, reason: str) -> None:
        """A cell is not run."""


@dataclass
class _Run:
    """A running cell.

    Args:
        cell: The cell.
        teacher: Checksum of its teacher's weights.
        slot: Its index among the concurrent runs.
        began: Start time of its first phase.
        process: Process of the current phase.
        phase: Name of the current phase.
    """

    cell: Cell
    teacher: str | None
    slot: int
    began: float
    process: subprocess.Popen
    phase: str


class Matrix:
    """Runs the unfinished cells, and keeps the rows.

    Each phase is a process of its own, with one thread. If a process fails,
    its row has the error, and the others continue. An interruption ends the
    processes; the next call resumes from their checkpoints.

    Args:
        cells: In the order in which they should run.
        rows: Rows of earlier calls.
        jobs: Number of concurrent runs.
        watcher: Receives the progress.
        save: Called with all rows whenever one is new.
        commit: Returns the commit of the code.
        command: See :data:`Command`.
        gpus: Number of GPUs to share among the runs; 0: do not assign any.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        rows: Sequence[Row],
        *,
        jobs: int,
        watcher: Watcher,
        save: Callable[[Sequence[Row]], None],
        commit: Callable[[], str],
        command: Command = worker_command,
        gpus: int = 0,
    ) -> None:
        self.cells = list(cells)
        self.rows: dict[Key, Row] = {key_of(row): row for row in rows}
        self.jobs = jobs
        self.watcher = watcher
        self.save = save
        self.commit = commit
        self.command = command
        self.gpus = gpus
        self._runs: list[_Run] = []

    # -- what is to be done ------------------------------------------------

    def current(self, cell: Cell, teacher: str | None = None) -> bool:
        """Whether a cell's row exists and is up to date."""
        return is_current(self.row(cell), cell, teacher)

    def row(self, cell: Cell) -> Row | None:
        """The newest row of a cell."""
        return row_for(self.rows.values(), cell)

    def to_run(self) -> list[Cell]:
        """The cells that are not finished, as far as known now.

        They include a teacher with a row but without weights, if a student
        needs it.
        """
        needed = [cell for cell in self.cells if not self.current(cell)]
        for cell in self.cells:
            if cell.method is not None or cell in needed:
                continue
            has_weights = cell.pair.checkpoint or cell.is_done('train')
            if not has_weights and any(
                other.teacher is cell and other.has_teacher for other in needed
            ):
                needed.append(cell)
        return [cell for cell in self.cells if cell in needed]

    def _checksum(self, cell: Cell) -> str | None:
        """Checksum of the weights of a cell's teacher."""
        if not cell.has_teacher:
            return None
        assert cell.teacher is not None
        return cell.teacher.checksum

    # -- running -----------------------------------------------------------

    def run(self) -> bool:
        """Run the matrix; returns whether all of it is finished."""
        waiting = self.to_run()
        # A teacher that is trained again may differ: its students' rows are
        # checked again afterwards.
        for cell in self.cells:
            if cell.has_teacher and cell.teacher in waiting:
                waiting.append(cell)
        waiting = [cell for cell in self.cells if cell in waiting]
        self.watcher.expect(len(waiting))
        failed: list[Cell] = []
        try:
            while waiting or self._runs:
                while len(self._runs) < self.jobs and self._next(
                    waiting, failed
                ):
                    pass
                time.sleep(LOOK_EVERY)
                for run in list(self._runs):
                    self._look_at(run, failed)
        finally:
            self._stop()
        return not failed

    def _next(self, waiting: list[Cell], failed: list[Cell]) -> bool:
        """Handle the first cell that is ready; False if there is none."""
        under_way = [run.cell for run in self._runs]
        for cell in list(waiting):
            if cell.has_teacher and cell.teacher in failed:
                waiting.remove(cell)
                failed.append(cell)
                self.watcher.left(cell, 'its teacher failed')
                return True
            if cell.has_teacher and cell.teacher in [*waiting, *under_way]:
                continue
            if cell.folder in [other.folder for other in under_way]:
                # The same teacher of another pair.
                continue
            waiting.remove(cell)
            teacher = self._checksum(cell)
            if cell.method is not None and self.current(cell, teacher):
                self.watcher.left(cell, 'finished before')
                return True
            self._start(cell, teacher)
            return True
        return False

    def _start(self, cell: Cell, teacher: str | None) -> None:
        job = dict(teacher=teacher)
        if cell.method is None:
            job['checkpoint'] = cell.pair.checkpoint
        cell.open(job)
        commits = read_json(cell.folder / 'attempts.json') or dict(commits=[])
        goes_on = bool(commits['commits'])
        commits['commits'].append(self.commit())
        write_json(cell.folder / 'attempts.json', commits)
        taken = {run.slot for run in self._runs}
        slot = next(n for n in range(self.jobs) if n not in taken)
        phase = next(
            (phase for phase in cell.phases if not cell.is_done(phase)),
            cell.phases[-1],
        )
        self.watcher.started(cell, goes_on)
        self._runs.append(
            _Run(
                cell,
                teacher,
                slot,
                time.monotonic(),
                self._program(cell, phase, slot),
                phase,
            )
        )

    def _program(self, cell: Cell, phase: str, slot: int) -> subprocess.Popen:
        env = dict(os.environ, PYTHONUNBUFFERED='1')
        for name in ('OMP', 'MKL', 'OPENBLAS'):
            env[f'{name}_NUM_THREADS'] = '1'
        if self.gpus > 1:
            visible = os.environ.get('CUDA_VISIBLE_DEVICES')
            devices = visible.split(',') if visible else range(self.gpus)
            env['CUDA_VISIBLE_DEVICES'] = str(list(devices)[slot % self.gpus])
        with cell.log.open('a') as log:
            return subprocess.Popen(
                self.command(phase, cell.folder),
                # The worker ends when this end is closed.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
            )

    def _look_at(self, run: _Run, failed: list[Cell]) -> None:
        cell = run.cell
        status = run.process.poll()
        if status is None:
            share = 1.0
            if run.phase == 'train':
                share = logs.share_done(cell.folder / 'train', *cell.length)
            self.watcher.at(cell, share, run.phase)
            return
        assert run.process.stdin is not None
        run.process.stdin.close()
        if status == 0 and run.phase != cell.phases[-1]:
            run.phase = cell.phases[cell.phases.index(run.phase) + 1]
            run.process = self._program(cell, run.phase, run.slot)
            return
        self._runs.remove(run)
        row = self._row(run, status)
        if 'error' in row:
            failed.append(cell)
        self.rows[key_of(row)] = row
        self.save(list(self.rows.values()))
        self.watcher.ended(cell, row, time.monotonic() - run.began)

    def _row(self, run: _Run, status: int) -> Row:
        cell = run.cell
        attempts = read_json(cell.folder / 'attempts.json')
        assert attempts is not None
        commits = attempts['commits']
        if status:
            lines = cell.log.read_text(errors='replace').splitlines()
            return failed_row(
                cell,
                teacher=run.teacher,
                commits=commits,
                error='\n'.join(
                    [
                        f'{run.phase} stopped with status {status}',
                        *lines[-ERROR_LINES:],
                    ]
                ),
            )
        teacher = cell.checksum if cell.method is None else run.teacher
        return row_of(cell, teacher=teacher, commits=commits, jobs=self.jobs)

    def _stop(self) -> None:
        """Stop the running processes."""
        for run in self._runs:
            run.process.terminate()
        for run in self._runs:
            run.process.wait()
        self._runs.clear()
