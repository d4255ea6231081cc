"""Published results for the pairs that we have configs for."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from terminaltables import GithubFlavoredMarkdownTable

from era_mm.statistics import estimate

from .results import values_by_config
from .rows import Row

FILE = 'published.json'
#: Instead of a config, unless the entry says something else (`without`).
NO_CONFIG = 'method not here'

_INTRO = """\
## Published numbers

What papers and repositories report on the pairs that we have configs for,
none of it measured by us. The config is ours of the same method on the same
pair and schedule; where there is none, its column says why. `dev/reproduce.sh
CONFIG` trains and tests one, given the data.
"""


def published_section(
    results: Path,
    suites: Iterable[tuple[Row, Sequence[Row]]],
    find: Sequence[Path],
) -> str:
    """The section of the page; empty without a file of published results.

    Args:
        results: Folder with published.json.
        suites: Headers and rows of our own runs.
        find: Folders of our configs.
    """
    file = results / FILE
    if not file.exists():
        return ''
    ours = {path.stem for folder in find for path in folder.rglob('*.py')}
    measured = _measured(suites)
    lines = [_INTRO]
    for table in json.loads(file.read_text())['tables']:
        lines += [f'### {table["title"]}', '', table['note'], '']
        rows = [
            ['pair', 'method', 'published', 'source', 'config', 'here'],
            *(
                _row(pair['pair'], entry, ours, measured)
                for pair in table['pairs']
                for entry in pair['numbers']
            ),
        ]
        shown = GithubFlavoredMarkdownTable(rows)
        shown.justify_columns = {2: 'right', 5: 'right'}
        lines += [shown.table, '']
    return '\n'.join(lines)


def _row(
    pair: str,
    entry: dict[str, Any],
    ours: set[str],
    measured: dict[str, str],
) -> list[str]:
    config = entry.get('config')
    if config not in ours:
        config = None
    return [
        pair,
        entry['method'],
        str(entry['value']),
        entry['source'],
        f'`{config}`' if config else entry.get('without', NO_CONFIG),
        measured.get(config, 'not run here') if config else '',
    ]


def _measured(
    suites: Iterable[tuple[Row, Sequence[Row]]],
) -> dict[str, str]:
    """Our means by config, from runs of the unchanged config."""
    shown = {}
    for config, (_, values) in values_by_config(suites).items():
        mean = estimate(values)
        half = '' if mean.half is None else f' +- {mean.half:.1f}'
        shown[config] = f'{mean.mean:.1f}{half}'
    return shown
