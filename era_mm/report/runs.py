"""Reads work dirs: scalars, configs, logs, checkpoints. Writes nothing.

Read in this order: `Run`, `read_run`.
What is missing is skipped, and a remark says what and why.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from mmengine.config import Config

from era_mm.errors import UserError, first_line

#: Values over time: steps (iterations or epochs) and what was logged there.
Series = list[tuple[float, float]]

#: What one looks at first, by host: its name and what makes it percent.
METRICS = {
    'coco/bbox_mAP': ('AP', 100.0),
    'coco/segm_mAP': ('mask AP', 100.0),
    'pascal_voc/mAP': ('mAP', 100.0),
    'accuracy/top1': ('top-1', 1.0),
    'single-label/f1-score': ('F1', 1.0),
    'multi-label/mAP': ('mAP', 1.0),
}
#: Prefix of what `ResidualVisHook` logs, by estimate and level.
LEVEL_PREFIX = 'residuals/'
DISTILLATIONS = ('Distillation', 'MutualDistillation')
# Runs that differ in these alone are seeds of one recipe.
NOT_RECIPE = (
    'work_dir',
    'randomness',
    'seed',
    'resume',
    'load_from',
    'launcher',
    'log_level',
    'vis_backends',
    'visualizer',
    'default_hooks',
    'env_cfg',
    'preflight',
    'report',
)
TIMESTAMP = re.compile(r'^(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) ', re.MULTILINE)
FACT = re.compile(
    r'^    (Python|PyTorch|TorchVision|MMEngine|GPU [\d,]+|CUDA available|'
    r'GPU number): (.*)$',
    re.MULTILINE,
)
MADE_WITH = re.compile(r'- INFO - Made with: (.*)$', re.MULTILINE)
COST = re.compile(
    r'^a step costs about ([\d.]+ times the plain one \(.*\))$', re.MULTILINE
)
COMPLAINT = re.compile(r'- (?:WARNING|ERROR|CRITICAL) - (.*)$', re.MULTILINE)
# Enough for what a log says before the first step, and for its last lines.
HEAD_BYTES = 400_000
TAIL_BYTES = 60_000


@dataclass
class Run:
    """A training, as read from its work dir.

    Args:
        folder: The work dir.
        config: The dumped config; None if there is none.
        train: Losses and the like, by iteration.
        val: Metrics, by epoch, or by iteration in a run without epochs.
        levels: What `ResidualVisHook` logged, by iteration.
        test: Metrics of a test; of this folder or of one that tested a
            checkpoint of it.
        tested: The tested checkpoint, for a folder with only a test.
        seconds: Duration of the training, from its log.
        facts: Versions and machine, from the log.
        complaints: The first warnings and errors of the log.
        checkpoint: The best checkpoint if one was kept, else the last.
        remarks: What is missing, and why.
    """

    folder: Path
    config: Config | None = None
    train: dict[str, Series] = field(default_factory=dict)
    val: dict[str, Series] = field(default_factory=dict)
    levels: dict[str, Series] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    tested: str | None = None
    seconds: float | None = None
    facts: dict[str, str] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    checkpoint: Path | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.name

    @property
    def model(self) -> dict:
        """The config of its model; empty without a config."""
        return dict((self.config or {}).get('model') or {})

    @property
    def is_distillation(self) -> bool:
        """Whether two models took part."""
        return str(self.model.get('type', '')).split('.')[-1] in DISTILLATIONS

    @property
    def seed(self) -> int | None:
        """The seed of the config."""
        return ((self.config or {}).get('randomness') or {}).get('seed')

    @property
    def by_epoch(self) -> bool:
        """Whether metrics are counted in epochs."""
        loop = (self.config or {}).get('train_cfg') or {}
        if 'by_epoch' in loop:
            return bool(loop['by_epoch'])
        return 'max_iters' not in loop

    @property
    def length(self) -> int | None:
        """Number of epochs, or iterations, in the config."""
        loop = (self.config or {}).get('train_cfg') or {}
        return loop.get('max_epochs', loop.get('max_iters'))

    @property
    def seconds_per_iter(self) -> float | None:
        """Median of the logged times of an iteration."""
        times = [value for _, value in self.train.get('time', [])]
        return median(times) if times else None

    @property
    def methods(self) -> list[str]:
        """The distillers' short names."""
        if not self.is_distillation:
            return []
        kinds = [
            str(config.get('type', '')).split('.')[-1]
            for config in several(self.model.get('distiller'))
        ]
        return [kind.removesuffix('Distiller') for kind in kinds if kind]

    @property
    def student(self) -> dict:
        """The config of the model that is deployed."""
        model = self.model
        if not self.is_distillation:
            return model
        if 'student' in model:
            return dict(model['student'])
        students = model.get('students') or {}
        return dict(next(iter(students.values()), {}))

    @property
    def teacher_checkpoints(self) -> list[str]:
        """Files or URLs of its teachers' weights."""
        return [
            str(config['checkpoint'])
            for config in several(self.model.get('teacher'))
            if config.get('checkpoint')
        ]

    @property
    def modes(self) -> list[str]:
        """'' for the model's own predictions, and further evaluated modes."""
        found: dict[str, None] = {'': None}
        for key in (*self.val, *self.test):
            start, _, rest = key.partition('/')
            if '/' in rest:
                found[start] = None
        return sorted(found, key=mode_order)

    @property
    def command(self) -> str:
        """The command that repeats the run in another folder."""
        dumped = _newest_config(self.folder)
        if dumped is None:
            return ''
        words = ['mim', 'train', 'era_mm', str(dumped)]
        words += ['--work-dir', f'{self.folder}_again']
        launcher = (self.config or {}).get('launcher', 'none')
        if launcher != 'none':
            words += ['--launcher', launcher]
        return shlex.join(words)

    def last(self, key: str, mode: str = '') -> float | None:
        """The last value of a metric, None where there is none."""
        series = self.val.get(f'{mode}/{key}' if mode else key)
        return series[-1][1] if series else None

    def best(self, key: str, mode: str = '') -> tuple[float, float] | None:
        """Step and value of the highest value of a metric."""
        series = self.val.get(f'{mode}/{key}' if mode else key)
        return max(series, key=lambda point: point[1]) if series else None


def several(node: Any) -> list[Mapping]:
    """One config, or several by name, as a list."""
    if not isinstance(node, Mapping):
        return []
    if 'type' in node or 'config' in node:
        return [node]
    return [item for item in node.values() if isinstance(item, Mapping)]


def mode_order(mode: str) -> tuple:
    """Sort key: the student, then the estimates, then T and ST."""
    estimate = re.fullmatch(r'E(\d+)', mode)
    rank = {'': 0, 'T': 2, 'ST': 3}.get(mode, 4)
    return (1, int(estimate[1])) if estimate else (rank, mode)


def _newest_config(folder: Path) -> Path | None:
    """The config of the newest training in a folder."""
    found = sorted(folder.glob('*.py'), key=lambda p: p.stat().st_mtime)
    return found[-1] if found else None


def read_run(folder: str | Path) -> Run:
    """Read a work dir; nothing in it is changed.

    Args:
        folder: Work dir of a training or a test.

    Raises:
        UserError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f'expected the work dir of a run, but {str(folder)!r} is '
            + ('a file' if folder.is_file() else 'not there')
            + '. Give the folder that holds the checkpoints.'
        )
    run = Run(folder)
    run.config = _read_config(run)
    _read_scalars(run)
    _read_logs(run)
    _read_tests(run)
    run.checkpoint = _find_checkpoint(run)
    if run.train or not run.test:
        _judge_length(run)
    return run


def _read_config(run: Run) -> Config | None:
    candidates = sorted(run.folder.glob('*/vis_data/config.py'))[::-1]
    newest = _newest_config(run.folder)
    if newest is not None:
        candidates.append(newest)
    for path in candidates:
        try:
            # Custom imports are only needed to build models, not for figures.
            return Config.fromfile(path, import_custom_modules=False)
        except Exception as error:
            run.remarks.append(f'{path} could not be read ({said_by(error)})')
    run.remarks.append(
        'no config: neither *.py nor */vis_data/config.py is there, so '
        'method, schedule and seed are unknown and no images can be shown'
    )
    return None


def _read_scalars(run: Run) -> None:
    files = sorted(run.folder.glob('*/vis_data/scalars.json'))
    broken = 0
    for file in files:
        lines = []
        for line in file.read_text(errors='replace').splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                broken += 1
        _forget_repeated(run, lines)
        for line in lines:
            if isinstance(line, dict) and 'step' in line:
                _take_line(run, line)
    if broken:
        run.remarks.append(
            f'{broken} line(s) of scalars.json are incomplete and ignored'
        )
    if not files:
        backends = (run.config or {}).get('vis_backends') or []
        kinds = ', '.join(str(b.get('type')) for b in backends)
        run.remarks.append(
            'no log of numbers: */vis_data/scalars.json is not there'
            + (f' (the run logs to {kinds})' if kinds else '')
            + '; LocalVisBackend in `vis_backends` writes it'
        )
    elif not run.val:
        run.remarks.append(
            'no metrics of validation in the log: the run had none, or '
            'stopped before'
        )


def _is_train(line: Mapping) -> bool:
    return 'loss' in line or 'lr' in line or 'base_lr' in line


def _forget_repeated(run: Run, lines: Sequence[Any]) -> None:
    """Drop values that a resumed or repeated training has logged again."""
    first = next(
        (x for x in lines if isinstance(x, dict) and _is_train(x)), None
    )
    if first is None:
        return
    step = float(first['step'])
    first_val = float(first.get('epoch', step)) if run.by_epoch else step
    for table, least in (
        (run.train, step),
        (run.levels, step),
        (run.val, first_val),
    ):
        for key, series in table.items():
            table[key] = [point for point in series if point[0] < least]


def _take_line(run: Run, line: Mapping) -> None:
    if _is_train(line):
        table = run.train
    elif any(key.startswith(LEVEL_PREFIX) for key in line):
        table = run.levels
    else:
        table = run.val
    for key, value in line.items():
        if key == 'step' or not isinstance(value, (int, float)):
            continue
        # COCO's value if there is no such object.
        if table is run.val and value == -1:
            continue
        if table is run.val and key in ('time', 'data_time'):
            continue
        table.setdefault(key, []).append((line['step'], float(value)))


def _read_logs(run: Run) -> None:
    """Duration, versions and complaints, from the text logs."""
    seconds = 0.0
    for log in sorted(run.folder.glob('*/*.log')):
        if not (log.parent / 'vis_data' / 'scalars.json').exists():
            continue
        with log.open('rb') as file:
            head = file.read(HEAD_BYTES).decode(errors='replace')
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read().decode(errors='replace')
        times = TIMESTAMP.findall(head)[:1] + TIMESTAMP.findall(tail)[-1:]
        if len(times) == 2:
            begin, end = (
                datetime.strptime(t, '%Y/%m/%d %H:%M:%S') for t in times
            )
            seconds += (end - begin).total_seconds()
        run.facts |= dict(FACT.findall(head))
        if made := MADE_WITH.search(head):
            run.facts['Made with'] = made[1]
        if cost := COST.search(head):
            run.facts['Cost of a step'] = cost[1]
        run.complaints += [
            text
            for text in dict.fromkeys(COMPLAINT.findall(head + tail))
            if text not in run.complaints
        ]
    run.complaints = run.complaints[:5]
    run.seconds = seconds or None


def _read_tests(run: Run) -> None:
    """Metrics that a test wrote next to its log."""
    for file in sorted(run.folder.glob('*/*.json')):
        if file.stem != file.parent.name:
            continue
        try:
            found = json.loads(file.read_text())
        except ValueError:
            run.remarks.append(f'{file} is not JSON and is ignored')
            continue
        run.test |= {
            key: float(value)
            for key, value in found.items()
            if '/' in key and isinstance(value, (int, float)) and value != -1
        }
    if run.test and not run.train:
        run.tested = (run.config or {}).get('load_from')
        # A test has no losses to miss.
        run.remarks = [r for r in run.remarks if 'no log of' not in r]


def _find_checkpoint(run: Run) -> Path | None:
    best = sorted(
        run.folder.glob('best_*.pth'), key=lambda p: p.stat().st_mtime
    )
    if best:
        return best[-1]
    files = [
        file
        for file in run.folder.glob('*.pth')
        if re.fullmatch(r'(epoch|iter)_\d+\.pth', file.name)
    ]
    pointer = run.folder / 'last_checkpoint'
    if pointer.is_file():
        # The folder may have been moved since.
        named = run.folder / Path(pointer.read_text().strip()).name
        if named.is_file():
            return named
        if not files:
            run.remarks.append(
                f'its checkpoint {named.name} is not there, so no images '
                'and no figures by class can be made from it'
            )
    if files:
        newest = max(files, key=lambda p: int(p.stem.split('_')[1]))
        if pointer.is_file():
            run.remarks.append(
                f'its checkpoint {named.name} is not there; images and '
                f'figures by class are from {newest.name}'
            )
        return newest
    if not pointer.is_file() and not run.tested and run.train:
        run.remarks.append(
            'no checkpoint is there, so no images and no figures by class '
            'can be made from it'
        )
    return None


def _judge_length(run: Run) -> None:
    key = 'epoch' if run.by_epoch else 'iter'
    done = run.train.get(key)
    if not done or run.length is None:
        return
    reached = int(done[-1][1])
    last_val = max((s[-1][0] for s in run.val.values() if s), default=0)
    if reached < run.length:
        run.remarks.append(
            f'unfinished: the log ends in {key} {reached} of {run.length}'
        )
    elif run.val and last_val < run.length:
        run.remarks.append(
            f'validated last in {key} {last_val:g} of {run.length}'
        )
    for name, series in run.train.items():
        bad = [step for step, value in series if not math.isfinite(value)]
        if bad and name.startswith('loss'):
            run.remarks.append(
                f'{name} is not a finite number from iteration {bad[0]:g} on'
            )


def said_by(error: BaseException) -> str:
    """An error's kind and first line, for a remark."""
    return f'{type(error).__name__}: {first_line(error)[:160]}'
