"""Ends a run after a signal, with a checkpoint to resume from."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import distributed

from era_mm.engine.whole_files import write_or_tell
from era_mm.registry import HOOKS

#: Signals that batch systems send before they kill: SIGTERM, and Slurm's
#: ``--signal=USR1@120``.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ('SIGTERM', 'SIGUSR1')
    if hasattr(signal, name)
)
#: Ranks ask each other for signals after so many steps, or about so many
#: seconds if that is earlier. A launcher kills ranks 30 s after its signal.
AGREE_STEPS = 5
AGREE_SECONDS = 1.0
#: Time to stop for ranks whose mim is gone, which is checked every second;
#: so they end within 10 s.
SECONDS_TO_STOP = 6

#: Whether children that are forked now survive the signals.
_shield = {'is_up': False}


def _take_cover() -> None:
    if _shield['is_up']:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_obey_the_parent, daemon=True).start()


def _obey_the_parent() -> None:
    # `terminate` of multiprocessing is a SIGTERM from the parent.
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


if hasattr(signal, 'sigwaitinfo'):
    os.register_at_fork(after_in_child=_take_cover)


@contextlib.contextmanager
def shielded_workers() -> Iterator[None]:
    """Data workers that are started in this context survive the signals.

    Batch systems and ``timeout`` signal a whole process group. If a worker
    died, the run would raise an error in the middle of a step. A signal from
    the run itself still ends them.
    """
    _shield['is_up'] = True
    try:
        yield
    finally:
        _shield['is_up'] = False


class Stopped(BaseException):
    """A signal has ended the run; not an error to be caught.

    Args:
        number: The signal's number.
        checkpoint: The file to resume from.
    """

    def __init__(self, number: int, checkpoint: str) -> None:
        super().__init__(number, checkpoint)
        self.number = number
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return (
            f'stopped by {signal.Signals(self.number).name}; --resume '
            f'continues from {self.checkpoint}'
        )


@HOOKS.register_module()
class StopHook(Hook):
    """Writes a checkpoint after a signal, and ends the run.

    On SIGTERM or SIGUSR1 the run completes its step, writes
    ``iter_<iteration>.pth`` to the work dir and ends. Several ranks agree
    first, which takes at most five more steps; it does not matter whether one
    or all of them got the signal. No rank ends before the file is complete,
    because a launcher would then kill the others. A second signal ends the
    run at once. A signal during validation waits for the next step. ``train``
    adds the hook to every run.

    Source: ours.

    Raises:
        Stopped: After the checkpoint is written.
    """

    # After everything else in a step.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._number = 0
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._agreed = 0
        self._next_look = 0
        self._last_look = (0, 0.0)

    def before_train(self, runner: Runner) -> None:
        """Install the signal handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        if get_world_size() > 1 and distributed.get_backend() != 'gloo':
            # Agreeing through NCCL would make the host wait for the GPU.
            self._group = distributed.new_group(backend='gloo')
        self._last_look = (runner.iter, time.monotonic())

    def after_train(self, runner: Runner) -> None:
        """Restore the former signal handlers."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        # A second one ends the run at once.
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
        """End the run if any rank got a signal."""
        self._agreed = self._agreed or self._agree(runner)
        if not self._agreed:
            return
        wrapper = runner.optim_wrapper
        if hasattr(wrapper, 'should_update') and not wrapper.should_update():
            # No file has accumulated gradients, so wait for the update.
            return
        self._restore()
        raise Stopped(self._agreed, self._save(runner))

    def _agree(self, runner: Runner) -> int:
        """The signal that any rank got; 0 if none, or in steps between."""
        if get_world_size() == 1:
            return self._number
        step = runner.iter + 1
        if step < self._next_look:
            return 0
        began, when = self._last_look
        told = torch.tensor([float(self._number), time.monotonic() - when])
        distributed.all_reduce(
            told, distributed.ReduceOp.MAX, group=self._group
        )
        # The slowest rank's time, so that all ask at the same steps.
        number, seconds = told.tolist()
        steps = AGREE_SECONDS * max(step - began, 1) / max(seconds, 1e-6)
        self._next_look = step + int(min(max(steps, 1), AGREE_STEPS))
        self._last_look = (step, time.monotonic())
        return int(number)

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
            write_or_tell(pointer, path.encode())
        if get_world_size() > 1:
            distributed.barrier(group=self._group)
        return path


def end_with_parent() -> None:
    """Let this process end when its launcher is gone.

    Ranks of a launcher that was killed would wait for each other forever, or
    keep running unnoticed. If the launcher ends, they are killed. If mim ends,
    which starts the launcher and does not forward signals, they get a SIGTERM,
    and are killed if they have not ended after 6 s. On Linux only; elsewhere
    they end with torch's time-out.
    """
    if sys.platform != 'linux':
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    launcher = os.getppid()
    above = _parent_of(launcher)
    if _is_mim(above):
        threading.Thread(
            target=_end_without, args=(launcher, above), daemon=True
        ).start()


def _parent_of(number: int) -> int:
    try:
        status = Path(f'/proc/{number}/stat').read_text()
    except OSError:
        return 0
    # The process name before it may contain spaces and brackets.
    return int(status.rpartition(')')[2].split()[1])


def _is_mim(number: int) -> bool:
    try:
        words = Path(f'/proc/{number}/cmdline').read_bytes().split(b'\0')
    except OSError:
        return False
    return any(Path(os.fsdecode(word)).name == 'mim' for word in words[:2])


def _end_without(launcher: int, mim: int) -> None:
    while _parent_of(launcher) == mim:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_STOP)
    os.kill(os.getpid(), signal.SIGKILL)
