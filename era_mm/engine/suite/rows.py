"""The file of a suite's results: a header, and a row for each finished run.

``results/<suite>.jsonl``: the first line describes the suite, each further
line is a run. The page is written from these files only.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from era_mm.engine.whole_files import write_whole
from era_mm.errors import UserError

from . import logs
from .cells import Cell, read_json
from .spec import TEACHER, Suite

Row = dict[str, Any]
#: By pair, method and seed.
CellKey = tuple[str, str, int | None]
#: As that; teachers by the checksum of their weights, as one that is trained
#: on another machine may differ.
Key = tuple[str, str, int | str | None]


def cell_key_of(row: Mapping[str, Any]) -> CellKey:
    """Key of the cell that a row is of."""
    return row['pair'], row['method'], row['seed']


def key_of(row: Mapping[str, Any]) -> Key:
    """Key of a row in its suite."""
    if row['method'] == TEACHER:
        return row['pair'], TEACHER, row['teacher']
    return cell_key_of(row)


def row_for(rows: Iterable[Row], cell: Cell) -> Row | None:
    """The newest row of a cell; None if there is none."""
    mine = [row for row in rows if cell_key_of(row) == cell.key]
    return max(mine, key=lambda row: row['finished'], default=None)


def teachers_in_use(rows: Iterable[Row]) -> list[Row]:
    """The rows of teachers: those with students in ``rows``, and the newest.

    Args:
        rows: The rows of a suite, or of a pair.
    """
    rows = list(rows)
    with_students = {
        (row['pair'], row['teacher'])
        for row in rows
        if row['method'] != TEACHER and row['teacher']
    }
    teachers = [row for row in rows if row['method'] == TEACHER]
    newest = {
        row['pair']: row
        for row in sorted(teachers, key=lambda row: row['finished'])
    }
    return [
        row
        for row in teachers
        if (row['pair'], row['teacher']) in with_students
        or row is newest[row['pair']]
    ]


def header_of(suite: Suite) -> Row:
    """The description of a suite for the page."""
    return dict(
        suite=suite.name,
        title=suite.title,
        note=suite.note,
        metric=asdict(suite.metric),
        seeds=list(suite.seeds),
        schedule=suite.schedule,
        pairs={
            pair.name: dict(
                title=pair.title or pair.name,
                methods=[m.name for m in suite.methods_of(pair)],
                has_teacher=pair.teacher is not None,
            )
            for pair in suite.pairs.values()
        },
        methods={
            method.name: dict(
                title=method.title or method.name,
                role=method.role,
                part_of=method.part_of,
                schedule=method.schedule,
                options=dict(method.options),
            )
            for method in suite.methods.values()
        },
    )


def is_outdated(row: Mapping[str, Any], header: Mapping[str, Any]) -> bool:
    """Whether a row is of a method whose options have changed since."""
    method = header['methods'].get(row['method'], {})
    return row['options'] != method.get('options', row['options'])


def read_rows(file: Path) -> tuple[Row | None, list[Row]]:
    """The header and the rows of a file.

    Returns:
        None and no rows if there is no file, or one of another tool.
    """
    if not file.exists():
        return None, []
    lines = file.read_text().splitlines()
    try:
        found = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(
            f'{file}: expected one JSON object per line, but {error}.'
        ) from None
    if not found or not {'suite', 'metric', 'methods'} <= set(found[0]):
        return None, []
    return found[0], found[1:]


def write_rows(file: Path, header: Row, rows: Iterable[Row]) -> None:
    """Write a file completely or not at all, rows in the suite's order.

    Rows of earlier teachers are left out when they have no students any more.
    """
    rows = list(rows)
    teachers = [key_of(row) for row in teachers_in_use(rows)]
    rows = [
        row
        for row in rows
        if row['method'] != TEACHER or key_of(row) in teachers
    ]
    pairs, methods = list(header['pairs']), [TEACHER, *header['methods']]

    def place(row: Row) -> tuple[int, ...]:
        # Rows that the suite no longer asks for are kept, at the end.
        return tuple(
            names.index(name) if name in names else len(names)
            for names, name in (
                (pairs, row['pair']),
                (methods, row['method']),
            )
        ) + (-1 if row['seed'] is None else row['seed'],)

    text = ''.join(
        json.dumps(line) + '\n' for line in [header, *sorted(rows, key=place)]
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text.encode())


def row_of(
    cell: Cell, *, teacher: str | None, commits: Sequence[str], jobs: int
) -> Row:
    """The row of a cell whose phases are done.

    Args:
        cell: The cell.
        teacher: Checksum of its teacher's weights; a teacher's row has that
            of its own.
        commits: Commit of the code in each attempt.
        jobs: Number of concurrent runs on the machine.

    Raises:
        UserError: The test did not return the suite's metric.
    """
    records = logs.scalars(cell.folder / 'train')
    trained = read_json(cell.folder / 'train.json')
    tested = read_json(cell.folder / 'test.json') or {}
    metrics = logs.tested(cell.folder / 'test')
    val = logs.metrics_of(records)
    metric = cell.suite.metric
    # Given weights have no training, so no validation.
    compared = val if metric.split == 'val' and trained else metrics
    if metric.key not in compared:
        raise UserError(
            f'{cell.name}: the suite compares {metric.key!r}, but the '
            f'{metric.split} split gave {", ".join(compared)}. Correct '
            '`metric.key`.'
        )
    seconds = logs.train_seconds(records)
    unit, number = cell.length
    process = trained or tested
    return dict(
        _about(cell, teacher, commits),
        schedule={unit: number},
        versions=process['versions'],
        machine=process['machine'],
        jobs=jobs,
        metrics=metrics,
        val=val,
        values=logs.ends_of(records, cell.suite.keep),
        seconds=dict(
            train=None if seconds is None else round(seconds, 1),
            test=tested['seconds'],
        ),
        memory=trained and trained['memory'],
    )


def failed_row(
    cell: Cell, *, teacher: str | None, commits: Sequence[str], error: str
) -> Row:
    """The row of a cell that stopped with an error."""
    return dict(_about(cell, teacher, commits), error=error)


def _about(cell: Cell, teacher: str | None, commits: Sequence[str]) -> Row:
    pair, method, seed = cell.key
    return dict(
        pair=pair,
        method=method,
        seed=seed,
        config=cell.config_name,
        options=dict(cell.method.options) if cell.method else {},
        fingerprint=cell.fingerprint,
        teacher=teacher,
        # Several if an interrupted run was resumed with other code.
        commit=' '.join(dict.fromkeys(commits)),
        attempts=len(commits),
        finished=datetime.now(UTC).isoformat(timespec='seconds'),
    )


def rows_of_others(
    cells: Iterable[Cell], own: Sequence[Row], others: Iterable[Row]
) -> list[Row]:
    """Rows of the same runs in other suites, for cells without one.

    A weight that was the best of its tries needs no second run where it
    becomes a method's.

    Args:
        cells: The cells of the suite.
        own: The rows of the suite.
        others: The rows of other suites. One counts if its config is the same
            to the last value, and its teacher that of the suite's own rows,
            if there are any.

    Returns:
        The further rows, under the cells' names.
    """
    by_print = {
        row['fingerprint']: row
        for row in others
        if 'error' not in row and row['method'] != TEACHER
    }
    present = {cell_key_of(row): row for row in own}
    teachers: dict[str, set[str]] = {}
    for row in own:
        if row['teacher']:
            teachers.setdefault(row['pair'], set()).add(row['teacher'])
    found = []
    for cell in cells:
        if cell.method is None or is_current(
            present.get(cell.key), cell, None
        ):
            continue
        pair, method, _ = cell.key
        same = by_print.get(cell.fingerprint)
        if same is None or (
            same['teacher']
            and same['teacher'] not in teachers.get(pair, [same['teacher']])
        ):
            continue
        found.append(
            dict(
                same,
                pair=pair,
                method=method,
                options=dict(cell.method.options),
            )
        )
    return found


def is_current(
    row: Mapping[str, Any] | None, cell: Cell, teacher: str | None
) -> bool:
    """Whether a row is up to date for a cell.

    Args:
        row: Row of an earlier call, if there is one.
        cell: The cell.
        teacher: Checksum of its teacher's weights; None: not known.
    """
    return (
        row is not None
        and 'error' not in row
        and row['fingerprint'] == cell.fingerprint
        and (teacher is None or row['teacher'] == teacher)
    )
