"""Stages of the demo: what is repeated, what the screen shows.

Read in this order: `Stage`, `Screen`, `run_stage`, `run_logged`, `alone`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

console = Console()


class StageError(RuntimeError):
    """A stage failed; the message says what to do."""


@dataclass(frozen=True)
class Stage:
    """One step of the demo.

    Args:
        name: Folder and log of the stage.
        title: What the screen shows.
        expected: Seconds it took on the reference machine. They give the
            first guess of the time left, corrected as the demo goes on.
        inputs: Everything its result depends on, as JSON.
        run: Does the work; told the folder, whether to go on where an
            earlier run of the same inputs was stopped, and whom to report
            progress to. Returns what later stages need, as JSON.
        is_there: Whether what an earlier result speaks of still exists.
        keeps: Whether the folder is worth keeping after an interruption.
    """

    name: str
    title: str
    expected: float
    inputs: Callable[[], dict]
    run: Callable[[Path, bool, Screen], dict]
    is_there: Callable[[dict], bool] = lambda result: True
    keeps: bool = False


class Screen:
    """Progress of the stage and of the demo.

    On a terminal two bars that stay in place, elsewhere a line every twenty
    seconds.

    Args:
        stages: All stages in order.
        progress: The bars.
    """

    def __init__(self, stages: Sequence[Stage], progress: Progress) -> None:
        self._stages = list(stages)
        self._progress = progress
        self._stage_bar = progress.add_task('', total=1.0, text='')
        self._demo_bar = progress.add_task('demo', total=1.0, text='')
        self._demo_start = time.monotonic()
        # Seconds here, and on the reference machine for the same work.
        self._spent = 0.0
        self._spent_there = 0.0
        self._last_line = 0.0

    def begin(self, stage: Stage) -> None:
        """A stage starts."""
        self._stage = stage
        self._start = time.monotonic()
        # Where and when this run of the stage was first heard of: one that
        # goes on did not do the beginning now.
        self._first: tuple[float, float] | None = None
        self._last = (0.0, self._start)
        number = self._stages.index(stage)
        self._later = sum(s.expected for s in self._stages[number + 1 :])
        self._title = f'[{number + 1}/{len(self._stages)}] {stage.title}'
        self.update(None, '')

    def finish(self, seconds: float | None) -> None:
        """The stage is done; None if there was nothing to do."""
        # A stage that finds its work done says nothing of the pace.
        if seconds is not None and seconds >= 1:
            if self._first is None:
                self._spent += seconds
                self._spent_there += self._stage.expected
            else:
                self._spent, self._spent_there = self._totals()
        took = 'unchanged' if seconds is None else f'{seconds:.0f} s'
        self._progress.console.print(
            f'{self._title}: done, {took}',
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def update(self, share: float | None, text: str) -> None:
        """Show how far the stage is.

        Args:
            share: Finished share of the stage, None if unknown.
            text: What it does now.
        """
        now = time.monotonic()
        if share is not None:
            self._first = self._first or (share, now)
            self._last = (share, now)
        spent, spent_there = self._totals()
        pace = spent / spent_there if spent_there else 1.0
        if self._first is not None and self._last[0] > self._first[0] + 0.02:
            share = self._last[0]
            rate = (share - self._first[0]) / (now - self._first[1])
            left = (1 - share) / rate
        else:
            left = max(self._stage.expected * pace - (now - self._start), 0)
            share = 1 - left / max(self._stage.expected * pace, left, 1e-9)
        self._show(share, left, left + pace * self._later, text)

    def _totals(self) -> tuple[float, float]:
        """Seconds spent here and there, this stage's part included."""
        if self._first is None:
            return self._spent, self._spent_there
        share = self._last[0] - self._first[0]
        return (
            self._spent + self._last[1] - self._first[1],
            self._spent_there + self._stage.expected * share,
        )

    def _show(
        self, share: float, left: float, left_all: float, text: str
    ) -> None:
        done = time.monotonic() - self._demo_start
        if self._progress.console.is_terminal:
            self._progress.update(
                self._stage_bar,
                completed=share,
                description=self._title,
                text=f'{clock(left)} left  {text}',
            )
            self._progress.update(
                self._demo_bar,
                completed=done / max(done + left_all, 1e-9),
                text=f'{clock(left_all)} left',
            )
        elif time.monotonic() - self._last_line > 20:
            self._last_line = time.monotonic()
            self._progress.console.print(
                f'{self._title}: {share:.0%}, {clock(left)} left  {text}  '
                f'(demo: {clock(left_all)} left)',
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


@contextlib.contextmanager
def open_screen(stages: Sequence[Stage]) -> Iterator[Screen]:
    """Show progress while the block runs."""
    with Progress(
        TextColumn('{task.description}', markup=False),
        BarColumn(),
        TextColumn('{task.fields[text]}', markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        yield Screen(stages, progress)


def run_stage(stage: Stage, work: Path, screen: Screen) -> dict:
    """Run a stage, go on with it, or take its earlier result."""
    screen.begin(stage)
    folder = work / stage.name
    record_file = folder / 'stage.json'
    inputs = json.loads(json.dumps(stage.inputs()))
    record = read_json(record_file) or {}
    if record.get('inputs') != inputs:
        shutil.rmtree(folder, ignore_errors=True)
        record = {'inputs': inputs, 'seconds': 0.0}
    if 'result' in record and stage.is_there(record['result']):
        screen.finish(None)
        return record
    goes_on = folder.exists() and stage.keeps and 'result' not in record
    if not goes_on:
        shutil.rmtree(folder, ignore_errors=True)
        record = {'inputs': inputs, 'seconds': 0.0}
    folder.mkdir(parents=True, exist_ok=True)
    record['resumed'] = goes_on
    write_json(record_file, record)
    before, start = record['seconds'], time.monotonic()
    try:
        result = stage.run(folder, goes_on, screen)
    finally:
        record['seconds'] = before + time.monotonic() - start
        write_json(record_file, record)
    record['result'] = result
    write_json(record_file, record)
    screen.finish(time.monotonic() - start)
    return record


def run_logged(
    command: Sequence[str],
    log: Path,
    watch: Callable[[], None],
    threads: int,
) -> None:
    """Run a program; its output goes to `log`.

    Raises:
        StageError: If it fails, with the end of the log.
    """
    env = dict(os.environ)
    for name in ('OMP', 'MKL', 'OPENBLAS'):
        env[f'{name}_NUM_THREADS'] = str(threads)
    with log.open('a') as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            close_fds=False,
        )
        try:
            while process.poll() is None:
                watch()
                time.sleep(0.3)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        lines = log.read_text(errors='replace').splitlines()[-15:]
        raise StageError(
            '\n'.join(lines)
            + f'\n\nThe stage stopped with status {process.returncode}; its '
            f'whole log is {log}. Mend what it names and run the demo again: '
            'finished stages are not repeated.'
        )


@contextlib.contextmanager
def alone(work: Path) -> Iterator[None]:
    """Refuse a second demo in the same folder."""
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    # A program that outlives a killed demo keeps the folder locked.
    os.set_inheritable(lock, True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StageError(
            f'Another demo, or a training run that a killed one left, works '
            f'in {work}. Wait for it, end it, or choose another folder with '
            '--work-dir.'
        ) from None
    try:
        yield
    finally:
        os.close(lock)


def read_json(path: Path) -> dict | None:
    """Read a file; None if it is missing or cut off."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: Path, value: Mapping) -> None:
    """Write a file as a whole: a killed demo must be able to read it."""
    part = path.with_suffix('.part')
    part.write_text(json.dumps(value, indent=2) + '\n')
    part.replace(path)


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'
