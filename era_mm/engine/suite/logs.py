"""Reads the logs of a run: metrics, time and progress."""

import json
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from era_mm.errors import UserError


def scalars(work_dir: Path) -> list[dict[str, Any]]:
    """Values logged in training, from all attempts in order."""
    return [
        record
        for file in sorted(work_dir.glob('*/vis_data/scalars.json'))
        for record in _lines(file)
    ]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            # The last line of a killed run may be half written.
            continue


def metrics_of(records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The metrics of the last evaluation, in the order logged."""
    found: dict[str, float] = {}
    for record in records:
        # Only metrics have a prefix.
        metrics = {key: value for key, value in record.items() if '/' in key}
        found = metrics or found
    return found


def tested(work_dir: Path) -> dict[str, float]:
    """The metrics of a test.

    Raises:
        UserError: There are none.
    """
    # Written by mmengine's LoggerHook in a test.
    for file in sorted(work_dir.glob('*/*.json'), reverse=True):
        found = metrics_of([json.loads(file.read_text())])
        if found:
            return found
    raise UserError(
        f'{work_dir}: expected the metrics of a test, but there are none. '
        'Does `test_evaluator` return any?'
    )


def train_seconds(records: Iterable[dict[str, Any]]) -> float | None:
    """Seconds of all iterations, without start-up and validation.

        sum over logged steps of time * (step - last logged step)

    ``time`` is mmengine's mean over the last iterations. Iterations that were
    repeated after an interruption count once.

    Returns:
        The time; None if nothing was logged.
    """
    times: dict[int, float] = {}
    for record in records:
        if 'iter' in record and 'time' in record:
            times[record['step']] = record['time']
    if not times:
        return None
    steps = sorted(times)
    return sum(
        times[step] * (step - last)
        for last, step in zip([0, *steps], steps, strict=False)
    )


def share_done(work_dir: Path, unit: str, length: int) -> float:
    """Progress of a training, from its newest log: 0 to 1."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    last = None
    for record in _lines(files[-1]) if files else ():
        if 'iter' in record:
            last = record
    if last is None:
        return 0.0
    done = last['step'] if unit == 'iters' else last.get('epoch', 1) - 1
    return min(done / length, 1.0)


def ends_of(
    records: Iterable[dict[str, Any]], patterns: Iterable[str]
) -> dict[str, dict[str, float]]:
    """The first and the last of values logged in training.

    Args:
        records: The result of :func:`scalars`.
        patterns: Shell-style patterns.

    Returns:
        ``first`` and ``last`` of each value that a pattern matches.
    """
    found: dict[str, dict[str, float]] = {}
    patterns = tuple(patterns)
    for record in records:
        for key, value in record.items():
            if '/' not in key and any(fnmatchcase(key, p) for p in patterns):
                found.setdefault(key, dict(first=value))['last'] = value
    return found
