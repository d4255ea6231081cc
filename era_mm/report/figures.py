"""Curves and bars of a comparison, as Plotly's own JSON.

Every figure has a text with the same content for those who cannot see it, and
a line on how to read it. The page's script sets the colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from .comparison import Comparison, Group
from .runs import Run, Series

#: Colours that the colour-blind can tell apart, on white and on near-black
#: (after Okabe and Ito, two of them darker). Lines also differ by dashes and
#: symbols.
COLOURS = (
    '#0072b2',
    '#009e73',
    '#c4689b',
    '#d08700',
    '#3b9bd9',
    '#8c6bb1',
    '#7a7a00',
    '#b15928',
)
PLAIN_COLOUR = '#d55e00'
TEACHER_COLOUR = '#888888'
DASHES = ('solid', 'dash', 'dot', 'dashdot', 'longdash', 'longdashdot')
PATTERNS = ('', '/', '\\', 'x', '-', '|')
SYMBOLS = ('circle', 'square', 'diamond', 'triangle-up', 'cross', 'x')
#: Maximum number of points of a curve; more are averaged.
MOST_POINTS = 300
SIZES = {
    'coco/bbox_mAP_s': 'AP, small objects',
    'coco/bbox_mAP_m': 'AP, medium objects',
    'coco/bbox_mAP_l': 'AP, large objects',
    'coco/bbox_mAP_50': 'AP at IoU 0.5',
    'coco/bbox_mAP_75': 'AP at IoU 0.75',
}


@dataclass
class Table:
    """What a figure shows, in numbers."""

    head: list[str]
    rows: list[list[str]]


@dataclass
class Figure:
    """One figure of the page.

    Args:
        name: Of the element on the page.
        title: Above it.
        data: Plotly's traces.
        layout: Plotly's layout.
        alt: What it shows, in words and numbers.
        reading: How to read it.
        table: Its numbers.
        small: One of many of its kind, shown small.
    """

    name: str
    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    alt: str
    reading: str = ''
    table: Table | None = None
    small: bool = False


@dataclass
class Style:
    """How one model and mode is drawn in every figure."""

    colour: str
    dash: str
    symbol: str


@dataclass
class Look:
    """Styles of all lines of a comparison, by group and mode."""

    comparison: Comparison
    styles: dict[tuple[str, str], Style] = field(default_factory=dict)

    def __post_init__(self) -> None:
        colours = iter(COLOURS * 8)
        number = 0
        for group in self.comparison.groups:
            for mode in group.modes:
                if group.role == 'teacher':
                    style = Style(TEACHER_COLOUR, 'dash', 'star')
                elif group is self.comparison.plain:
                    style = Style(PLAIN_COLOUR, 'solid', 'square-open')
                else:
                    style = Style(
                        next(colours),
                        DASHES[number % len(DASHES)],
                        SYMBOLS[number % len(SYMBOLS)],
                    )
                    number += 1
                self.styles[group.name, mode] = style

    def of(self, group: Group, mode: str = '') -> Style:
        """Of a group's mode."""
        return self.styles[group.name, mode]


def label_of(group: Group, mode: str = '') -> str:
    """What a line is called: 'era', 'era T'."""
    if mode:
        return f'{group.name} {mode}'
    return f'{group.name} S' if group.modes != [''] else group.name


def colour_with(colour: str, alpha: float) -> str:
    """A hex colour that lets through what is below."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f'rgba({red},{green},{blue},{alpha})'


def across_seeds(
    many: Iterable[Series],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, means, lowest and highest over some runs' series.

    A step counts where at least one run has a finite value there.
    """
    values: dict[float, list[float]] = {}
    for series in many:
        for step, value in series:
            if math.isfinite(value):
                values.setdefault(step, []).append(value)
    steps = sorted(values)
    size = max(1, math.ceil(len(steps) / MOST_POINTS))
    out: tuple[list, list, list, list] = ([], [], [], [])
    for start in range(0, len(steps), size):
        some = steps[start : start + size]
        out[0].append(some[-1])
        out[1].append(fmean(fmean(values[step]) for step in some))
        out[2].append(fmean(min(values[step]) for step in some))
        out[3].append(fmean(max(values[step]) for step in some))
    return out


def line_with_band(
    name: str,
    many: Sequence[Series],
    style: Style,
    factor: float = 1.0,
    markers: bool = True,
    **more: Any,
) -> list[dict[str, Any]]:
    """The mean of some runs as a line, their range as a band behind it."""
    steps, mean, low, high = across_seeds(many)
    if not steps:
        return []
    mean, low, high = (
        [rounded(factor * value) for value in column]
        for column in (mean, low, high)
    )
    traces = []
    if sum(1 for series in many if series) > 1:
        traces.append(
            dict(
                type='scatter',
                x=steps + steps[::-1],
                y=high + low[::-1],
                fill='toself',
                fillcolor=colour_with(style.colour, 0.18),
                line=dict(width=0),
                mode='lines',
                hoverinfo='skip',
                showlegend=False,
                legendgroup=name,
                **more,
            )
        )
    few = len(steps) <= 30 and markers
    traces.append(
        dict(
            type='scatter',
            x=steps,
            y=mean,
            name=name,
            legendgroup=name,
            mode='lines+markers' if few else 'lines',
            line=dict(color=style.colour, dash=style.dash, width=2),
            marker=dict(symbol=style.symbol, size=8, color=style.colour),
            **more,
        )
    )
    return traces


def rounded(value: float) -> float:
    return float(f'{value:.5g}')


def series_of(runs: Sequence[Run], table: str, key: str) -> list[Series]:
    return [getattr(run, table).get(key, []) for run in runs]


def step_name(runs: Sequence[Run]) -> str:
    return 'epoch' if all(run.by_epoch for run in runs) else 'iteration'


def metric_over_time(comparison: Comparison, look: Look) -> Figure | None:
    """The metric in validation, or at the end where it was taken once."""
    key = comparison.metric
    entries = []
    for group in comparison.groups:
        for mode in group.modes:
            many = series_of(
                group.runs, 'val', f'{mode}/{key}' if mode else key
            )
            if any(many):
                entries.append((group, mode, many))
    if not entries:
        return None
    rows = []
    for group, mode, _ in entries:
        lasts = group.lasts(key, mode)
        bests = [b for r in group.runs if (b := r.best(key, mode))]
        rows.append(
            [
                label_of(group, mode),
                show(comparison.percent * fmean(lasts)),
                'one run'
                if len(lasts) == 1
                else show(comparison.percent * stdev(lasts)),
                str(len(lasts)),
                show(comparison.percent * fmean(value for _, value in bests)),
                ', '.join(f'{step:g}' for step, _ in bests),
            ]
        )
    step = step_name(comparison.runs)
    table = Table(
        [
            'model',
            f'last {comparison.metric_name}',
            'deviation over seeds',
            'seeds',
            'best',
            f'{step} of the best',
        ],
        rows,
    )
    said = '; '.join(f'{row[0]} {row[1]}' for row in rows)
    if all(len({s for s, _ in x}) <= 1 for _, _, m in entries for x in m):
        return _metric_at_end(comparison, look, entries, table, said)
    data: list[dict] = []
    for group, mode, many in entries:
        data += line_with_band(
            label_of(group, mode),
            many,
            look.of(group, mode),
            comparison.percent,
        )
    return Figure(
        'metric',
        f'{comparison.metric_name} over time',
        data,
        axes_of(step, f'{comparison.metric_name} in validation'),
        f'{comparison.metric_name} over the run, a line for each model. '
        f'At the end: {said}.',
        'A line is the mean over the seeds, its band their range. S is what '
        "is deployed; E0, T and ST need the teacher's head. If a distilled "
        'line is below plain from the first epochs on, the distillation '
        'works against the task.',
        table,
    )


def _metric_at_end(
    comparison: Comparison,
    look: Look,
    entries: Sequence[tuple[Group, str, list[Series]]],
    table: Table,
    said: str,
) -> Figure:
    data = []
    for group, mode, many in entries:
        name = label_of(group, mode)
        style = look.of(group, mode)
        values = [comparison.percent * s[-1][1] for s in many if s]
        data.append(
            dict(
                type='scatter',
                mode='markers',
                x=[rounded(value) for value in values],
                y=[name] * len(values),
                name=name,
                text=[r.name for r, s in zip(group.runs, many) if s],  # noqa: B905
                hovertemplate='%{text}: %{x}<extra></extra>',
                marker=dict(
                    symbol=style.symbol,
                    size=11,
                    color=style.colour,
                    opacity=0.8,
                    line=dict(width=1),
                ),
            )
        )
    layout = axes_of(f'{comparison.metric_name} in validation', '')
    layout['yaxis'] = dict(autorange='reversed', automargin=True)
    layout['showlegend'] = False
    layout['height'] = 120 + 34 * len(entries)
    return Figure(
        'metric',
        f'{comparison.metric_name} at the end',
        data,
        layout,
        f'{comparison.metric_name} at the end of the runs, a mark for each '
        f'seed. Means: {said}.',
        'A mark is one seed. These runs were validated once, at their end; '
        'with a smaller train_cfg.val_interval this becomes a curve.',
        table,
    )


def size_differences(comparison: Comparison, look: Look) -> Figure | None:
    """Differences to plain by part of the metric, sorted."""
    entries = []
    for group in comparison.distilled:
        for mode in group.modes:
            for key, name in SIZES.items():
                found = comparison.differences(group, key, mode)
                if found:
                    entries.append((group, mode, name, found))
    return _difference_figure(
        comparison,
        look,
        entries,
        'sizes',
        'Where it gained: sizes and overlaps',
        'Difference in AP to the plain student of the same seed, in points. '
        'Whiskers show the range over the seeds. Small: below 32 x 32 '
        'pixels; large: above 96 x 96.',
    )


def class_differences(
    comparison: Comparison,
    look: Look,
    classes: Sequence[tuple[str, dict[str, float], dict[str, float]]],
    number: int,
    what: str,
) -> Figure | None:
    """Differences to plain by class, sorted.

    Args:
        comparison: The runs.
        look: Their styles.
        classes: A subject's name, plain's values by class and its own.
        number: Number of images.
        what: Name of the values: 'AP', 'accuracy'.
    """
    by_name = {
        f'{group.name}, {mode}' if mode else group.name: (group, mode)
        for group in comparison.groups
        for mode in group.modes
    }
    entries = []
    for model, plain, own in classes:
        group, mode = by_name[model]
        for name, value in own.items():
            if name in plain and not math.isnan(value - plain[name]):
                difference = (value - plain[name]) / comparison.percent
                entries.append((group, mode, name, [difference]))
    figure = _difference_figure(
        comparison,
        look,
        entries,
        'classes',
        f'Where it gained: classes ({number} images)',
        f'Difference in {what} to the plain student on {number} val images, '
        'in points, for one seed each. Values are rough for classes with few '
        'objects.',
    )
    if figure is not None and len({e[2] for e in entries}) > 40:
        # The most gained and the most lost; the table has them all.
        for trace in figure.data:
            trace['x'] = trace['x'][:20] + trace['x'][-20:]
            trace['y'] = trace['y'][:20] + trace['y'][-20:]
        figure.layout['height'] = 820
        figure.reading += ' Shown are the 20 largest gains and losses.'
    return figure


def _difference_figure(
    comparison: Comparison,
    look: Look,
    entries: Sequence[tuple[Group, str, str, list[float]]],
    name: str,
    title: str,
    reading: str,
) -> Figure | None:
    if not entries:
        return None
    percent = comparison.percent
    # Sorted by the first model's mean, the most gained on top.
    first = entries[0][:2]
    order = sorted(
        dict.fromkeys(entry[2] for entry in entries),
        key=lambda part: (
            -max(
                (
                    fmean(found)
                    for group, mode, key, found in entries
                    if key == part and (group, mode) == first
                ),
                default=-math.inf,
            )
        ),
    )
    lines: dict[tuple[str, str], dict[str, list[float]]] = {}
    groups = {}
    for group, mode, part, found in entries:
        groups[group.name] = group
        lines.setdefault((group.name, mode), {})[part] = [
            percent * value for value in found
        ]
    data: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    for (group_name, mode), parts in lines.items():
        group = groups[group_name]
        style = look.of(group, mode)
        shown = [part for part in order if part in parts]
        means = [rounded(fmean(parts[part])) for part in shown]
        trace: dict[str, Any] = dict(
            type='bar',
            orientation='h',
            name=label_of(group, mode),
            x=means,
            y=shown,
            marker=dict(
                color=style.colour,
                pattern=dict(shape=PATTERNS[len(data) % len(PATTERNS)]),
            ),
        )
        if any(len(parts[part]) > 1 for part in shown):
            trace['error_x'] = dict(
                type='data',
                symmetric=False,
                array=[
                    rounded(max(parts[p]) - m)
                    for p, m in zip(shown, means, strict=True)
                ],
                arrayminus=[
                    rounded(m - min(parts[p]))
                    for p, m in zip(shown, means, strict=True)
                ],
                color=TEACHER_COLOUR,
                thickness=1.5,
            )
        data.append(trace)
        rows += [
            [
                label_of(group, mode),
                part,
                f'{mean:+.1f}',
                str(len(parts[part])),
            ]
            for part, mean in zip(shown, means, strict=True)
        ]
    layout = axes_of('difference to plain, points', '')
    layout['xaxis'].update(zeroline=True, zerolinewidth=2)
    layout['yaxis'] = dict(
        autorange='reversed',
        automargin=True,
        type='category',
        categoryorder='array',
        categoryarray=order,
    )
    layout['height'] = 150 + max(24, 14 * len(lines)) * len(order)
    said = '; '.join(' '.join(row[:3]) for row in rows[:8])
    return Figure(
        name,
        title,
        data,
        layout,
        f'Differences to the plain student, sorted. {said}'
        + ('; and more in the table.' if len(rows) > 8 else '.'),
        reading,
        Table(['model', 'part', 'points', 'seeds'], rows),
    )


def loss_terms(comparison: Comparison, look: Look) -> list[Figure]:
    """One small figure for each loss of the log."""
    keys: dict[str, None] = {}
    for run in comparison.runs:
        for key in run.train:
            last = key.split('.')[-1]
            if last.startswith(('loss', 'grad_norm')) or last == 'pretrain':
                keys[key] = None
    figures: list[Figure] = []
    for key in keys:
        data: list[dict] = []
        ends = []
        for group in comparison.groups:
            many = series_of(group.runs, 'train', key)
            if not any(many):
                continue
            data += line_with_band(
                group.name, many, look.of(group), markers=False
            )
            lasts = [s[-1][1] for s in many if s]
            ends.append(f'{group.name} {fmean(lasts):.3g}')
        layout = axes_of('iteration', '')
        values = [y for trace in data for y in trace['y']]
        if values and min(values) > 0:
            layout['yaxis'].update(type='log', **ticks_of(values))
        layout['height'] = 230
        layout['showlegend'] = len(ends) > 1
        figures.append(
            Figure(
                f'loss-{len(figures)}',
                key,
                data,
                layout,
                f'{key} over the iterations. At the end: {", ".join(ends)}.',
                small=True,
            )
        )
    return figures


def ticks_of(values: Sequence[float]) -> dict[str, list]:
    """Ticks of a logarithmic axis that can be read by themselves."""
    low = math.floor(math.log10(min(values)))
    high = math.ceil(math.log10(max(values)))
    for steps in ((1, 2, 5), (1,)):
        ticks = [
            step * 10.0**power
            for power in range(low, high + 1)
            for step in steps
            if min(values) / 1.3 <= step * 10.0**power <= max(values) * 1.3
        ]
        if len(ticks) <= 7:
            break
    return dict(tickvals=ticks, ticktext=[f'{tick:g}' for tick in ticks])


def show(value: float | None, digits: int = 1) -> str:
    """A number as tables show it."""
    return '' if value is None else f'{value:.{digits}f}'


def axes_of(x: str, y: str) -> dict[str, Any]:
    return dict(
        xaxis=dict(title=dict(text=x), automargin=True),
        yaxis=dict(title=dict(text=y), automargin=True),
        height=380,
        margin=dict(l=10, r=10, t=20, b=10),
        legend=dict(orientation='h', y=1.02, yanchor='bottom', x=0),
        hovermode='closest',
    )
