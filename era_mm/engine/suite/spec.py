"""Reads a suite file: pairs, methods, seeds and metric.

A suite file is a config in Python, YAML or JSON::

    title = 'Detection: digit scenes'
    metric = dict(key='coco/bbox_mAP', name='AP', scale=100)
    seeds = [0, 1, 2]
    pairs = dict(
        w32_w16=dict(teacher='plain_w32', student='plain_w16'),
    )
    methods = dict(
        plain=dict(config='{student}', role='plain'),
        plain_x2=dict(config='{student}', role='plain', schedule=2),
        fitnet=dict(config='fitnet_{pair}', role='baseline'),
        era=dict(config='era_{pair}'),
        era_no_twi=dict(
            part_of='era',
            options={'model.distiller.twi_steps': 'none'},
        ),
    )
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from era_mm.errors import UserError

#: Roles of a method in the tables. 'part' is set by ``part_of``.
ROLES = ('plain', 'baseline', 'method', 'part')
#: The cell that trains a pair's teacher.
TEACHER = 'teacher'
#: What is measured in a training's last validation, and after it.
SPLITS = ('val', 'test')
_NAME = re.compile(r'\w[\w.+-]*')


@dataclass(frozen=True)
class Metric:
    """The metric of the tables; higher is better.

    Args:
        key: Its key in the test loop: 'coco/bbox_mAP', 'accuracy/top1'.
        name: Its name in the tables.
        scale: Factor for the tables, 100 for fractions.
        digits: Digits after the decimal point.
        split: 'test'; or 'val', the last validation of the training, where
            settings are chosen.
    """

    key: str
    name: str
    scale: float = 1.0
    digits: int = 1
    split: str = 'test'

    def values_of(self, row: Mapping[str, Any]) -> Mapping[str, float]:
        """The metrics of a finished row on this split."""
        return row['metrics' if self.split == 'test' else 'val']


@dataclass(frozen=True)
class Pair:
    """A teacher and a student.

    Args:
        name: Its name in folders and rows; ``{pair}`` in a method's
            ``config``.
        student: Base name or path of the plain student's config;
            ``{student}`` in a method's ``config``.
        teacher: Base name or path of the teacher's config; None: no method
            needs one.
        checkpoint: Path or URL of the teacher's weights. None: the suite
            trains the teacher with its config, before its students.
        title: Its name on the page.
        words: Values for further ``{...}`` in a ``config``.
    """

    name: str
    student: str
    teacher: str | None = None
    checkpoint: str | None = None
    title: str = ''
    words: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A row of the tables: a config and changes to it.

    Args:
        name: Its name in folders, rows and tables.
        config: Base name or path of a config, with ``{pair}``,
            ``{student}``, ``{teacher}`` and the pair's ``words``.
        role: 'plain' (the student alone, at any schedule), 'baseline',
            'method', or 'part' (a variant of a method).
        options: Changes to the config, as in ``--cfg-options``.
        schedule: Factor on the suite's schedule.
        part_of: The method of which this is a variant. It inherits the config
            and options of that method.
        pairs: Only for these pairs; None: all.
        title: Its name on the page.
    """

    name: str
    config: str
    role: str = 'method'
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: float = 1.0
    part_of: str | None = None
    pairs: Sequence[str] | None = None
    title: str = ''


@dataclass(frozen=True)
class Suite:
    """A whole suite file.

    Args:
        name: Name of the file without suffix; also of the results.
        title: Heading of the suite on the page.
        metric: The metric that is compared.
        pairs: Pairs by name.
        methods: Methods by name, in the order of the tables.
        seeds: One run for each; the same for all methods.
        schedule: Factor on every student's schedule.
        options: Changes to every config, including the teacher's.
        keep: Patterns of logged values to keep in the rows, such as
            'era_unexplained_*': the first and the last of each.
        note: Text below the heading on the page, such as why some methods
            have fewer runs.
    """

    name: str
    title: str
    metric: Metric
    pairs: Mapping[str, Pair]
    methods: Mapping[str, Method]
    seeds: Sequence[int]
    schedule: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: Sequence[str] = ()
    note: str = ''

    def methods_of(self, pair: Pair) -> Iterator[Method]:
        """The methods for a pair."""
        for method in self.methods.values():
            if method.pairs is None or pair.name in method.pairs:
                yield method


def read_suite(file: str | Path) -> Suite:
    """Read a suite file.

    Raises:
        UserError: There is no such file, or it has unknown, missing or
            contradictory entries.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(
            f'suite: expected a file that lists methods, pairs and seeds, '
            f'but there is no {file.resolve()}. See docs/suite.md.'
        )
    try:
        found = Config.fromfile(file).to_dict()
    except OSError as error:
        # mmengine's error for an unknown suffix.
        raise UserError(
            f'suite: {error}; expected .py, .yaml or .json.'
        ) from error
    where = str(file)
    _check(
        found,
        where,
        needs=('title', 'metric', 'seeds', 'pairs', 'methods'),
        may=('schedule', 'options', 'keep', 'note'),
    )
    pairs = {
        name: _pair(name, entry, where)
        for name, entry in found['pairs'].items()
    }
    methods: dict[str, Method] = {}
    for name, entry in found['methods'].items():
        methods[name] = _method(name, entry, methods, pairs, where)
    seeds = found['seeds']
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(
            f'{where}: expected `seeds` with at least one number, each once, '
            f'but got {seeds}.'
        )
    if not any(method.role == 'plain' for method in methods.values()):
        raise UserError(
            f"{where}: expected a method with role='plain', the student "
            'alone, for comparison. Add '
            "plain=dict(config='{student}', role='plain')."
        )
    _check(
        found['metric'],
        f'{where}: metric',
        needs=('key', 'name'),
        may=('scale', 'digits', 'split'),
    )
    if found['metric'].get('split', 'test') not in SPLITS:
        raise UserError(
            f'{where}: metric: expected a `split` of {", ".join(SPLITS)}, '
            f'but got {found["metric"]["split"]!r}.'
        )
    return Suite(
        name=file.stem,
        title=found['title'],
        metric=Metric(**found['metric']),
        pairs=pairs,
        methods=methods,
        seeds=tuple(seeds),
        schedule=found.get('schedule', 1.0),
        options=found.get('options', {}),
        keep=tuple(found.get('keep', ())),
        note=found.get('note', ''),
    )


def _pair(name: str, entry: Any, where: str) -> Pair:
    where = f'{where}: pairs.{name}'
    _check_name(name, where)
    _check(
        entry,
        where,
        needs=('student',),
        may=('teacher', 'checkpoint', 'title', 'words'),
    )
    if entry.get('checkpoint') and not entry.get('teacher'):
        raise UserError(f'{where}: expected `teacher` with `checkpoint`.')
    return Pair(name=name, **entry)


def _method(
    name: str,
    entry: Any,
    before: Mapping[str, Method],
    pairs: Mapping[str, Pair],
    where: str,
) -> Method:
    where = f'{where}: methods.{name}'
    _check_name(name, where)
    whole = isinstance(entry, Mapping) and entry.get('part_of')
    _check(
        entry,
        where,
        needs=() if whole else ('config',),
        may=('role', 'options', 'schedule', 'part_of', 'pairs', 'title'),
    )
    values = dict(entry)
    if whole:
        if whole not in before or 'role' in values:
            raise UserError(
                f'{where}: `part_of` names a method above it and sets the '
                f"role 'part', but got part_of={whole!r} "
                + (
                    f'with role={values["role"]!r}.'
                    if 'role' in values
                    else f'after {", ".join(before) or "no method"}.'
                )
            )
        base = before[whole]
        values['config'] = base.config
        values['role'] = 'part'
        values['options'] = {**base.options, **values.get('options', {})}
        values.setdefault('schedule', base.schedule)
        values.setdefault('pairs', base.pairs)
    elif values.get('role', 'method') not in ROLES[:-1]:
        raise UserError(
            f'{where}: expected `role` to be one of {ROLES[:-1]}, but got '
            f'{values["role"]!r}.'
        )
    unknown = set(values.get('pairs') or ()) - set(pairs)
    if unknown:
        raise UserError(
            f'{where}: `pairs` names {", ".join(sorted(unknown))}, but the '
            f'suite has {", ".join(pairs)}.'
        )
    return Method(name=name, **values)


def _check(
    entry: Any, where: str, needs: Sequence[str], may: Sequence[str]
) -> None:
    if not isinstance(entry, Mapping):
        raise UserError(f'{where}: expected a dict, but got {entry!r}.')
    missing = [key for key in needs if key not in entry]
    unknown = [key for key in entry if key not in (*needs, *may)]
    if missing or unknown:
        raise UserError(
            f'{where}: '
            + '; '.join(
                text
                for text in (
                    missing and f'{", ".join(missing)} is missing',
                    unknown and f'{", ".join(unknown)} is not known',
                )
                if text
            )
            + f'. Expected {", ".join(needs) or "nothing"}, and perhaps '
            f'{", ".join(may)}.'
        )


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name) or name == TEACHER:
        raise UserError(
            f'{where}: expected a name that can be a folder, of letters, '
            f'digits and _ . + -, and not {TEACHER!r}, which is the cell of '
            "the pair's teacher."
        )
