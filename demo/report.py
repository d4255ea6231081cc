"""The demo's table, and what it was measured on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table as RichTable

from demo.stages import StageError, console, write_json
from era_mm.hosts import versions

TITLES = {
    'teacher': 'teacher',
    'plain': 'plain student',
    'era': 'ERA student',
}


@dataclass(frozen=True)
class Table:
    """What the table says of a task.

    Args:
        host: The stock package that loads the ERA student.
        noun: What a row is.
        metrics: The host's metric for each heading; the stock host is asked
            for the first.
        percent: Factor that makes the host's metrics percent.
        digits: Decimals of the times.
        caption: Its first words, with a place for the number of images.
        timed: What a time covers, from where to where.
        empty: The metric where the host reports none; None if it always does.
    """

    host: str
    noun: str
    metrics: dict[str, str]
    percent: float
    digits: int
    caption: str
    timed: str
    empty: float | None = None

    def value(self, metrics: dict, key: str) -> float:
        """A metric in percent."""
        found = (
            metrics[key]
            if self.empty is None
            else (metrics.get(key, self.empty))
        )
        return round(self.percent * found, 1)


def table_rows(records: dict[str, dict], task: Table) -> list[dict]:
    """One row per model and inference mode that was measured."""
    rows = []
    for key, measured in records['measure']['result']['variants'].items():
        model, _, mode = key.partition('_')
        metrics = records[f'test_{model}']['result']
        # The host reports the student's own numbers under its own names.
        prefix = f'{mode}/' if mode not in ('', 'S') else ''
        rows.append(
            {
                task.noun: TITLES[model] + (f', {mode}' if mode else ''),
                **{
                    heading: task.value(metrics, prefix + metric)
                    for heading, metric in task.metrics.items()
                },
                'parameters': measured['parameters'],
                'ms_per_image': round(measured['ms_per_image'], task.digits),
            }
        )
    return rows


def write_table(
    rows: Sequence[dict], task: Table, caption: str, facts: dict, work: Path
) -> None:
    """Print the table and write it as JSON and Markdown."""
    headings = (task.noun, *task.metrics, 'parameters', 'ms per image')
    cells = [
        (
            row[task.noun],
            *(f'{row[heading]:.1f}' for heading in task.metrics),
            f'{row["parameters"] / 1e6:.2f} M',
            f'{row["ms_per_image"]:.{task.digits}f}',
        )
        for row in rows
    ]
    write_json(work / 'table.json', {'rows': rows, **facts})
    lines = [
        '| ' + ' | '.join(headings) + ' |',
        '| --- |' + ' ---: |' * (len(headings) - 1),
        *('| ' + ' | '.join(line) + ' |' for line in cells),
        '',
        caption,
    ]
    (work / 'table.md').write_text('\n'.join(lines) + '\n')
    table = RichTable(caption=caption, caption_justify='left')
    for number, heading in enumerate(headings):
        table.add_column(heading, justify='right' if number else 'left')
    for line in cells:
        table.add_row(*line)
    console.print(table)


def report(
    records: dict[str, dict], stock: dict, work: Path, task: Table
) -> None:
    """The table and the stock loading.

    Args:
        records: What each stage left.
        stock: See `Demo.stock`.
        work: Where the table goes.
        task: What it says.

    Raises:
        StageError: If the stock host misses keys, knows some not or gives
            another metric.
    """
    # Brings torch, which the demo's own process needs here alone.
    from era_mm.engine.benchmark_report import cpu_model

    result = records['measure']['result']
    minutes = sum(record['seconds'] for record in records.values()) / 60
    facts = {
        'machine': f'{cpu_model()}, {os.cpu_count()} cores',
        'versions': versions(),
        'minutes': round(minutes, 1),
        'resumed': any(record['resumed'] for record in records.values()),
        'seconds': {
            name: round(record['seconds']) for name, record in records.items()
        },
        'num_test_images': result['num_images'],
        f'stock_{task.host}': stock,
    }
    packages = ', '.join(f'{k} {v}' for k, v in facts['versions'].items())
    caption = (
        f'{task.caption.format(result["num_images"])}, one seed. ms per '
        f'image: one {result["image_size"]}x{result["image_size"]} image '
        f'{task.timed}, 1 thread, median of '
        f'{result["timed_images"]} after warm-up. {facts["machine"]}; '
        f'{minutes:.1f} minutes in all'
        f'{" (interrupted and resumed)" if facts["resumed"] else ""}; '
        f'{packages}.'
    )
    rows = table_rows(records, task)
    write_table(rows, task, caption, facts, work)
    for what in ('missing', 'unexpected'):
        if stock[what]:
            raise StageError(
                f'Stock {task.host} must load the ERA student without missing '
                f'and unexpected keys, but {what} are {stock[what][:5]}.'
            )
    heading = next(iter(task.metrics))
    (of_s,) = (row[heading] for row in rows if row[task.noun].endswith(', S'))
    if abs(100 * stock[heading] - of_s) > 0.1:
        raise StageError(
            f'Stock {task.host} must give mode S, {heading} {of_s:.1f}, but '
            f'gives {100 * stock[heading]:.1f}.'
        )
    console.print(
        f"Stock {task.host} loads the ERA student's checkpoint with the plain "
        f"student's config: no missing keys, no unexpected keys, {heading} "
        f'{100 * stock[heading]:.1f} (mode S above: {of_s:.1f}).',
        highlight=False,
        soft_wrap=True,
    )
