"""Statistics of the rows of a suite, for the page.

Every number is computed from rows of finished runs, and is None without such
rows.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from era_mm.statistics import Estimate, estimate, mean_ratio, paired

from .rows import Row, is_outdated, read_rows, teachers_in_use
from .spec import TEACHER, Metric

#: A plain run counts as long as a method's if it takes at least this share of
#: its time: times of a run vary by a few percent.
AS_LONG = 0.95

#: Values by seed.
BySeed = dict[int, float]


class PairResults:
    """The rows of one pair.

    Args:
        header: Header of the suite.
        pair: Name of the pair.
        rows: Rows of the suite.
    """

    def __init__(self, header: Row, pair: str, rows: Sequence[Row]) -> None:
        self.header = header
        self.metric = Metric(**header['metric'])
        self.seeds: list[int] = header['seeds']
        self.about: dict[str, Any] = header['pairs'][pair]
        self.title: str = self.about['title']
        every = [row for row in rows if row['pair'] == pair]
        mine = [row for row in every if not is_outdated(row, header)]
        self.num_outdated = len(every) - len(mine)
        self.failed = [row for row in mine if 'error' in row]
        self.rows = [row for row in mine if 'error' not in row]

    # -- values ------------------------------------------------------------

    def methods(self, *roles: str) -> list[str]:
        """The methods of some roles, in the suite's order."""
        return [
            name
            for name in self.about['methods']
            if self.header['methods'][name]['role'] in roles
        ]

    def title_of(self, method: str) -> str:
        """What the page calls a method."""
        return self.header['methods'][method]['title']

    def _of(self, method: str) -> Iterator[Row]:
        for row in self.rows:
            if row['method'] == method and row['seed'] in self.seeds:
                yield row

    def values(self, method: str, mode: str = '') -> BySeed:
        """The metric by seed, in the units of the tables.

        Args:
            method: Name of the method.
            mode: Inference mode; '' is the student's own.
        """
        key = f'{mode}/{self.metric.key}' if mode else self.metric.key
        return {
            row['seed']: found[key] * self.metric.scale
            for row in self._of(method)
            if key in (found := self.metric.values_of(row))
        }

    def modes(self, method: str) -> list[str]:
        """The further inference modes that a method was tested in."""
        end = f'/{self.metric.key}'
        return list(
            dict.fromkeys(
                key.removesuffix(end)
                for row in self._of(method)
                for key in self.metric.values_of(row)
                if key.endswith(end)
            )
        )

    def teachers(self) -> list[tuple[float, int]]:
        """The metric of each teacher, and how many runs learned from it."""
        runs = Counter(
            row['teacher'] for row in self.rows if row['method'] != TEACHER
        )
        return [
            (found[self.metric.key] * self.metric.scale, runs[row['teacher']])
            for row in teachers_in_use(self.rows)
            if self.metric.key in (found := self.metric.values_of(row))
        ]

    def mean(self, method: str, mode: str = '') -> Estimate | None:
        """Mean over the seeds; None without runs."""
        values = list(self.values(method, mode).values())
        return estimate(values) if values else None

    def more_than(
        self, other: str | None, method: str, mode: str = ''
    ) -> Estimate | None:
        """Difference of a method to another, by pairs of seeds.

        Without the seeds in which a run of either collapsed: one of them
        makes the interval useless. Without those in which the two learned
        from different teachers.
        """
        if other is None:
            return None
        left = {*self.collapsed(other), *self.collapsed(method)}
        return self._difference(other, method, mode, left)

    def more_than_counting_all(
        self, other: str, method: str
    ) -> Estimate | None:
        """As :meth:`more_than`, with the seeds of collapsed runs."""
        return self._difference(other, method, '', set())

    def _difference(
        self, other: str, method: str, mode: str, left: set[int]
    ) -> Estimate | None:
        mine, theirs = self._teachers(method), self._teachers(other)
        for seed in mine.keys() & theirs.keys():
            if len({mine[seed], theirs[seed]} - {None}) > 1:
                left = left | {seed}
        return paired(
            *(
                {seed: v for seed, v in values.items() if seed not in left}
                for values in (self.values(method, mode), self.values(other))
            )
        )

    def _teachers(self, method: str) -> dict[int, str | None]:
        """Checksum of the teacher's weights by seed; None without one."""
        return {row['seed']: row['teacher'] for row in self._of(method)}

    def collapsed(self, method: str) -> BySeed:
        """Runs far below the others of a method, which say little of it.

        Those below half of the method's median, of three runs or more.
        """
        values = self.values(method)
        if len(values) < 3:
            return {}
        least = statistics.median(values.values()) / 2
        return {seed: v for seed, v in values.items() if v < least}

    # -- what a method is compared with ------------------------------------

    @cached_property
    def plain(self) -> str:
        """The plain student at the methods' schedule."""
        return min(
            self.methods('plain'),
            key=lambda name: abs(self.header['methods'][name]['schedule'] - 1),
        )

    @cached_property
    def best_baseline(self) -> str | None:
        """The baseline with the highest mean, among those with most runs."""
        counts = {
            name: len(self.values(name)) for name in self.methods('baseline')
        }
        most = max(counts.values(), default=0)
        if not most:
            return None
        return max(
            (name for name, count in counts.items() if count == most),
            key=lambda name: estimate(list(self.values(name).values())).mean,
        )

    def cost(self, method: str) -> float | None:
        """Training time relative to the plain student's.

        By seeds, among runs on one kind of machine with the same number of
        concurrent runs.
        """
        ratios = [
            mean_ratio(times, self._times(self.plain).get(where, {}))
            for where, times in self._times(method).items()
        ]
        known = [ratio for ratio in ratios if ratio is not None]
        return sum(known) / len(known) if known else None

    def _times(self, method: str) -> Mapping[str, BySeed]:
        """Seconds by seed, by machine."""
        found: dict[str, BySeed] = {}
        for row in self._of(method):
            if row['seconds']['train']:
                where = f'{sorted(row["machine"].items())} x {row["jobs"]}'
                found.setdefault(where, {})[row['seed']] = row['seconds'][
                    'train'
                ]
        return found

    def plain_as_long(self, method: str) -> str | None:
        """The shortest plain training that took at least a method's time.

        None if there is none, or times are not known.
        """
        wanted = self.cost(method)
        if wanted is None:
            return None
        costs = {name: self.cost(name) for name in self.methods('plain')}
        enough = {
            name: cost
            for name, cost in costs.items()
            if cost is not None and cost >= AS_LONG * wanted
        }
        return min(enough, key=lambda name: enough[name], default=None)

    def peak_mib(self, method: str) -> float | None:
        """Largest peak memory of a training: of the GPU, if it had one."""
        found = [
            row['memory'].get('gpu_mib', row['memory']['process_mib'])
            for row in self._of(method)
            if row['memory']
        ]
        return max(found, default=None)


def values_by_config(
    suites: Iterable[tuple[Row, Iterable[Row]]],
) -> dict[str, tuple[str, list[float]]]:
    """The metric of each run of an unchanged config, by config.

    On the test split, in the units of the tables. Runs with other options or
    another length are left out. A teacher of several pairs, or trained on
    several machines, counts once, as it was first. Of several suites with the
    same config the one with most runs is taken.

    Args:
        suites: Header and rows of each suite.

    Returns:
        The suite's name and its values for each config.
    """
    found: dict[str, tuple[str, list[float]]] = {}
    for header, rows in suites:
        metric = Metric(**header['metric'])
        by_config: dict[str, dict[str, float]] = {}
        for row in rows:
            method = header['methods'].get(row['method'])
            factor = header['schedule'] * method['schedule'] if method else 1
            if 'error' in row or row['options'] or factor != 1:
                continue
            runs = by_config.setdefault(row['config'], {})
            value = row['metrics'][metric.key] * metric.scale
            runs.setdefault(row['fingerprint'], value)
        for config, runs in by_config.items():
            if len(runs) > len(found.get(config, ('', []))[1]):
                found[config] = header['suite'], list(runs.values())
    return found


def read_results(folder: Path) -> list[tuple[Row, list[Row]]]:
    """Header and rows of all suites of a folder, by the files' names."""
    found = []
    for file in sorted(folder.glob('*.jsonl')):
        header, rows = read_rows(file)
        if header is not None:
            found.append((header, rows))
    return found
