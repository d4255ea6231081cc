"""The report of make_config about a pair, on one screen."""

from typing import Any, NamedTuple

from era_mm.core import Distillation, Plan
from era_mm.core.data_preprocessor import differences
from era_mm.engine.pairing import Match, Pair, Side
from era_mm.layers import Resampler


class Made(NamedTuple):
    """A config for a pair, not yet written.

    Args:
        text: The file's text; ``{base}`` stands for the student's config,
            ``{work_dir}`` for a folder named like the file.
        pair: The two models, measured.
        plans: Each method's plan for them, by method.
        model: The model built from the config.
    """

    text: str
    pair: Pair
    plans: dict[str, Plan]
    model: Distillation


def report(made: Made, teacher_checkpoint: str) -> str:
    """The decisions, on one screen."""
    pair = made.pair
    lines = []
    for member in (pair.student, pair.teacher):
        classes = member.num_classes
        about = '' if classes is None else f', {classes} classes'
        lines.append(
            f'{member.role:11}{type(member.model).__name__}{about}: '
            f'{member.name}'
        )
    lines.append(f'{"weights":11}{teacher_checkpoint}')
    for name, plan in made.plans.items():
        if len(made.plans) > 1:
            lines.append(f'{"method":11}{name}')
        match = match_of(plan)
        lines.append(
            f'{"sources":11}student {_names(match.student)}, teacher '
            f'{_names(match.teacher)}, on {pair.input_size}x{pair.input_size}'
        )
        lines += _report_levels(match)
        lines.append(f'{"resampling":11}{_report_resampling(match)}')
        if plan.head is not None:
            lines.append(f'{"head":11}{plan.head}')
    lines.append(f'{"input":11}{_report_input(pair)}')
    lines.append(f'{"classes":11}{_report_classes(pair)}')
    own = [
        name for name in ('work_dir', 'resume') if f'\n{name} = ' in made.text
    ]
    if own:
        lines.append(
            f'{"run":11}{" and ".join(own)} not taken from the student'
        )
    return '\n'.join(lines)


def match_of(plan: Plan) -> Match:
    """The outputs of the pair that a method uses."""
    assert isinstance(plan.match, Match)
    return plan.match


def _names(side: Side) -> str:
    if isinstance(side.source, str):
        return side.source
    return ' '.join(side.source)


def _report_levels(match: Match) -> list[str]:
    rows = []
    for own, theirs, scale in match.pairs():
        cells = [
            _level(match, side, level)
            for side, level in ((match.student, own), (match.teacher, theirs))
        ]
        resized = '' if scale == 1 else f'  resized by {scale:g}'
        rows.append(f'{cells[0]:32}<-  {cells[1]}{resized}')
    if match.unused():
        rows.append(f'without partner: {"; ".join(match.unused())}')
    return [
        f'{"" if index else "levels":11}{row}'
        for index, row in enumerate(rows)
    ]


def _level(match: Match, side: Side, level: int) -> str:
    feat = side.feats[level]
    channels = feat.shape[2 if feat.dim() == 3 else 1]
    stride = match.stride(side, level)
    at = f'stride {stride:g}, ' if stride else ''
    return f'[{level}] {at}{channels} channels'


def _report_resampling(match: Match) -> str:
    steps = [
        f'{role}: {step}'
        for role, config in match.resample.items()
        for step in Resampler(**config).steps()
    ]
    return '; '.join(steps) or 'none needed'


#: Readable names for the settings of the hosts' preprocessors.
_LABELS = {
    'channel_conversion': 'channels reversed',
    'to_rgb': 'channels reversed',
    'pad_size_divisor': 'padded to multiples of',
    'pad_value': 'padded with',
}


def _report_input(pair: Pair) -> str:
    found = differences(
        pair.student.model.data_preprocessor,
        pair.teacher.model.data_preprocessor,
    )
    channels = ''
    if pair.student.channels != pair.teacher.channels:
        channels = 'grey images, which the teacher gets as three channels; '
    elif pair.student.channels != 3:
        channels = f'images of {pair.student.channels} channels; '
    if not found:
        return f'{channels}both preprocess alike'
    shown = ', '.join(
        f'{_LABELS.get(key, key)} {_short(theirs)} (student {_short(own)})'
        for key, (own, theirs) in found.items()
        # `mean` and `std` show it.
        if key != 'enable_normalize'
    )
    return f'{channels}the teacher has its own preprocessing: {shown}'


def _short(value: Any) -> Any:
    if value is None:
        return 'none'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, type):
        return value.__name__
    return [round(v, 2) for v in value] if isinstance(value, list) else value


def _report_classes(pair: Pair) -> str:
    own, theirs = pair.student.classes, pair.teacher.classes
    if own is None or theirs is None:
        unknown = [
            m.role for m in (pair.student, pair.teacher) if not m.classes
        ]
        return f'names unknown of the {" and the ".join(unknown)}'
    if own == theirs:
        return 'the same'
    shared = len(set(own) & set(theirs))
    return f'{len(own)} and {len(theirs)}, {shared} of them in both'
