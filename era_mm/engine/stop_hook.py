"""Ends a run that is asked to end, with a checkpoint to go on from."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import distributed

from era_mm.engine.whole_files import write_whole
from era_mm.registry import HOOKS

#: What batch systems send before they kill: SIGTERM, and Slurm's
#: ``--signal=USR1@120``.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ('SIGTERM', 'SIGUSR1')
    if hasattr(signal, name)
)
#: Steps between two looks at what the other ranks were sent.
AGREE_EVERY = 5


#: Whether children that are forked now are to outlast the signals.
_shield = {'is_up': False}


def _take_cover() -> None:
    if _shield['is_up']:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_obey_the_parent, daemon=True).start()


def _obey_the_parent() -> None:
    # `terminate` of multiprocessing is a SIGTERM of the parent's.
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


if hasattr(signal, 'sigwaitinfo'):
    os.register_at_fork(after_in_child=_take_cover)


@contextlib.contextmanager
def shielded_workers() -> Iterator[None]:
    """Let the data workers that start meanwhile outlast the signals.

    Batch systems and ``timeout`` signal a whole process group. A worker that
    dies of it raises in the middle of the run's step. To the run itself they
    listen: it ends them when it ends.
    """
    _shield['is_up'] = True
    try:
        yield
    finally:
        _shield['is_up'] = False


class Stopped(BaseException):
    """A signal has ended the run; no error that anything should catch.

    Args:
        number: Of the signal.
        checkpoint: What the run goes on from.
    """

    def __init__(self, number: int, checkpoint: str) -> None:
        super().__init__(number, checkpoint)
        self.number = number
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return (
            f'stopped by {signal.Signals(self.number).name}; --resume goes on '
            f'from {self.checkpoint}'
        )


@HOOKS.register_module()
class StopHook(Hook):
    """Writes a checkpoint after a signal, and ends the run.

    On SIGTERM or SIGUSR1 the run ends after the step under way (on several
    ranks after at most five more, in which they agree), with
    ``iter_<iteration>.pth`` in the work dir. A second signal ends it at once.
    A signal during validation waits for the next step. ``train`` adds the
    hook to every run.

    Source: ours.

    Raises:
        Stopped: After the checkpoint is written.
    """

    # After all that belongs to the step.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._number = 0
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def before_train(self, runner: Runner) -> None:
        """Listen from now on."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        if get_world_size() > 1 and distributed.get_backend() != 'gloo':
            # Agreeing through NCCL would make the host wait for the GPU.
            self._group = distributed.new_group(backend='gloo')

    def after_train(self, runner: Runner) -> None:
        """Listen no more."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        # The next one is not held up.
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """End the run if any rank was told to."""
        number = self._agreed(runner)
        if not number:
            return
        wrapper = runner.optim_wrapper
        if hasattr(wrapper, 'should_update') and not wrapper.should_update():
            # Gradients that are being gathered are in no file.
            return
        self._restore()
        raise Stopped(number, self._save(runner))

    def _agreed(self, runner: Runner) -> int:
        if get_world_size() == 1:
            return self._number
        if (runner.iter + 1) % AGREE_EVERY:
            return 0
        number = torch.tensor(self._number)
        distributed.all_reduce(
            number, distributed.ReduceOp.MAX, group=self._group
        )
        self._number = int(number)
        return self._number

    def _save(self, runner: Runner) -> str:
        step = runner.iter + 1
        name = f'iter_{step}.pth'
        runner.save_checkpoint(
            runner.work_dir,
            name,
            meta=dict(epoch=runner.epoch, iter=step),
            by_epoch=False,
        )
        path = str(Path(runner.work_dir, name))
        if is_main_process():
            pointer = Path(runner.work_dir, 'last_checkpoint')
            write_whole(pointer, path.encode())
        return path


def end_with_parent() -> None:
    """Let this process be killed when the launcher that began it is gone.

    Ranks of a launcher that was killed would wait for each other for ever.
    On Linux only; elsewhere they end with torch's time-out.
    """
    if sys.platform == 'linux':
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
