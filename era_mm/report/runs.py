"""Reads work dirs: scalars, configs, logs, checkpoints. Writes nothing.

Read in this order: `Run`, `read_run`, `Group`, `Comparison`, `compare_runs`.
What is not there is left out, and a remark says what and why.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from mmengine.config import Config

from era_mm.errors import UserError

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
    """What one training left in its work dir.

    Args:
        folder: The work dir.
        config: As it was dumped; None where there is none.
        train: Losses and the like, by iteration.
        val: Metrics, by epoch, or by iteration in a run without epochs.
        levels: What `ResidualVisHook` logged, by iteration.
        test: Metrics of a test; of this folder or of one that tested a
            checkpoint of it.
        tested: The checkpoint that a folder with a test alone is about.
        seconds: How long the training took, by its log.
        facts: Versions and machine, by the log.
        complaints: Warnings and errors of the log, the first few.
        checkpoint: The best file if one was kept, else the last.
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
        """The config of its model; empty where there is no config."""
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
        """Epochs, or iterations, that the config asks for."""
        loop = (self.config or {}).get('train_cfg') or {}
        return loop.get('max_epochs', loop.get('max_iters'))

    @property
    def seconds_per_iter(self) -> float | None:
        """Median of the logged times of an iteration."""
        times = [value for _, value in self.train.get('time', [])]
        return median(times) if times else None

    @property
    def methods(self) -> list[str]:
        """The distillers' names, as short as they are known by."""
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
        """'', the model's own predictions, and the further modes evaluated."""
        found: dict[str, None] = {'': None}
        for key in (*self.val, *self.test):
            start, _, rest = key.partition('/')
            if '/' in rest:
                found[start] = None
        return sorted(found, key=_mode_order)

    @property
    def command(self) -> str:
        """The line that does it again, into another folder."""
        dumped = _newest_config(self.folder)
        if dumped is None:
            return ''
        line = f'mim train era_mm {dumped} --work-dir {self.folder}_again'
        launcher = (self.config or {}).get('launcher', 'none')
        return line if launcher == 'none' else f'{line} --launcher {launcher}'

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


def _mode_order(mode: str) -> tuple:
    """The student first, then the estimates, then what they add up to."""
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
        folder: What a training was given as ``--work-dir``, or a test.

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
            # What the run's own code registers is imported where models are
            # built; figures can do without.
            return Config.fromfile(path, import_custom_modules=False)
        except Exception as error:
            run.remarks.append(
                f'{path} could not be read ({_first_line(error)})'
            )
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
            f'{broken} line(s) of scalars.json are half written and left out'
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
    """Drop what a resumed or repeated training did once more."""
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
        # COCO's way to say that there is no such object.
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
    """Metrics that a test wrote beside its log."""
    for file in sorted(run.folder.glob('*/*.json')):
        if file.stem != file.parent.name:
            continue
        try:
            found = json.loads(file.read_text())
        except ValueError:
            run.remarks.append(f'{file} is no JSON and left out')
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


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or ['no details']
    return f'{type(error).__name__}: {lines[0][:160]}'


# -- several runs ------------------------------------------------------------


@dataclass
class Group:
    """Runs of one recipe with other seeds.

    Args:
        name: What the page calls it.
        role: 'teacher', 'plain', 'distilled', or 'unknown' without a config.
        runs: One for each seed.
    """

    name: str
    role: str
    runs: list[Run]

    @property
    def title(self) -> str:
        """Name, method and number of seeds."""
        methods = '+'.join(self.runs[0].methods)
        more = [methods] if methods else []
        if self.role == 'teacher' and self.runs[0].name != self.name:
            more = [self.runs[0].name]
        if self.role == 'plain' and self.name != self.role:
            more = [self.role]
        if len(self.runs) > 1:
            more.append(f'{len(self.runs)} seeds')
        return f'{self.name} ({", ".join(more)})' if more else self.name

    @property
    def modes(self) -> list[str]:
        """Those of all runs."""
        found = {mode: None for run in self.runs for mode in run.modes}
        return sorted(found, key=_mode_order)

    def failed(self, key: str) -> list[Run]:
        """Runs with less than half of what is usual among three or more."""
        usual = self.lasts(key)
        if len(usual) < 3:
            return []
        least = median(usual) / 2
        return [
            run
            for run in self.runs
            if (last := run.last(key)) is not None and last < least
        ]

    def lasts(self, key: str, mode: str = '') -> list[float]:
        """The last value of each run that has one."""
        found = [run.last(key, mode) for run in self.runs]
        return [value for value in found if value is not None]

    def tests(self, key: str, mode: str = '') -> list[float]:
        """What each run was tested at, where it was."""
        key = f'{mode}/{key}' if mode else key
        return [run.test[key] for run in self.runs if key in run.test]


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds, and how far it can be trusted.

    Args:
        mean: The mean.
        spread: Sample standard deviation; None for one value.
        low: Lower end of the 95 % interval of the mean (Student's t); None
            for one value.
        high: Its upper end.
        number: Values.
    """

    mean: float
    spread: float | None
    low: float | None
    high: float | None
    number: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean, deviation and 95 % interval; None without values."""
    if not values:
        return None
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, None, None, 1)
    from scipy.stats import t

    spread = stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * spread / len(values) ** 0.5
    return Estimate(mean, spread, mean - half, mean + half, len(values))


@dataclass
class Comparison:
    """Groups of runs that are looked at together.

    Args:
        groups: Teacher first, then plain, then distilled.
        metric: Key of the metric that is shown.
        metric_name: What it is called.
        percent: Factor that makes it percent.
        plain: What differences are to.
        remarks: What is missing for the comparison as a whole.
    """

    groups: list[Group]
    metric: str
    metric_name: str
    percent: float
    plain: Group | None
    remarks: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """All of them."""
        return [run for group in self.groups for run in group.runs]

    @property
    def teacher(self) -> Group | None:
        """The first teacher."""
        return next((g for g in self.groups if g.role == 'teacher'), None)

    @property
    def distilled(self) -> list[Group]:
        """The groups of distillations."""
        return [g for g in self.groups if g.role == 'distilled']

    @property
    def failed(self) -> list[tuple[Group, Run]]:
        """Runs that are far below the others of their recipe."""
        return [
            (group, run)
            for group in self.groups
            for run in group.failed(self.metric)
        ]

    def differences(
        self,
        group: Group,
        key: str,
        mode: str = '',
        of: str = 'val',
        without: Sequence[Run] = (),
    ) -> list[float]:
        """Of a metric to plain's own predictions, seed by seed.

        Where the two have no seed in common: each to the mean of plain.

        Args:
            group: Whose.
            key: Of the metric.
            mode: Of the group; plain has none.
            of: 'val', the last value, or 'test'.
            without: Runs that are left out.
        """
        if self.plain is None:
            return []
        left_out = [run.folder for run in without]

        def value(run: Run, mode: str) -> float | None:
            if run.folder in left_out:
                return None
            if of == 'val':
                return run.last(key, mode)
            return run.test.get(f'{mode}/{key}' if mode else key)

        base = {
            run.seed: v
            for run in self.plain.runs
            if (v := value(run, '')) is not None
        }
        own = [
            (run.seed, v)
            for run in group.runs
            if (v := value(run, mode)) is not None
        ]
        pairs = [(v, base[s]) for s, v in own if s in base]
        if not pairs and base:
            mean = fmean(base.values())
            pairs = [(v, mean) for _, v in own]
        return [v - b for v, b in pairs]


def compare_runs(folders: Sequence[str | Path]) -> Comparison:
    """Read work dirs and sort them into teacher, plain and distilled.

    A teacher's run is found by itself where its checkpoint lies in a work
    dir. Folders with a test alone are given to the run whose checkpoint they
    tested.

    Args:
        folders: Work dirs of trainings and tests.

    Raises:
        UserError: One is no folder, or there is none.
    """
    if not folders:
        raise UserError('expected one or more work dirs, but got none.')
    unique = {str(Path(f).resolve()): Path(f) for f in folders}
    found = [read_run(folder) for folder in unique.values()]
    remarks: list[str] = []
    runs = [run for run in found if run.tested is None]
    for folder in _teacher_folders(runs):
        if str(folder.resolve()) not in unique:
            runs.append(read_run(folder))
    for test in found:
        if test.tested is not None:
            remarks += _give_test(test, runs)
    groups = _group(runs)
    plain = _find_plain(groups)
    if plain is None and any(g.role == 'distilled' for g in groups):
        remarks.append(
            'no plain run of the student is among the work dirs, so no '
            'differences are shown: train its own config and give its work '
            'dir too'
        )
    remarks += _unlike(plain, groups)
    if not any(g.role == 'teacher' for g in groups) and any(
        g.role == 'distilled' for g in groups
    ):
        remarks.append(
            "the teacher's run is not among the work dirs (its checkpoint "
            'does not lie in one), so its metric is not shown'
        )
    metric = find_metric(runs)
    name, percent = METRICS.get(metric, (metric or 'metric', 1.0))
    comparison = Comparison(groups, metric, name, percent, plain, remarks)
    for group, run in comparison.failed:
        usual = median(group.lasts(metric))
        remarks.append(
            f'{run.name} failed: {name} '
            f'{percent * (run.last(metric) or 0):.1f}, where runs of its '
            f'recipe reach {percent * usual:.1f}. It counts in every mean'
        )
    return comparison


def _unlike(plain: Group | None, groups: Sequence[Group]) -> list[str]:
    """Where differences to plain are not those of the distillation alone."""
    if plain is None:
        return []
    base, remarks = plain.runs[0], []
    for group in groups:
        run = group.runs[0]
        if group.role != 'distilled':
            continue
        if not is_same_student(base, run):
            remarks.append(
                f'{group.name} has another student than {plain.name}, so '
                'their difference is not that of the distillation alone'
            )
        if base.length != run.length:
            remarks.append(
                f'{group.name} is {run.length} long and {plain.name} '
                f'{base.length} (epochs or iterations), so their difference '
                'is not that of the distillation alone'
            )
    return remarks


def _teacher_folders(runs: Sequence[Run]) -> Iterator[Path]:
    seen = set()
    for run in runs:
        for checkpoint in run.teacher_checkpoints:
            folder = Path(checkpoint).parent
            if (
                '://' not in checkpoint
                and folder not in seen
                and any(folder.glob('*/vis_data/config.py'))
            ):
                seen.add(folder)
                yield folder


def _give_test(test: Run, runs: Sequence[Run]) -> list[str]:
    folder = Path(str(test.tested)).resolve().parent
    for run in runs:
        if run.folder.resolve() == folder:
            run.test |= test.test
            return []
    return [
        f'{test.folder} tested {test.tested}, which is of none of the runs; '
        'it is left out'
    ]


def _role(run: Run, teachers: set[Path]) -> str:
    if run.config is None:
        return 'unknown'
    if run.is_distillation:
        return 'distilled'
    return 'teacher' if run.folder.resolve() in teachers else 'plain'


def _recipe(run: Run) -> str:
    if run.config is None:
        return str(run.folder)
    content = {
        k: v for k, v in run.config.to_dict().items() if k not in NOT_RECIPE
    }
    # Paths move from machine to machine.
    for split in ('train', 'val', 'test'):
        content.pop(f'{split}_dataloader', None)
        content.pop(f'{split}_evaluator', None)
    return json.dumps(content, sort_keys=True, default=str)


def _group(runs: Sequence[Run]) -> list[Group]:
    teachers = {
        Path(checkpoint).resolve().parent
        for run in runs
        for checkpoint in run.teacher_checkpoints
        if '://' not in checkpoint
    }
    sorted_out: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        key = (_role(run, teachers), _recipe(run))
        sorted_out.setdefault(key, []).append(run)
    order = ('teacher', 'plain', 'unknown', 'distilled')
    groups = [
        Group(_common_name(members), role, members)
        for (role, _), members in sorted_out.items()
    ]
    groups.sort(key=lambda group: order.index(group.role))
    taught_by = [group for group in groups if group.role == 'teacher']
    if len(taught_by) == 1:
        taught_by[0].name = 'teacher'
    # Two groups must not go by one name.
    taken: dict[str, int] = {}
    for group in groups:
        taken[group.name] = taken.get(group.name, 0) + 1
        if taken[group.name] > 1:
            group.name = f'{group.name} #{taken[group.name]}'
    return groups


def _common_name(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    letters = []
    for several in zip(*(run.name for run in runs), strict=False):
        if len(set(several)) > 1:
            break
        letters.append(several[0])
    common = re.sub(r'[_.-]*(seed|s)?[_.-]*$', '', ''.join(letters))
    return common or runs[0].name


def _plain_model(model: Mapping) -> str:
    """A model's config without what does not change what it is."""

    def strip(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {
                k: strip(v)
                for k, v in node.items()
                if k not in ('init_cfg', 'data_preprocessor', '_scope_')
            }
        if isinstance(node, (list, tuple)):
            return [strip(item) for item in node]
        return node

    return json.dumps(strip(model), sort_keys=True, default=str)


def is_same_student(plain: Run, distilled: Run) -> bool:
    """Whether a run trained the model that another distilled into."""
    return _plain_model(plain.model) == _plain_model(distilled.student)


def _find_plain(groups: Sequence[Group]) -> Group | None:
    """The plain group of the same student and length, or the nearest to it."""
    plain = [group for group in groups if group.role == 'plain']
    distilled = [group for group in groups if group.role == 'distilled']
    for same_length in (True, False):
        for taught in distilled:
            run = taught.runs[0]
            for group in plain:
                other = group.runs[0]
                if is_same_student(other, run) and (
                    not same_length or other.length == run.length
                ):
                    return group
    return plain[0] if plain else None


def find_metric(runs: Sequence[Run]) -> str:
    """What one looks at first among the metrics of some runs, or ''."""
    keys: dict[str, None] = {}
    for run in runs:
        for key in (*run.val, *run.test):
            keys[key] = None
    for metric in METRICS:
        if metric in keys:
            return metric
    return next(
        (key for key in keys if 'unexplained' not in key and '/' in key), ''
    )
