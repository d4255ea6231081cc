"""The runs that soak.py tries to break: a toy pair for every method."""

import contextlib
import copy
import importlib
import io
import os
import pkgutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope

import era_mm.methods
from era_mm import cli
from era_mm.core import BaseDistiller
from era_mm.core.safe_files import load_file
from era_mm.engine import whole_files
from era_mm.engine.measure import Member
from era_mm.engine.pairing import Pair
from era_mm.testing import (
    classifier_config,
    classifier_loader,
    detector_config,
    run_config,
    save_teacher,
    write_class_folders,
    write_coco,
)

DISTILLER = dict(
    type='era_mm.ERADistiller',
    loss=dict(align_weight=1.0, residual_weight=1.0, twi_weight=1.0),
    mbrnet=dict(num_branches=2),
    schedules={'loss_era_*': dict(start=0, ramp=2, scale=1.0)},
)
#: Longer than any attempt takes.
LIMIT = 300
EMA = [dict(type='era_mm.EMAHook', momentum=0.1)]


def methods() -> dict[str, type[BaseDistiller]]:
    """Every method, by the name of its class."""
    found = {}
    for module in pkgutil.iter_modules(era_mm.methods.__path__):
        module = importlib.import_module(f'era_mm.methods.{module.name}')
        for name, cls in vars(module).items():
            if (
                isinstance(cls, type)
                and issubclass(cls, BaseDistiller)
                and cls is not BaseDistiller
            ):
                found[name] = cls
    return found


class Killed(BaseException):
    """What no `except Exception` catches, as a kill."""


class Hung(BaseException):
    """An attempt that takes longer than any may."""


class FailedError(Exception):
    """A run that nothing disturbed, and that failed all the same."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """End what hangs."""

    def stop(number: int, frame: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Toy:
    """Distillations of two epochs of three or four steps.

    Args:
        folder: Where everything is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        self._bases: dict[str, dict] = {}
        self._wholes: dict[tuple[str, int], tuple[Path, float]] = {}
        classes = write_class_folders(folder / 'classes')
        coco = write_coco(folder / 'coco')
        loader = classifier_loader(classes)
        teacher = classifier_config(width=16)
        detector = detector_config(width=16, channels=24)
        self._data = {
            'classifier': dict(
                default_scope='mmpretrain',
                train_dataloader=loader,
                val_dataloader=loader,
                val_evaluator=dict(type='Accuracy', topk=(1,)),
            ),
            'detector': dict(
                val_dataloader=None, val_evaluator=None, val_cfg=None
            ),
        }
        self._root = {'classifier': '', 'detector': coco}
        self.pairs = {
            'classifier': (
                classifier_config(),
                teacher,
                save_teacher(teacher, folder / 't.pth', 'mmpretrain'),
            ),
            'detector': (
                detector_config(),
                detector,
                save_teacher(detector, folder / 'd.pth', 'mmdet'),
            ),
        }
        student, teacher, file = self.pairs['classifier']
        self.config = self.run_of(
            dict(
                student=student,
                teacher=dict(config=teacher, checkpoint=file),
                distiller=copy.deepcopy(DISTILLER),
            ),
            'classifier',
        )

    def run_of(self, model: Mapping, host: str) -> dict:
        """A whole config."""
        best = {'save_best': 'accuracy/top1'} if host == 'classifier' else {}
        config = run_config(
            dict(type='era_mm.Distillation') | dict(model),
            self._root[host],
            'unset',
            **dict(
                test_cfg=None,
                test_dataloader=None,
                test_evaluator=None,
                train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
                default_hooks=dict(
                    checkpoint=dict(
                        type='CheckpointHook',
                        interval=1,
                        max_keep_ckpts=1,
                        **best,
                    )
                ),
                preflight=False,
                log_level='ERROR',
            )
            | self._data[host],
        ).to_dict()
        # Resuming restores the order of the data, not what draws of an
        # image's augmentation began with.
        pipeline = config['train_dataloader']['dataset']['pipeline']
        pipeline[:] = [t for t in pipeline if t['type'] != 'RandomFlip']
        return config

    def base_of(self, name: str) -> dict:
        """The run of a method, as make_config would set it up."""
        if name not in self._bases:
            self._bases[name] = self._make_base(methods()[name])
        return copy.deepcopy(self._bases[name])

    def _make_base(self, cls: type[BaseDistiller]) -> dict:
        for host, scope in (
            ('classifier', 'mmpretrain'),
            ('detector', 'mmdet'),
        ):
            init_default_scope(scope)
            student, teacher, file = self.pairs[host]
            model: dict = dict(student=student)
            if not cls.needs_teacher:
                model['distiller'] = dict(type=f'era_mm.{cls.__name__}')
                return self.run_of(model, host)
            pair = Pair(
                *(
                    Member(role, role, ConfigDict(config))
                    for role, config in (
                        ('student', student),
                        ('teacher', teacher),
                    )
                ),
                input_sizes=[64],
            )
            try:
                plan = cls.plan_for(pair)
            except ValueError:
                continue
            model['teacher'] = dict(config=teacher, checkpoint=file)
            model['distiller'] = plan.distiller
            if plan.inherit:
                model['inherit'] = list(plan.inherit)
            return self.run_of(model, host)
        raise AssertionError(f'no toy pair for {cls.__name__}')

    def train(
        self, work_dir: Path, *flags: str, config: dict | None = None
    ) -> tuple[int | str, str]:
        """The status of ``train``, or what it raised; and its last words."""
        self._number += 1
        whole = copy.deepcopy(self.config if config is None else config)
        # Runs of one second must not share their log.
        whole['experiment_name'] = f'soak{self._number}-{os.getpid()}'
        file = self.folder / f'toy{os.getpid()}.py'
        # Not by Config's own, which takes longer than the run.
        file.write_text(
            '\n'.join(f'{key} = {_code(whole[key])}' for key in whole)
        )
        said = io.StringIO()
        status: int | str
        with contextlib.redirect_stderr(said), _plain_configs():
            with contextlib.redirect_stdout(io.StringIO()), limited():
                try:
                    status = cli.run_train(
                        [str(file), '--work-dir', str(work_dir), *flags]
                    )
                except (Killed, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    status = f'{type(error).__name__}: {error}'
        return status, said.getvalue().rpartition('\nerror: ')[2]

    def start(
        self, work_dir: Path, *flags: str, config: dict, ranks: int = 1
    ) -> list[int]:
        """Train in processes of its own; their ids."""
        with socket.socket() as one:
            one.bind(('localhost', 0))
            port = one.getsockname()[1]
        if ranks > 1:
            flags = (*flags, '--launcher', 'pytorch')
        return [
            _fork(
                lambda: self.train(work_dir, *flags, config=config),
                work_dir.parent / f'{work_dir.name}.said{rank}',
                dict(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(ranks),
                    MASTER_ADDR='localhost',
                    MASTER_PORT=str(port),
                )
                if ranks > 1
                else {},
            )
            for rank in range(ranks)
        ]

    def whole(
        self, name: str, config: dict, ranks: int, *flags: str
    ) -> tuple[Path, float]:
        """The work dir of a run that nothing disturbed, and its seconds."""
        if (name, ranks) not in self._wholes:
            began = time.monotonic()
            folder = self.folder / f'whole-{name}-{ranks}'
            status = ended(
                self.start(folder, *flags, config=config, ranks=ranks)
            )
            said = Path(f'{folder}.said0')
            if any(status):
                raise FailedError(f'{name}: {status} {said.read_text()[:300]}')
            self._wholes[name, ranks] = folder, time.monotonic() - began
        return self._wholes[name, ranks]


def _code(value: Any) -> str:
    if isinstance(value, dict):
        inside = (f'{key!r}: {_code(part)}' for key, part in value.items())
        return f'{{{", ".join(inside)}}}'
    if isinstance(value, list):
        return f'[{", ".join(map(_code, value))}]'
    if isinstance(value, float):
        return f'float({str(value)!r})'
    return repr(value)


@contextlib.contextmanager
def _plain_configs() -> Iterator[None]:
    """Configs are written without being made pretty, which takes seconds."""
    make = Config.__init__

    def init(self: Config, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs | dict(format_python_code=False))

    Config.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        Config.__init__ = make  # type: ignore[method-assign]


def _fork(
    work: Callable[[], tuple[int | str, str]], said: Path, variables: dict
) -> int:
    number = os.fork()
    if number:
        return number
    status: int | str = 1
    try:
        os.environ.update(variables)
        status, words = work()
        said.write_text(f'{status}\n{words}')
    finally:
        os._exit(status if isinstance(status, int) else 99)


def ended(numbers: list[int], kill_after: float | None = None) -> list[int]:
    """Wait for processes; what they ended with, -9 if killed.

    Args:
        numbers: Their ids.
        kill_after: Seconds after which they are killed; None: what hangs is,
            and raises.
    """
    began = time.monotonic()
    left, statuses = set(numbers), {}
    while left:
        for number in list(left):
            gone, status = os.waitpid(number, os.WNOHANG)
            if gone:
                left.discard(number)
                statuses[number] = os.waitstatus_to_exitcode(status)
        spent = time.monotonic() - began
        if left and spent > (LIMIT if kill_after is None else kill_after):
            for number in left:
                os.kill(number, signal.SIGKILL)
            if kill_after is None:
                raise Hung
        time.sleep(0.02)
    return [statuses[number] for number in numbers]


def same_state(own: Path, other: Path) -> bool:
    """Whether two files hold the same weights and optimiser state."""

    def tensors(node: Any, path: str = '') -> Iterator[tuple[str, Any]]:
        if isinstance(node, torch.Tensor):
            yield path, node
        elif isinstance(node, Mapping):
            for key, value in node.items():
                yield from tensors(value, f'{path}.{key}')
            extras = getattr(node, '_metadata', {}).get('', {}).get('era_mm')
            if extras is not None:
                yield from tensors(extras, f'{path}.extras')

    parts = ('state_dict', 'optimizer', 'ema_state_dict')
    found, expected = (
        {
            key: value
            for part in parts
            for key, value in tensors(content.get(part, {}), part)
        }
        for content in (load_file(own), load_file(other))
    )
    return found.keys() == expected.keys() and all(
        torch.equal(value, expected[key]) for key, value in found.items()
    )


class KillAt:
    """Stands in for ``os`` where files are written; kills at a moment."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _pass(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise Killed

    def open(self, path: Path, mode: str) -> Any:
        """Half of the content first."""
        killer, file = self, open(path, mode)

        class Halves:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, content: bytes) -> None:
                middle = len(content) // 2
                file.write(content[:middle])
                file.flush()
                killer._pass()
                file.write(content[middle:])

        return Halves()

    def replace(self, part: Path, path: Path) -> None:
        """Before and after a file gets its name."""
        self._pass()
        os.replace(part, path)
        self._pass()


@contextlib.contextmanager
def killing(moment: int) -> Iterator[KillAt]:
    """Kill the run inside at a moment around a write."""
    killer = KillAt(moment)
    whole_files.os, whole_files.open = killer, killer.open  # type: ignore
    try:
        yield killer
    finally:
        whole_files.os = os
        del whole_files.open  # type: ignore[attr-defined]
