"""Writes docs/gpu.md from what `dev/gpu.sh measure` has left.

python -m dev.gpu_page [results/gpu]
"""

import itertools
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
#: What `dev/gpu.sh measure` measures.
CONFIGS = (
    'era_retinanet_r101_r50',
    'era_gfl_r101_r50',
    'era_faster_rcnn_r101_r50',
)
#: Kernels of the profile that are shown.
SHOWN = 15
#: Length of a kernel's name.
NAME = 60

INTRO = """\
# On a GPU

Written by `python -m dev.gpu_page` from `results/gpu/`, which
`dev/gpu.sh measure` writes on a machine with a GPU. What was not run is shown
as such.
"""
SETTINGS = """\
## What a step costs

ERA as configured, 800 x 1333, random weights and images, measured as in
[benchmark.md](benchmark.md): `a` is the plain student's step, `b` the
teacher's forward pass, the ratio is that of ERA's step to `a + b`, the median
of {iters} rounds with the 10th and 90th percentile. Full precision is torch's
default: TF32 in convolutions. Memory is the peak of a step; its ratio is to
the plain step's, plus the teacher, its features and what ERA trains.
"""
VARIANTS = """\
## The same step, computed in other ways

Side by side in one process. All ratios of a table are to the same `a + b`:
the plain student and the teacher as shipped. 'as shipped' is the default; the
others are what a change would gain.
"""
PROFILE = """\
## Where the time goes

Per step, on the GPU: the sum of the times of the kernels. Teacher and
distiller are the kernels of their forward passes; backward passes are in
neither. Where the sum is far below the time of the step, the GPU waits for the
CPU.
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
    records = [
        json.loads(file.read_text()) for file in sorted(folder.glob('*.json'))
    ]
    yield from _machine(folder, records)

    def of(*stages: str) -> list[dict[str, Any]]:
        return [record for record in records if record['stage'] in stages]

    settings = of('settings')
    if settings:
        yield SETTINGS.format(iters=settings[0]['setting']['iters'])
        yield _table(
            ['config', 'batch', 'precision', 'a, ms', 'b, ms', 'ERA, ms']
            + ['ratio', 'GiB', 'ratio'],
            _setting_rows(settings),
        )
        yield ''
    for title, found, part in (
        (VARIANTS, of('variants', 'compiled'), _variants),
        (PROFILE, of('profile'), _profile),
    ):
        if found:
            yield title
        for record in found:
            yield from part(record)


def _variants(record: dict[str, Any]) -> Iterator[str]:
    yield f'{_about(record)}:'
    yield ''
    plain = {
        name.removesuffix('_ms').replace('_', ', ', 1): values['median']
        for name, values in record.items()
        if name in ('plain_ms', 'plain_channels_last_ms')
    }
    yield _table(
        ['step', 'ms', 'to a + b', 'its teacher, ms'],
        [
            *([name, f'{value:.1f}', '', ''] for name, value in plain.items()),
            *(
                [
                    variant['name'],
                    f'{variant["step_ms"]["median"]:.1f}',
                    _spread(variant['ratio']),
                    f'{variant["own_teacher_ms"]["median"]:.1f}',
                ]
                for variant in record['variants']
            ),
        ],
    )
    yield ''


def _machine(folder: Path, records: Sequence[dict[str, Any]]) -> Iterator[str]:
    for name in dict.fromkeys(
        record['machine'].get('gpu', record['machine']['cpu'])
        for record in records
    ):
        yield f'- {name}'
    for versions in dict.fromkeys(
        ', '.join(f'{k} {v}' for k, v in record['versions'].items())
        for record in records
    ):
        yield f'- {versions}'
    commits = dict.fromkeys(record['commit'] for record in records)
    yield f'- commit {", ".join(commits)}'
    tests = folder / 'tests.txt'
    if tests.exists():
        last = tests.read_text().strip('= \n')
        yield f'- `pytest -m gpu tests/test_gpu.py`: {last}'
    yield ''


def _about(record: dict[str, Any]) -> str:
    setting = record['setting']
    precision = 'mixed' if setting['amp'] else 'full'
    return (
        f'`{record["config"]}`, batch {setting["batch_size"]}, {precision} '
        'precision'
    )


def _setting_rows(records: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """A row for each setting of `dev/gpu.sh`, measured or not."""
    found = {
        (
            record['distillers'][0]['config'],
            record['setting']['batch_size'],
            record['setting']['amp'],
        ): record
        for record in records
    }
    for config, batch, amp in itertools.product(
        CONFIGS, (2, 8), (False, True)
    ):
        name = 'mixed' if amp else 'full'
        record = found.get((config, batch, amp))
        values = ['not run', *[''] * 5]
        if record is not None:
            values = _setting_values(record)
        yield [config, str(batch), name, *values]


def _setting_values(record: dict[str, Any]) -> list[str]:
    entry = record['distillers'][0]
    return [
        f'{record["plain"]["step_ms"]["median"]:.1f}',
        f'{entry["teacher_ms"]["median"]:.1f}',
        f'{entry["step_ms"]["median"]:.1f}',
        _spread(entry['ratio']),
        f'{entry["memory"]["peak"] / GIB:.2f}',
        f'{entry["memory"]["ratio"]:.3f}',
    ]


def _profile(record: dict[str, Any]) -> Iterator[str]:
    plain, era = record['plain'], record['era']
    parts = ', '.join(f'{k} {v:.1f}' for k, v in era['parts'].items())
    own = ', '.join(
        f'{whose} {found["kernels_ms"]:.1f} ms in {found["launches"]:.0f} '
        'launches'
        for whose, found in (('the plain step', plain), ('ERA', era))
    )
    yield (f'{_about(record)}. Kernels: {own}. Of ERA, ms: {parts}.')
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
