"""Compares runs: groups them by seed and finds plain and teacher."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from era_mm.errors import UserError

from .runs import METRICS, NOT_RECIPE, Run, mode_order, read_run


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
        """The modes of all runs."""
        found = {mode: None for run in self.runs for mode in run.modes}
        return sorted(found, key=mode_order)

    def failed(self, key: str) -> list[Run]:
        """Runs below half of the median, if there are three or more."""
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
        """The test value of each run that has one."""
        key = f'{mode}/{key}' if mode else key
        return [run.test[key] for run in self.runs if key in run.test]


@dataclass
class Comparison:
    """Groups of runs that are compared.

    Args:
        groups: Teacher first, then plain, then distilled.
        metric: Key of the metric that is shown.
        metric_name: Its name on the page.
        percent: Factor to percent.
        plain: The plain student, the reference of differences.
        remarks: What is missing for the whole comparison.
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
        """Differences of a metric to the plain student, by seed.

        If the two have no common seed, to the mean of plain.

        Args:
            group: The group.
            key: Key of the metric.
            mode: Mode of the group; plain has none.
            of: 'val', the last value, or 'test'.
            without: Runs to leave out.
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

    A teacher's run is found if its checkpoint is in a work dir. A folder with
    only a test is assigned to the run whose checkpoint was tested.

    Args:
        folders: Work dirs of trainings and tests.

    Raises:
        UserError: One is not a folder, or none is given.
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
            'differences are shown: train its own config and add its work '
            'dir'
        )
    remarks += _unlike(plain, groups)
    # Methods without a teacher (IE-DML, Trunk-to-Branch) lack none.
    if not any(g.role == 'teacher' for g in groups) and any(
        run.model.get('teacher') for run in runs if run.is_distillation
    ):
        remarks.append(
            "the teacher's run is not among the work dirs (its checkpoint "
            'is in none of them), so its metric is not shown'
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
    """Cases where a difference to plain has other causes as well."""
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
                'their difference is not only due to the distillation'
            )
        if base.length != run.length:
            remarks.append(
                f'{group.name} was trained for {run.length} and {plain.name} '
                f'for {base.length} epochs or iterations, so their difference '
                'is not only due to the distillation'
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
        f'{test.folder} tested {test.tested}, which belongs to none of the '
        'runs; it is ignored'
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
    """A model's config without settings that do not change the model."""

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
    """Whether a plain run trained the student of a distillation."""
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
    """The main metric of some runs, or ''."""
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
