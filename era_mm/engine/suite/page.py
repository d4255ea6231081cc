"""Writes ``docs/results.md`` from the rows of ``results/*.jsonl``."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from terminaltables import GithubFlavoredMarkdownTable

from era_mm.engine.whole_files import write_whole
from era_mm.statistics import Estimate

from .published import published_section
from .results import PairResults, read_results
from .rows import Row

NOT_RUN = 'not run'

INTRO = """\
# Results

Made by `python -m era_mm suite` ([suite.md](suite.md)) from the rows of
`results/`; not written by hand. 'not run' is what it says.

Means over seeds with their 95 % interval (Student's t). Differences are taken
seed by seed, between runs of the same seed, so their intervals are those of
the differences. 'As long': the shortest plain training that took at least the
method's time (within 5 %); its name stands beside it. 'Best baseline': the
one of the highest mean here, which favours the baselines. Time is that of the
training's iterations to the plain student's, on the same machine with as many
runs beside it; memory is the largest peak of a training: of the GPU where
there is one, else of the whole process.
"""


def write_page(file: Path, results: Path, find: Sequence[Path] = ()) -> None:
    """Write the page.

    Args:
        file: Where.
        results: Folder of the rows.
        find: Folders of configs; published numbers are shown with our config,
            if there is one.
    """
    write_whole(file, page(results, find).encode())


def page(results: Path, find: Sequence[Path] = ()) -> str:
    """The page's text; see :func:`write_page`."""
    suites = read_results(results)
    parts = [INTRO, *(_suite(header, rows) for header, rows in suites)]
    if not suites:
        parts.append('No suite has been run.\n')
    parts.append(published_section(results, suites, find))
    return '\n'.join(part for part in parts if part)


def _suite(header: Row, rows: Sequence[Row]) -> str:
    lines = [
        f'## {header["title"]}',
        '',
        f'{header["metric"]["name"]} on the test split, '
        f'{len(header["seeds"])} seeds'
        + (
            f', {header["schedule"]:g} times the schedule of the configs'
            if header['schedule'] != 1
            else ''
        )
        + f'. Rows: `results/{header["suite"]}.jsonl`.',
        '',
    ]
    for name in header['pairs']:
        lines += _pair(PairResults(header, name, rows))
    return '\n'.join(lines)


def _pair(pair: PairResults) -> Iterator[str]:
    yield f'### {pair.title}'
    yield ''
    yield _methods_table(pair)
    yield ''
    yield from _verdicts(pair)
    wholes = dict.fromkeys(
        pair.header['methods'][part]['part_of']
        for part in pair.methods('part')
    )
    for whole in wholes:
        yield f'{pair.title_of(whole)} by parts:'
        yield ''
        yield _parts_table(pair, whole)
        yield ''
    yield from _remarks(pair)


# -- tables ----------------------------------------------------------------


def _methods_table(pair: PairResults) -> str:
    name = pair.metric.name
    head = [
        '',
        'runs',
        name,
        'more than plain',
        'more than plain as long',
        'more than the best baseline',
        'time',
        'MiB',
    ]
    rows = []
    if pair.about['has_teacher']:
        value = pair.teacher_value()
        rows.append(
            [
                'teacher',
                '0 of 1' if value is None else '1 of 1',
                NOT_RUN
                if value is None
                else f'{value:.{pair.metric.digits}f}',
                *[''] * 5,
            ]
        )
    others = pair.methods('baseline', 'method')
    for method in [*pair.methods('plain'), *_by_mean(pair, others)]:
        for mode in ['', *pair.modes(method)]:
            rows.append(_method_row(pair, method, mode))
    return _markdown(head, rows)


def _by_mean(pair: PairResults, methods: Iterable[str]) -> list[str]:
    """The best first; methods without runs last."""

    def place(method: str) -> tuple[bool, float]:
        mean = pair.mean(method)
        return mean is None, 0.0 if mean is None else -mean.mean

    return sorted(methods, key=place)


def _method_row(pair: PairResults, method: str, mode: str) -> list[str]:
    digits = pair.metric.digits
    title = pair.title_of(method)
    if mode:
        return [
            f'{title}, {mode}',
            *_runs_and_mean(pair, method, mode),
            *_compared(pair, method, mode),
            '',
            '',
        ]
    cost, peak = pair.cost(method), pair.peak_mib(method)
    compared = _compared(pair, method, mode)
    if method == pair.plain:
        compared = ['', '', '']
    elif method in pair.methods('plain'):
        compared = [
            shown(pair.more_than(pair.plain, method), digits),
            '',
            '',
        ]
    return [
        title,
        *_runs_and_mean(pair, method, mode),
        *compared,
        NOT_RUN if cost is None else f'{cost:.2f}',
        NOT_RUN if peak is None else f'{peak:.0f}',
    ]


def _runs_and_mean(pair: PairResults, method: str, mode: str) -> list[str]:
    mean = pair.mean(method, mode)
    number = 0 if mean is None else mean.number
    return [
        f'{number} of {len(pair.seeds)}',
        shown(mean, pair.metric.digits),
    ]


def _compared(pair: PairResults, method: str, mode: str) -> list[str]:
    digits = pair.metric.digits
    as_long = pair.plain_as_long(method)
    more = shown(pair.more_than(as_long, method, mode), digits)
    if as_long is not None:
        more += f' ({pair.title_of(as_long)})'
    best = pair.best_baseline
    return [
        shown(pair.more_than(pair.plain, method, mode), digits),
        more,
        'the best'
        if best == method
        else shown(pair.more_than(best, method, mode), digits),
    ]


def _parts_table(pair: PairResults, whole: str) -> str:
    digits = pair.metric.digits
    head = [
        '',
        'runs',
        pair.metric.name,
        f'more than {pair.title_of(whole)}',
        'more than plain',
        'time',
    ]
    rows = []
    parts = [
        part
        for part in pair.methods('part')
        if pair.header['methods'][part]['part_of'] == whole
    ]
    for method in [whole, *parts]:
        cost = pair.cost(method)
        rows.append(
            [
                pair.title_of(method),
                *_runs_and_mean(pair, method, ''),
                ''
                if method == whole
                else shown(pair.more_than(whole, method), digits),
                shown(pair.more_than(pair.plain, method), digits),
                NOT_RUN if cost is None else f'{cost:.2f}',
            ]
        )
    return _markdown(head, rows)


def shown(value: Estimate | None, digits: int) -> str:
    """An estimate as the tables have it."""
    if value is None:
        return NOT_RUN
    text = f'{value.mean:.{digits}f}'
    if value.half is None:
        return f'{text}, one run'
    return f'{text} +- {value.half:.{digits}f}'


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = GithubFlavoredMarkdownTable([head, *rows])
    table.justify_columns = {n: 'right' for n in range(1, len(head))}
    return table.table


# -- what it comes to ------------------------------------------------------


def _verdicts(pair: PairResults) -> Iterator[str]:
    """The methods that are better than plain here, and those that are not."""
    better, worse, same = [], [], []
    for method in _by_mean(pair, pair.methods('baseline', 'method')):
        more = pair.more_than(pair.plain, method)
        if more is None or more.half is None:
            continue
        title = pair.title_of(method)
        if more.is_above_0:
            better.append(title)
        elif more.is_below_0:
            worse.append(title)
        else:
            same.append(title)
    for names, text in (
        (better, 'Better than plain here (the whole interval is above 0)'),
        (same, 'Not told from plain by these runs'),
        (worse, 'Worse than plain here'),
    ):
        if names:
            yield f'- {text}: {", ".join(names)}.'
    if better or worse or same:
        yield ''


def _remarks(pair: PairResults) -> Iterator[str]:
    """Runs that failed, and the machines of the others."""
    if pair.failed:
        yield 'Runs that stopped with an error and have no number:'
        yield ''
        for row in pair.failed:
            first = row['error'].partition('\n')[0]
            yield f'- {row["method"]}, seed {row["seed"]}: {first}'
        yield ''
    if not pair.rows:
        return
    teachers = {row['teacher'] for row in pair.rows if row['teacher']}
    if len(teachers) > 1:
        yield (
            f'**The students had {len(teachers)} different teachers**: '
            'trainings of the same config on several machines.'
        )
        yield ''
    seconds = sum(
        (row['seconds']['train'] or 0) + row['seconds']['test']
        for row in pair.rows
    )
    days = sorted(row['finished'][:10] for row in pair.rows)
    yield (
        f'{len(pair.rows)} runs, {seconds / 60:.0f} minutes of training and '
        f'test together, {days[0]} to {days[-1]}; '
        f'code {_all(row["commit"] for row in pair.rows)}; '
        f'{_all(_machine(row) for row in pair.rows)}; '
        f'{_all(_versions(row) for row in pair.rows)}.'
    )
    yield ''


def _all(texts: Iterable[str]) -> str:
    return ' and '.join(dict.fromkeys(texts))


def _machine(row: Row) -> str:
    machine = row['machine']
    where = machine.get('gpu') or machine['cpu']
    return f'{where}, {row["jobs"]} at a time'


def _versions(row: Row) -> str:
    return ', '.join(f'{k} {v}' for k, v in row['versions'].items())
