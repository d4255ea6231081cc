"""Collect what finished runs logged, and average it over seeds.

python -m dev.summarize_runs work_dirs/plain_s0 work_dirs/plain_s1 \
    --keys 'residual_kd_*' --out results/runs.jsonl
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from era_mm.errors import UserError
from era_mm.statistics import estimate


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'work_dirs', nargs='+', type=Path, help='work dirs of finished runs'
    )
    parser.add_argument(
        '--keys',
        nargs='+',
        default=[],
        metavar='PATTERN',
        help="logged values to keep beside the metrics, e.g. 'iekd_*': the "
        'first and the last of each, means over the log window',
    )
    parser.add_argument(
        '--out', type=Path, help='file of one JSON object per run'
    )
    return parser.parse_args(argv)


def read_run(work_dir: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """What a run logged.

    Args:
        work_dir: Work dir of an mmengine run, of training or of a test; of
            several runs in it the last counts.
        keys: Patterns of logged values.

    Returns:
        ``name``, ``config``, ``seed``, ``epochs``, ``metrics`` of the last
        evaluation in the order logged, and for each key its ``first`` and
        ``last`` value.

    Raises:
        UserError: No log, no config, no evaluation in the log, or a pattern
            that matches nothing.
    """
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    # What mmengine's LoggerHook leaves of a test.
    logs = logs or sorted(work_dir.glob('*/*.json'))
    configs = sorted(work_dir.glob('*.py'))
    if not logs or len(configs) != 1:
        raise UserError(
            f'{work_dir}: expected the work dir of one run, with one config '
            f'and a log, but found {len(configs)} configs and {len(logs)} '
            'logs.'
        )
    records = [json.loads(line) for line in logs[-1].open()]
    # Only evaluations have metrics, and only metrics have a prefix.
    metrics = [
        {key: value for key, value in record.items() if '/' in key}
        for record in records
    ]
    metrics = [record for record in metrics if record]
    if not metrics:
        raise UserError(
            f'{logs[-1]}: expected an evaluation in the log, but there is '
            'none. Did the run finish?'
        )
    values: dict[str, dict[str, float]] = {}
    for pattern in keys:
        found = {
            key
            for record in records
            for key in record
            if fnmatchcase(key, pattern)
        }
        if not found:
            raise UserError(
                f'{logs[-1]}: nothing logged matches {pattern!r}. Logged: '
                f'{", ".join(sorted({k for r in records for k in r}))}.'
            )
        for key in sorted(found):
            series = [record[key] for record in records if key in record]
            values[key] = dict(first=series[0], last=series[-1])
    cfg = Config.fromfile(configs[0])
    return dict(
        name=work_dir.name,
        config=configs[0].stem,
        seed=cfg.get('randomness', {}).get('seed'),
        epochs=cfg.train_cfg.get('max_epochs'),
        metrics=metrics[-1],
        values=values,
    )


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """Mean and interval of each metric and value, by config and epochs."""
    groups: dict[tuple, list] = {}
    for run in runs:
        groups.setdefault((run['config'], run['epochs']), []).append(run)
    result = Table('config', 'epochs', 'runs', 'what', 'mean', '+-')
    for (config, epochs), group in groups.items():
        rows = {
            key: [run['metrics'].get(key) for run in group]
            for key in group[0]['metrics']
        }
        for key in group[0]['values']:
            for end in ('first', 'last'):
                rows[f'{key} ({end})'] = [
                    run['values'][key][end] for run in group
                ]
        for key, values in rows.items():
            if None in values:
                continue
            mean, half, _ = estimate(values)
            result.add_row(
                config,
                str(epochs),
                str(len(group)),
                key,
                f'{mean:.4f}',
                '' if half is None else f'{half:.4f}',
            )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool."""
    args = parse_args(argv)
    try:
        runs = [read_run(path, args.keys) for path in args.work_dirs]
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    Console().print(table(runs))
    if args.out:
        text = ''.join(json.dumps(run) + '\n' for run in runs)
        part = args.out.with_name(f'{args.out.name}.part')
        part.write_text(text)
        part.replace(args.out)
    return 0


if __name__ == '__main__':
    sys.exit(main())
