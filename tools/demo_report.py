"""The demo's table, and what it was measured on."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from demo_stages import StageError, console, write_json
from rich.table import Table

PACKAGES = (
    'torch',
    'onedl-mmengine',
    'onedl-mmcv',
    'onedl-mmdetection',
    'mmengine',
    'mmcv',
    'mmdet',
    'era_mm',
)


def versions() -> dict[str, str]:
    """What is installed."""
    found = {'python': platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine() -> str:
    """CPU model and cores."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                model = line.split(':', 1)[1].strip()
                break
    return f'{model}, {os.cpu_count()} cores'


def table_rows(records: dict[str, dict]) -> list[dict]:
    """One row per detector, in the table's order."""
    measured = records['measure']['result']['variants']
    rows = []
    for key, name, test, prefix in (
        ('teacher', 'teacher', 'test_teacher', ''),
        ('plain', 'plain student', 'test_plain', ''),
        ('era_S', 'ERA student, S', 'test_era', ''),
        ('era_T', 'ERA student, T', 'test_era', 'T/'),
        ('era_ST', 'ERA student, ST', 'test_era', 'ST/'),
    ):
        metrics = records[test]['result']
        # mmdet reports nothing where nothing was detected.
        ap, ap50 = (
            round(100 * metrics.get(f'{prefix}coco/bbox_{key}', 0.0), 1)
            for key in ('mAP', 'mAP_50')
        )
        rows.append(
            {
                'detector': name,
                'AP': ap,
                'AP50': ap50,
                'parameters': measured[key]['parameters'],
                'ms_per_image': round(measured[key]['ms_per_image'], 1),
            }
        )
    return rows


def write_table(
    rows: Sequence[dict], caption: str, facts: dict, work: Path
) -> None:
    """Print the table and write it as JSON and Markdown."""
    headings = ('detector', 'AP', 'AP50', 'parameters', 'ms per image')
    cells = [
        (
            row['detector'],
            f'{row["AP"]:.1f}',
            f'{row["AP50"]:.1f}',
            f'{row["parameters"] / 1e6:.2f} M',
            f'{row["ms_per_image"]:.1f}',
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
    table = Table(caption=caption, caption_justify='left')
    for number, heading in enumerate(headings):
        table.add_column(heading, justify='right' if number else 'left')
    for line in cells:
        table.add_row(*line)
    console.print(table)


def report(records: dict[str, dict], work: Path) -> None:
    """The table, the picture and the stock loading."""
    result = records['measure']['result']
    minutes = sum(record['seconds'] for record in records.values()) / 60
    facts = {
        'machine': machine(),
        'versions': versions(),
        'minutes': round(minutes, 1),
        'resumed': any(record['resumed'] for record in records.values()),
        'seconds': {
            name: round(record['seconds']) for name, record in records.items()
        },
        'num_test_images': result['num_images'],
        'stock_mmdet': result['stock'],
    }
    packages = ', '.join(f'{k} {v}' for k, v in facts['versions'].items())
    caption = (
        f'COCO AP on the {result["num_images"]} test scenes, one seed. ms per '
        f'image: one {result["image_size"]}x{result["image_size"]} image '
        'from pixels to boxes, 1 thread, median of '
        f'{result["timed_images"]} after warm-up. {facts["machine"]}; '
        f'{minutes:.1f} minutes in all'
        f'{" (interrupted and resumed)" if facts["resumed"] else ""}; '
        f'{packages}.'
    )
    rows = table_rows(records)
    write_table(rows, caption, facts, work)
    stock = result['stock']
    for what in ('missing', 'unexpected'):
        if stock[what]:
            raise StageError(
                'Stock mmdet must load the ERA student without missing and '
                f'unexpected keys, but {what} are {stock[what][:5]}.'
            )
    console.print(
        "Stock mmdet loads the ERA student's checkpoint with the plain "
        "student's config: no missing keys, no unexpected keys, AP "
        f'{100 * stock["AP"]:.1f} (mode S above: {rows[2]["AP"]:.1f}).',
        highlight=False,
        soft_wrap=True,
    )
    for name in ('table.md', 'table.json', 'detections.png'):
        console.print(f'{work / name}', highlight=False)
