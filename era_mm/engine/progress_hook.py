"""A progress bar below the log, if a terminal is attached."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class _Bar(Hook):
    """Moves the bar."""

    priority = 'LOWEST'

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task('', total=None)

    def before_train(self, runner: Runner) -> None:
        self.progress.update(self.task, total=runner.max_iters)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        self.progress.update(
            self.task,
            completed=runner.iter + 1,
            description=f'epoch {runner.epoch + 1}/{runner.max_epochs}',
        )

    def before_val(self, runner: Runner) -> None:
        self.progress.update(self.task, description='validation')


@contextlib.contextmanager
def progress_of(
    runner: Runner, console: Console | None = None
) -> Iterator[None]:
    """Show a bar while a runner trains; the log scrolls above it.

    Nothing changes if the output is not a terminal, or on ranks other than
    the first. The terminal is restored, however the training ends.

    Args:
        runner: The runner that will train.
        console: Where to print; None: the standard output, if it is a
            terminal.
    """
    if console is None:
        if get_rank() != 0 or not sys.stdout.isatty():
            yield
            return
        console = Console()
    progress = Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
    )
    runner.register_hook(_Bar(progress))
    # File handlers are a kind of stream handler too.
    screens = [
        handler
        for handler in runner.logger.handlers
        if type(handler) is logging.StreamHandler
    ]
    with progress:
        # While the bar is up, the standard output prints above it.
        before = [handler.setStream(sys.stdout) for handler in screens]
        try:
            yield
        finally:
            for handler, stream in zip(screens, before, strict=True):
                if stream is not None:
                    handler.setStream(stream)
