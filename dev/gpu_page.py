"""Writes docs/gpu.md from what `dev/gpu.sh measure` has left.

python -m dev.gpu_page [results/gpu]
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from terminaltables import GithubFlavoredMarkdownTable

from era_mm.engine.whole_files import write_whole

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
#: Kernels of the profile that are shown.
SHOWN = 15
#: Length of a kernel's name.
NAME = 60

INTRO = """\
# On a GPU

Written by `python -m dev.gpu_page` from `results/gpu/`, which
`dev/gpu.sh measure` writes on a machine with a GPU.
"""
SETTINGS = """\
## What a step costs

ERA as configured, 800 x 1333, random weights and images, measured as in
[benchmark.md](benchmark.md): `a` is the plain student's step, `b` the teacher's
forward pass, the ratio is that of ERA's step to `a + b`, the median of
{iters} rounds with the 10th and 90th percentile. Full precision is torch's
default: TF32 in convolutions. Memory is the peak of a step; its ratio is to the
plain step's, plus the teacher, its features and what ERA trains.
"""
VARIANTS = """\
## The same step, computed in other ways

{config}, batch {batch_size}. All ratios are to the same `a + b`: plain student and
the teacher as shipped. A row is what would be gained by the change; only the
first is the default.
"""
PROFILE = """\
## Where the time goes

{config}, batch {batch_size}, per step. Kernels: the sum of their times on the
GPU. The distiller's part is its forward pass, on the CPU's clock; backward passes
are in no part.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit status."""
    folder = Path(*(argv or sys.argv[1:]) or [ROOT / 'results/gpu'])
    write_whole(ROOT / 'docs/gpu.md', page(folder).encode())
    return 0


def page(folder: Path) -> str:
    """The page's text.

    Args:
        folder: Of the files of `dev/gpu.sh measure`; those that are missing
            are left out.
    """
    return '\n'.join(_lines(folder)) + '\n'


def _lines(folder: Path) -> Iterator[str]:
    yield INTRO
    found = {
        file.stem: json.loads(file.read_text())
        for file in sorted(folder.glob('*.json'))
    }
    settings = [
        record
        for part in found.values()
        if part['stage'] == 'settings'
        for record in part['records']
    ]
    first = (
        settings or [r for part in found.values() for r in part['records']]
    )[0]
    yield from _machine(folder, first)
    if settings:
        yield SETTINGS.format(iters=first['setting']['iters'])
        yield _table(
            ['config', 'batch', 'precision', 'a, ms', 'b, ms', 'ERA, ms']
            + ['ratio', 'GiB', 'ratio'],
            map(_setting_row, settings),
        )
        yield ''
    variants = [
        found[name] for name in ('variants', 'compiled') if name in found
    ]
    if variants:
        yield VARIANTS.format(**_about(variants[0]))
        rows: dict[str, list[str]] = {}
        for part in variants:
            for record in part['records']:
                for variant in record['variants']:
                    name = variant['name']
                    if part['stage'] == 'compiled':
                        name += ' (with the compiled)'
                    rows.setdefault(name, []).extend(
                        [
                            f'{variant["step_ms"]["median"]:.1f}',
                            _spread(variant['ratio']),
                        ]
                    )
        yield _table(
            ['step', 'full, ms', 'ratio', 'mixed, ms', 'ratio'],
            ([name, *values] for name, values in rows.items()),
        )
        yield ''
    if 'profile' in found:
        yield PROFILE.format(**_about(found['profile']))
        for record in found['profile']['records']:
            yield from _profile(record)


def _machine(folder: Path, record: dict[str, Any]) -> Iterator[str]:
    machine, versions = record['machine'], record['versions']
    yield f'- {machine.get("gpu", machine["cpu"])}'
    yield '- ' + ', '.join(f'{k} {v}' for k, v in versions.items())
    log = folder / 'tests.log'
    if log.exists():
        last = log.read_text().strip().splitlines()[-1]
        yield f'- `pytest -m gpu tests/test_gpu.py`: {last.strip("= ")}'
    yield ''


def _about(part: dict[str, Any]) -> dict[str, Any]:
    record = part['records'][0]
    return dict(record['setting'], config=f'`{record["config"]}`')


def _setting_row(record: dict[str, Any]) -> list[str]:
    setting, entry = record['setting'], record['distillers'][0]
    return [
        entry['config'],
        str(setting['batch_size']),
        'mixed' if setting['amp'] else 'full',
        f'{record["plain"]["step_ms"]["median"]:.1f}',
        f'{entry["teacher_ms"]["median"]:.1f}',
        f'{entry["step_ms"]["median"]:.1f}',
        _spread(entry['ratio']),
        f'{entry["memory"]["peak"] / GIB:.2f}',
        f'{entry["memory"]["ratio"]:.3f}',
    ]


def _profile(record: dict[str, Any]) -> Iterator[str]:
    plain, era = record['plain'], record['era']
    name = 'Mixed' if record['setting']['amp'] else 'Full'
    parts = ', '.join(f'{k} {v:.1f}' for k, v in era['parts'].items())
    yield (
        f'{name} precision: kernels of the plain step {plain["kernels_ms"]:.1f} '
        f"ms in {plain['launches']:.0f} launches, of ERA's "
        f'{era["kernels_ms"]:.1f} ms in {era["launches"]:.0f}; on the CPU, in '
        f'ms: {parts}.'
    )
    yield ''
    theirs = {kernel['name']: kernel for kernel in plain['kernels']}
    yield _table(
        ['kernel', 'ERA, ms', 'calls', 'plain, ms', 'calls'],
        (
            [
                _short(kernel['name']),
                f'{kernel["ms"]:.2f}',
                f'{kernel["calls"]:.0f}',
                *_of_plain(theirs.get(kernel['name'])),
            ]
            for kernel in era['kernels'][:SHOWN]
        ),
    )
    yield ''


def _of_plain(kernel: dict[str, Any] | None) -> list[str]:
    if kernel is None:
        return ['', '']
    return [f'{kernel["ms"]:.2f}', f'{kernel["calls"]:.0f}']


def _short(name: str) -> str:
    name = re.sub(r'^void |at::native::|\(anonymous namespace\)::', '', name)
    name = name.replace('|', '/').replace('<', '(').replace('>', ')')
    return f'`{name[:NAME]}`'


def _spread(values: dict[str, float]) -> str:
    return (
        f'{values["median"]:.3f} ({values["p10"]:.3f} to {values["p90"]:.3f})'
    )


def _table(head: list[str], rows: Any) -> str:
    return str(GithubFlavoredMarkdownTable([head, *rows]).table)


if __name__ == '__main__':
    sys.exit(main())
