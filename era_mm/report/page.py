"""Writes the page, which needs no network.

Read in this order: `summarise`, `cards`, `runs_table`, `render`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from era_mm.errors import UserError
from era_mm.statistics import estimate
from era_mm.version import __version__

from .comparison import Comparison, Group
from .figures import Figure, Table, label_of, show
from .panel_parts import Found

TEMPLATES = Path(__file__).with_name('template')
INSTALL = "Install it with `pip install 'era_mm[report]'`."


def summarise(comparison: Comparison, found: Found) -> dict[str, Any]:
    """The summary at the top of the page, as plain numbers.

    Args:
        comparison: The runs.
        found: Results from weights and data.

    Returns:
        ``metric``; ``rows``, one for each model and mode; ``headline``;
        ``missing``. The page has it as JSON and as a table.
    """
    key, percent = comparison.metric, comparison.percent
    tested = any(run.test for run in comparison.runs)
    rows = []
    for group in comparison.groups:
        for mode in group.modes:
            row: dict[str, Any] = {
                'model': label_of(group, mode),
                'role': group.role,
                'seeds': len(group.runs),
            }
            values = {'val': group.lasts(key, mode)}
            if tested:
                values['test'] = group.tests(key, mode)
            for split, numbers in values.items():
                row[split] = (
                    round(percent * fmean(numbers), 2) if numbers else None
                )
                row[f'{split}_deviation'] = (
                    round(percent * stdev(numbers), 2)
                    if len(numbers) > 1
                    else None
                )
                gains = (
                    comparison.differences(group, key, mode, split)
                    if group.role == 'distilled'
                    else []
                )
                more = (
                    estimate([percent * gain for gain in gains])
                    if gains
                    else None
                )
                row[f'{split}_gain'] = (
                    None if more is None else round(more.mean, 2)
                )
                row[f'{split}_interval'] = (
                    None
                    if more is None or more.interval is None
                    else [round(end, 2) for end in more.interval]
                )
            deployed = f'{group.name}, {mode}' if mode else group.name
            if deployed in found.deployed:
                row['parameters'], row['flops'] = found.deployed[deployed]
            if any(row[split] is not None for split in values) or not mode:
                rows.append(row)
    summary = {
        'metric': comparison.metric_name,
        'key': key,
        'splits': ['val', 'test'] if tested else ['val'],
        'rows': rows,
        'made': datetime.now().strftime('%Y-%m-%d %H:%M'),
        'era_mm': __version__,
    }
    summary['headline'] = _headline(comparison, summary)
    return summary


def _headline(comparison: Comparison, summary: dict) -> str:
    key, percent = comparison.metric, comparison.percent
    failed = [run for _, run in comparison.failed]
    best: tuple[float, str] | None = None
    for split in summary['splits'][::-1]:
        for group in comparison.distilled:
            name = label_of(group)
            row = next(r for r in summary['rows'] if r['model'] == name)
            if row.get(f'{split}_gain') is None:
                continue
            interval = row[f'{split}_interval']
            text = (
                f'{name} reaches {row[split]:.1f} {summary["metric"]} on '
                f'{split}, {row[f"{split}_gain"]:+.1f} to the plain student'
                + (
                    f' (95 % interval {interval[0]:+.1f} to '
                    f'{interval[1]:+.1f}, {row["seeds"]} seeds).'
                    if interval
                    else ' (one seed).'
                )
            )
            if failed:
                gains = [
                    percent * value
                    for value in comparison.differences(
                        group, key, of=split, without=failed
                    )
                ]
                names = ', '.join(run.name for run in failed)
                if gains:
                    kept = estimate(gains)
                    text += (
                        f' Without {names}, which failed: {kept.mean:+.1f}'
                        + (
                            ''
                            if kept.interval is None
                            else ' ({:+.1f} to {:+.1f})'.format(*kept.interval)
                        )
                        + '.'
                    )
            if best is None or row[f'{split}_gain'] > best[0]:
                best = (row[f'{split}_gain'], text)
        if best is not None:
            return best[1]
    if not comparison.distilled:
        return 'No distillation is among these runs.'
    if comparison.plain is None:
        return 'There is no plain run to compare with.'
    return (
        'The distillation and the plain run have no metric in common, so '
        'there is no difference to show.'
    )


def summary_table(summary: dict) -> Table:
    """The summary's rows, as text."""
    head = ['model']
    for split in summary['splits']:
        head += [f'{summary["metric"]}, {split}', f'to plain, {split}']
    head.append('seeds')
    counted = any('parameters' in row for row in summary['rows'])
    if counted:
        head += ['parameters', 'FLOPs']
    rows = []
    for row in summary['rows']:
        line = [row['model']]
        for split in summary['splits']:
            deviation = row[f'{split}_deviation']
            value = show(row[split])
            if deviation is not None:
                value += f' ± {deviation:.1f}'
            gain = row[f'{split}_gain']
            interval = row[f'{split}_interval']
            more = '' if gain is None else f'{gain:+.1f}'
            if interval:
                more += f' [{interval[0]:+.1f}, {interval[1]:+.1f}]'
            line += [value, more]
        line.append(str(row['seeds']))
        if counted:
            number = row.get('parameters')
            line += [
                '' if number is None else f'{number / 1e6:.2f} M',
                row.get('flops', ''),
            ]
        rows.append(line)
    return Table(head, rows)


def describe_model(config: dict) -> str:
    """Type, backbone and head in a few words."""
    parts = [str(config.get('type', 'unknown')).split('.')[-1]]
    backbone = config.get('backbone') or {}
    if backbone.get('type'):
        text = str(backbone['type']).split('.')[-1]
        for key in ('depth', 'arch', 'base_channels', 'widen_factor'):
            if isinstance(backbone.get(key), (int, float, str)):
                name = '' if key in ('depth', 'arch') else f'{key} '
                text += f', {name}{backbone[key]}'
        parts.append(text)
    return ': '.join(parts)


def cards(
    comparison: Comparison, found: Found
) -> list[tuple[Group, list[tuple[str, str]]]]:
    """A run card for each group: model, schedule, machine and cost."""
    plain = comparison.plain
    base = _median([r.seconds_per_iter for r in plain.runs]) if plain else None
    made = []
    for group in comparison.groups:
        run = group.runs[0]
        config = run.config or {}
        facts: list[tuple[str, str]] = []
        if run.is_distillation:
            facts.append(('method', ' + '.join(run.methods) or 'unknown'))
            teachers = run.teacher_checkpoints
            facts.append(('student', describe_model(run.student)))
            if teachers:
                facts.append(('teacher weights', ', '.join(teachers)))
        elif run.model:
            facts.append(('model', describe_model(run.model)))
        if run.length is not None:
            unit = 'epochs' if run.by_epoch else 'iterations'
            loader = config.get('train_dataloader') or {}
            optimizer = (config.get('optim_wrapper') or {}).get('optimizer')
            text = f'{run.length} {unit}'
            if loader.get('batch_size'):
                text += f', {loader["batch_size"]} images a step and rank'
            if optimizer:
                text += f', {optimizer.get("type")}'
                if optimizer.get('lr') is not None:
                    text += f' with rate {optimizer["lr"]:g}'
            facts.append(('schedule', text))
        seeds = [r.seed for r in group.runs]
        facts.append(
            (
                'seeds',
                ', '.join('not set' if s is None else str(s) for s in seeds),
            )
        )
        minutes = [r.seconds / 60 for r in group.runs if r.seconds]
        if minutes:
            facts.append(
                (
                    'minutes',
                    ', '.join(f'{value:.1f}' for value in minutes)
                    + ', evaluation included',
                )
            )
        step = _median([r.seconds_per_iter for r in group.runs])
        if step is not None:
            text = f'{1000 * step:.0f} ms an iteration (median)'
            if base and group.role == 'distilled':
                text += (
                    f', {step / base:.2f} times the plain run by the clock '
                    '(depends on the load of the machine)'
                )
            facts.append(('cost', text))
        if 'Cost of a step' in run.facts:
            facts.append(('by FLOPs', run.facts['Cost of a step']))
        if group.name in found.deployed:
            number, flops = found.deployed[group.name]
            facts.append(
                ('deployed', f'{number / 1e6:.2f} M parameters, {flops}')
            )
        facts += _machine(group)
        made.append((group, facts))
    return made


def _machine(group: Group) -> list[tuple[str, str]]:
    facts = group.runs[0].facts
    if 'Made with' in facts:
        return [('made with', facts['Made with'])]
    found = []
    gpus = [
        v
        for k, v in facts.items()
        if k.startswith('GPU ') and k != 'GPU number'
    ]
    if gpus:
        found.append(('machine', ', '.join(gpus)))
    elif facts.get('CUDA available') == 'False':
        found.append(('machine', 'a CPU (the log does not say which)'))
    versions = [
        f'{name} {facts[name].split(" (")[0]}'
        for name in ('Python', 'PyTorch', 'TorchVision', 'MMEngine')
        if name in facts
    ]
    if versions:
        found.append(('versions', ', '.join(versions)))
    return found


def _median(values: Sequence[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return median(kept) if kept else None


def runs_table(comparison: Comparison) -> Table:
    """Every run, each with the command that repeats it (last column)."""
    key, percent = comparison.metric, comparison.percent
    name = comparison.metric_name
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            last, best = run.last(key), run.best(key)
            test = run.test.get(key)
            step = run.seconds_per_iter
            rows.append(
                [
                    run.name,
                    group.name,
                    '' if run.seed is None else str(run.seed),
                    '' if run.length is None else str(run.length),
                    show(None if last is None else percent * last),
                    show(None if best is None else percent * best[1]),
                    show(None if test is None else percent * test),
                    show(None if run.seconds is None else run.seconds / 60),
                    show(None if step is None else 1000 * step, 0),
                    run.command,
                ]
            )
    return Table(
        [
            'run',
            'model',
            'seed',
            'epochs' if all(r.by_epoch for r in comparison.runs) else 'length',
            f'last {name}',
            f'best {name}',
            f'{name} on test',
            'minutes',
            'ms a step',
            'to repeat it',
        ],
        rows,
    )


def missing_of(comparison: Comparison, found: Found) -> list[str]:
    """Everything that is not on the page, and why."""
    lines = list(comparison.remarks)
    for run in comparison.runs:
        lines += [f'{run.name}: {remark}' for remark in run.remarks]
    return list(dict.fromkeys(lines + found.missing))


def read_measured(file: str | Path) -> tuple[Table, str]:
    """A demo's ``table.json`` as a table and a line below it.

    Raises:
        UserError: It is not such a file.
    """
    try:
        content = json.loads(Path(file).read_text())
        records = content['rows']
        head = list(records[0])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f'--table: expected the table.json of a demo, but {str(file)!r} '
            f'is none ({type(error).__name__}).'
        ) from None
    rows = [[str(record.get(key, '')) for key in head] for record in records]
    facts = [
        f'{content[key]} {word}'.strip()
        for key, word in (('machine', ''), ('minutes', 'minutes in all'))
        if key in content
    ]
    return Table([key.replace('_', ' ') for key in head], rows), '; '.join(
        facts
    )


def render(
    *,
    title: str,
    comparison: Comparison,
    found: Found,
    figures: dict[str, list[Figure]],
    measured: tuple[Table, str] | None = None,
) -> str:
    """The page as one text.

    Args:
        title: Its heading.
        comparison: The runs.
        found: What weights and data gave.
        figures: By section: 'metric', 'differences', 'losses', 'estimates'.
        measured: A further table and a line below it.

    Raises:
        UserError: jinja2 or plotly is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError(
            f'The page needs {error.name}, which is not installed. {INSTALL}'
        ) from None
    summary = summarise(comparison, found)
    summary['missing'] = missing_of(comparison, found)
    shown = [figure for group in figures.values() for figure in group]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template('page.html').render(
        title=title,
        summary=summary,
        summary_table=summary_table(summary),
        summary_json=as_script(summary),
        figures=figures,
        figures_json=as_script(
            {f.name: {'data': f.data, 'layout': f.layout} for f in shown}
        ),
        cards=cards(comparison, found),
        complaints=[
            (run.name, text)
            for run in comparison.runs
            for text in run.complaints
        ],
        runs=runs_table(comparison),
        found=found,
        measured=measured,
        css=(TEMPLATES / 'page.css').read_text(),
        js=(TEMPLATES / 'page.js').read_text(),
        plotly=get_plotlyjs(),
    )


def as_script(value: Any) -> str:
    """JSON that may stand in a script element of a page."""

    def plain(node: Any) -> Any:
        if isinstance(node, float) and not math.isfinite(node):
            return None
        if isinstance(node, dict):
            return {k: plain(v) for k, v in node.items()}
        if isinstance(node, (list, tuple)):
            return [plain(item) for item in node]
        return node

    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False)
    return text.replace('<', '\\u003c').replace('&', '\\u0026')
