"""Figures of the unexplained shares."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from .comparison import Comparison, Group
from .figures import (
    COLOURS,
    DASHES,
    PATTERNS,
    SYMBOLS,
    Figure,
    Style,
    Table,
    axes_of,
    line_with_band,
    rounded,
    series_of,
    show,
)
from .runs import LEVEL_PREFIX


def unexplained(comparison: Comparison) -> list[Figure]:
    """The decomposition over time, a figure for each group that has one."""
    figures: list[Figure] = []
    for group in comparison.distilled:
        for kind, word in (('unexplained', 'share'), ('mse', 'error')):
            figure = _unexplained_of(group, kind, word, len(figures))
            if figure is not None:
                figures.append(figure)
        figure = _by_level(group, len(figures))
        if figure is not None:
            figures.append(figure)
    return figures


def _unexplained_of(
    group: Group, kind: str, word: str, number: int
) -> Figure | None:
    keys = sorted(
        (k for k in group.runs[0].train if f'era_{kind}_e' in k),
        key=lambda key: (
            key.rpartition('_e')[0],
            int(key.rpartition('_e')[2]),
        ),
    )
    if len(keys) < 2:
        return None
    factor = 100.0 if kind == 'unexplained' else 1.0
    unit = '%' if kind == 'unexplained' else 'squared error'
    data: list[dict] = []
    ends: list[float] = []
    rows = []
    base = [dict(s) for s in series_of(group.runs, 'train', keys[0])]
    for i, key in enumerate(keys):
        style = Style(
            COLOURS[i % len(COLOURS)],
            DASHES[i % len(DASHES)],
            SYMBOLS[i % len(SYMBOLS)],
        )
        many = series_of(group.runs, 'train', key)
        name = 'e' + key.rpartition('_e')[2]
        data += line_with_band(name, many, style, factor)
        if i:
            gained = [
                [
                    (step, base[j][step] - value)
                    for step, value in series
                    if step in base[j]
                ]
                for j, series in enumerate(many)
            ]
            added = line_with_band(
                name, gained, style, factor, xaxis='x2', yaxis='y2'
            )
            for trace in added:
                trace['showlegend'] = False
            data += added
        lasts = [s[-1][1] for s in many if s]
        ends.append(factor * fmean(lasts))
        vals = group.lasts(f'era/{kind}_{name}')
        rows.append(
            [
                name,
                show(ends[-1], 2),
                show(factor * fmean(vals), 2) if vals else 'not measured',
                f'{ends[0] - ends[-1]:+.2f}' if i else '',
            ]
        )
    layout = axes_of('iteration', f'left unexplained, {unit}')
    layout['xaxis']['domain'] = [0, 0.44]
    layout['xaxis2'] = dict(
        title=dict(text='iteration'), domain=[0.58, 1], anchor='y2'
    )
    layout['yaxis2'] = dict(
        title=dict(text=f'less than e0, {unit}'), anchor='x2', zeroline=True
    )
    layout['yaxis']['rangemode'] = 'tozero'
    layout['meta'] = dict(side_by_side=True)
    said = ', '.join(f'e{i} {end:.2f} {unit}' for i, end in enumerate(ends))
    return Figure(
        f'unexplained-{number}',
        f"{group.name}: the {word} of the teacher's feature that each "
        'estimate leaves',
        data,
        layout,
        f"What e0 ... e{len(keys) - 1} leave of the teacher's feature. At the "
        f'end: {said}.',
        'e0 is the aligned student alone; each branch adds one residual. '
        'First: what is left; at 100 % an estimate is no better than the '
        "teacher's mean. If the lines stay near 100 %, the feature is not "
        'learnt. Second: by how much each estimate leaves less than e0. If '
        'these lines are at 0, the branches add nothing.',
        Table(
            [
                'estimate',
                f'in training, {unit}',
                f'in validation, {unit}',
                'less than e0',
            ],
            rows,
        ),
    )


def _by_level(group: Group, number: int) -> Figure | None:
    """By level over time, where `ResidualVisHook` was in the run."""
    keys = sorted(
        {key for run in group.runs for key in run.levels},
        key=lambda key: [
            int(part) if part.isdigit() else part
            for part in _split_numbers(key)
        ],
    )
    if not keys:
        return None
    data: list[dict] = []
    ends = []
    levels = list(dict.fromkeys(key.rpartition('_')[2] for key in keys))
    steps = list(dict.fromkeys(key.rpartition('_')[0] for key in keys))
    # The first and the last estimate; those between lie between.
    for step in dict.fromkeys((steps[0], steps[-1])):
        for level in levels:
            i = levels.index(level)
            style = Style(
                COLOURS[i % len(COLOURS)],
                'solid' if step == steps[0] else 'dot',
                SYMBOLS[i % len(SYMBOLS)],
            )
            many = series_of(group.runs, 'levels', f'{step}_{level}')
            short = step.removeprefix(LEVEL_PREFIX).replace('unexplained_', '')
            name = f'{short}, {level.replace("level", "level ")}'
            data += line_with_band(name, many, style, 100.0)
            lasts = [s[-1][1] for s in many if s]
            if lasts:
                ends.append(f'{name}: {100 * fmean(lasts):.1f} %')
    return Figure(
        f'levels-{number}',
        f'{group.name}: the same by level',
        data,
        axes_of('iteration', 'left unexplained, %'),
        'Unexplained share of the first and last estimate by level. At the '
        f'end: {"; ".join(ends)}.',
        'Level 0 is the finest map. The values are from a few fixed images, '
        'so they are rougher than the figure above. If a level stays high, '
        'the student has no information for it: check its source.',
    )


def _split_numbers(text: str) -> list[str]:
    parts, digit = [''], False
    for letter in text:
        if letter.isdigit() != digit:
            parts.append('')
            digit = letter.isdigit()
        parts[-1] += letter
    return parts


def level_bars(
    name: str, shares: Sequence[Sequence[float]], number: int, index: int
) -> Figure:
    """Unexplained share by level and estimate, computed from the weights.

    Args:
        name: Name of the run.
        shares: Shares by level and estimate.
        number: Number of images.
        index: Index of the figure.
    """
    steps = len(shares[0])
    data = [
        dict(
            type='bar',
            name=f'e{step}',
            x=[f'level {level}' for level in range(len(shares))],
            y=[rounded(100 * row[step]) for row in shares],
            marker=dict(
                color=COLOURS[step % len(COLOURS)],
                pattern=dict(shape=PATTERNS[step % len(PATTERNS)]),
            ),
        )
        for step in range(steps)
    ]
    layout = axes_of('', 'left unexplained, %')
    layout['barmode'] = 'group'
    layout['yaxis']['rangemode'] = 'tozero'
    return Figure(
        f'by-level-{index}',
        f'{name}: by level, from the weights',
        data,
        layout,
        'Unexplained share by level. '
        + '; '.join(
            f'level {level}: e0 {100 * row[0]:.1f} %, '
            f'e{steps - 1} {100 * row[-1]:.1f} %'
            for level, row in enumerate(shares)
        )
        + '.',
        f'On {number} val images, with the run that the images are from. '
        'Level 0 is the finest map.',
        Table(
            ['level', *(f'e{step}, %' for step in range(steps))],
            [
                [str(level), *(f'{100 * value:.2f}' for value in row)]
                for level, row in enumerate(shares)
            ],
        ),
    )
