"""Shows the progress of a matrix: bars on a terminal, else lines."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from .cells import Cell
from .rows import Row


class Screen:
    """Live bars of all runs and of the whole, and a line for each event.

    Args:
        progress: The bars.
        jobs: Number of concurrent runs.
    """

    def __init__(self, progress: Progress, jobs: int) -> None:
        self._progress = progress
        self._total, self._jobs = 0, jobs
        self._done = 0
        self._seconds: list[float] = []
        self._bars: dict[str, TaskID] = {}
        self._all = progress.add_task('all', total=None, text='')

    def expect(self, total: int) -> None:
        """The number of cells to run or to check again."""
        self._total = total
        self._progress.update(self._all, total=total)

    def started(self, cell: Cell, goes_on: bool) -> None:
        """A cell has started."""
        self._bars[cell.name] = self._progress.add_task(
            cell.name, total=1.0, text='starting'
        )
        self._say(f'{cell.name}: {"goes on" if goes_on else "started"}')

    def at(self, cell: Cell, share: float, phase: str) -> None:
        """Progress of a running cell."""
        self._progress.update(
            self._bars[cell.name], completed=share, text=phase
        )

    def ended(self, cell: Cell, row: Row, seconds: float) -> None:
        """A cell is finished, or failed."""
        self._progress.remove_task(self._bars.pop(cell.name))
        if 'error' in row:
            first, _, rest = row['error'].partition('\n')
            lines = [line for line in rest.splitlines() if line.strip()]
            result = f'failed: {first}; {" ".join(lines[-1:])} ({cell.log})'
        else:
            metric = cell.suite.metric
            value = metric.values_of(row).get(metric.key)
            result = 'tested'
            if value is not None:
                value *= metric.scale
                result = f'{metric.name} {value:.{metric.digits}f}'
            self._seconds.append(seconds)
        self._count()
        self._say(f'{cell.name}: {result}, {clock(seconds)}{self._so_far()}')

    def left(self, cell: Cell, reason: str) -> None:
        """A cell is not run."""
        self._count()
        self._say(f'{cell.name}: not run, {reason}')

    def _count(self) -> None:
        self._done += 1
        self._progress.update(
            self._all,
            completed=self._done,
            text=self._so_far().strip(' []'),
        )

    def _so_far(self) -> str:
        text = f'{self._done}/{self._total}'
        if self._seconds:
            mean = sum(self._seconds) / len(self._seconds)
            left = max(self._total - self._done, 0) * mean / self._jobs
            text += f', about {clock(left)} left'
        return f' [{text}]'

    def _say(self, text: str) -> None:
        self._progress.console.print(
            text, markup=False, highlight=False, soft_wrap=True
        )


@contextlib.contextmanager
def open_screen(jobs: int, console: Console) -> Iterator[Screen]:
    """Show progress while the block runs."""
    with Progress(
        TextColumn('{task.description}', markup=False),
        BarColumn(),
        TextColumn('{task.fields[text]}', markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        yield Screen(progress, jobs)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
