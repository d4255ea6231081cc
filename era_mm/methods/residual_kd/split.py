"""Model separation: a student and an assistant within a model's cost."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer
from torch import Tensor, nn

from ...core.utils import evaluating, preserve_rng
from .pair import FeatureExtractor, ResidualPair
from .pair_config import arguments_of, class_of, pair_config, parts_before

#: Widths are tried in steps of 1/64 of the model's.
STEPS = 64


@dataclass(frozen=True)
class Cost:
    """What a part of a model costs for one image.

    Args:
        flops: Multiply-adds, as mmengine counts them.
        params: Parameters.
    """

    flops: int
    params: int


@dataclass(frozen=True)
class Split:
    """A model's separation, as arguments of ``ResidualKDDistiller``.

    Args:
        source: The cut.
        student: Changes that make the student.
        assistant: The assistant, None where the share is 0.
        costs: Of 'model', 'student', 'assistant' (adapter included) and
            'pair' (adapters and addition included), each up to the cut. What
            follows is the same in model and pair.
    """

    source: str
    student: dict[str, Any]
    assistant: dict[str, Any] | None
    costs: dict[str, Cost]


def split_by_flops(
    model: Mapping,
    share: float,
    *,
    source: str = 'neck',
    divisor: int = 8,
    input_size: int | tuple[int, int] = 224,
) -> Split:
    """Separate a model into a student and an assistant of its kind.

        FLOPs(assistant) <= share * FLOPs(model)
        FLOPs(student) + FLOPs(assistant) + adapters + sum <= FLOPs(model)

    both as wide as that allows, each measured. A convolution's FLOPs grow
    with the square of the width, so the widths come out near sqrt(share) and
    sqrt(1 - share).

    Source: Residual KD [paper: student and assistant are derived from one
    model within its cost]; the rule is [inference].

    Args:
        model: Host model config.
        share: The assistant's share, in [0, 1). 0.1 to 0.2 is [inference]:
            it has a small signal to model.
        source: The cut, 'backbone' or 'neck'.
        divisor: Channels are rounded down to its multiples, before a group
            norm to multiples of its groups as well. Where a factor says the
            width, the host rounds.
        input_size: Height and width at which FLOPs are measured, in pixels.

    Raises:
        ValueError: A share outside the range, a divisor that is none, a model
            whose widths cannot be changed, or none that is narrow enough.
    """
    if not 0 <= share < 1:
        raise ValueError(f'`share` must be in [0, 1), but got {share}.')
    if divisor < 1:
        raise ValueError(f'`divisor` must be 1 or more, but got {divisor}.')
    size = (
        (input_size, input_size) if isinstance(input_size, int) else input_size
    )
    given = parts_before(model, source)
    with preserve_rng():
        extractor = FeatureExtractor(**copy.deepcopy(dict(given)))
    whole = measure(extractor, size)['']
    if not share:
        costs = {'model': whole, 'student': whole, 'pair': whole}
        return Split(source, {}, None, costs)

    def costs_of(student: dict, assistant: dict) -> dict[str, Cost]:
        config = pair_config(
            model, source=source, student=student, assistant=assistant
        )
        return {'model': whole, **measure_pair(config, size)}

    assistants = [
        dict(form='image', **changes)
        for changes in widths(given, divisor, with_neck=True)
    ]
    budget = share * whole.flops
    assistant = _widest(
        assistants,
        lambda assistant: costs_of({}, assistant)['assistant'].flops <= budget,
    )
    if assistant is None:
        least = costs_of({}, assistants[0])['assistant'].flops / whole.flops
        raise ValueError(
            f'No assistant cut from this model costs as little as '
            f'{share:.3f} of it; the narrowest one of channels that divide '
            f'by {divisor} takes {least:.3f}. Give a larger share or a '
            'smaller divisor.'
        )
    student = _widest(
        widths(given, divisor, with_neck=False),
        lambda student: (
            costs_of(student, assistant)['pair'].flops <= whole.flops
        ),
    )
    if student is None:
        raise ValueError(
            f'No student cut from this model fits beside an assistant of '
            f'share {share:.3f}. Give a smaller share or a smaller divisor.'
        )
    return Split(source, student, assistant, costs_of(student, assistant))


def _widest(
    candidates: list[dict], fits: Callable[[dict], bool]
) -> dict | None:
    """The last of candidates in order of width that fits, or None."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        if fits(candidates[middle]):
            low = middle + 1
        else:
            high = middle
    return candidates[low - 1] if low else None


def widths(parts: Mapping, divisor: int, *, with_neck: bool) -> list[dict]:
    """Changes that make parts narrower, from the narrowest to unchanged.

    Args:
        parts: ``backbone`` and, optionally, ``neck``.
        divisor: See :func:`split_by_flops`.
        with_neck: Whether the neck's channels shrink too. A student keeps
            them, for they are what the head gets.
    """
    found: list[dict] = []
    for step in range(1, STEPS + 1):
        changes = dict(backbone=_narrow(parts['backbone'], step, divisor))
        neck = parts.get('neck')
        if with_neck and isinstance(neck, (list, tuple)):
            raise ValueError(
                'The neck is a list, whose channels depend on each other: '
                "cut behind the backbone (source='backbone'), or write the "
                "assistant's neck yourself."
            )
        if with_neck and neck and 'out_channels' in neck:
            changes['neck'] = dict(
                out_channels=_round(
                    neck['out_channels'], step, _with_groups(neck, divisor)
                )
            )
        if changes not in found:
            found.append(changes)
    return found


def _round(channels: int, step: int, divisor: int) -> int:
    rounded = channels * step // STEPS // divisor * divisor
    return min(channels, max(divisor, rounded))


def _with_groups(settings: Mapping, divisor: int) -> int:
    """A divisor that the groups of a part's norm divide too."""
    groups = (settings.get('norm_cfg') or {}).get('num_groups', 1)
    return math.lcm(divisor, groups)


def _narrow(backbone: Mapping, step: int, divisor: int) -> dict:
    """Changes to a backbone's width.

    Known are the three ways in which backbones of the hosts say it: a factor
    (MobileNetV2, ShuffleNetV2, CSPDarknet), the first stage's channels, which
    the others double (ResNet and its kin; ResNeXt has its groups besides), or
    an ``arch`` with a list of channels (ConvNeXt).
    """
    settings = arguments_of(backbone) | dict(backbone)
    divisor = _with_groups(settings, divisor)
    if 'widen_factor' in settings:
        return dict(widen_factor=settings['widen_factor'] * step / STEPS)
    if 'base_channels' in settings:
        base = settings['base_channels']
        changes = dict(base_channels=_round(base, step, divisor))
        if 'stem_channels' in settings:
            stem = settings['stem_channels'] or base
            changes['stem_channels'] = _round(stem, step, divisor)
        groups = settings.get('groups', 1)
        if groups > 1:
            # Their own width stays, so their number decides.
            changes['groups'] = max(
                1, groups * changes['base_channels'] // base
            )
        return changes
    arch = settings.get('arch')
    if isinstance(arch, str):
        arch = getattr(class_of(backbone), 'arch_settings', {}).get(arch)
    if isinstance(arch, Mapping) and 'channels' in arch:
        channels = [_round(c, step, divisor) for c in arch['channels']]
        return dict(arch=dict(arch, channels=channels, _delete_=True))
    raise ValueError(
        f'How to narrow a {backbone["type"]} is not known: it has none of '
        '`widen_factor`, `base_channels` and `arch.channels`. Write '
        '`student` and `assistant` of ResidualKDDistiller yourself.'
    )


def measure(module: nn.Module, size: tuple[int, int]) -> dict[str, Cost]:
    """FLOPs and parameters of a module that takes images, and of its parts.

    mmengine's counter passes additions over; those of a ``ResidualPair``, one
    per element, are added here.

    Args:
        module: It.
        size: Height and width of the image, in pixels.

    Returns:
        Costs by dotted name; '' is the whole.
    """
    image = torch.zeros(1, 3, *size)
    with torch.no_grad(), evaluating(module):
        analyzer = FlopAnalyzer(module, image)
        # It tells of every element-wise operation that it passes over, and
        # of modules that compute nothing.
        analyzer.unsupported_ops_warnings(False)
        analyzer.uncalled_modules_warnings(False)
        flops = dict(analyzer.by_module())
        for pair, additions in _additions(module, image).items():
            for name in flops:
                if not name or f'{pair}.'.startswith(f'{name}.'):
                    flops[name] += additions
    return {
        name: Cost(
            flops=int(flops[name]),
            params=sum(p.numel() for p in part.parameters()),
        )
        for name, part in module.named_modules()
    }


def _additions(module: nn.Module, image: Tensor) -> dict[str, int]:
    """How many numbers each pair in a module adds, by the pair's name."""
    names: dict[nn.Module, str] = {
        part: name
        for name, part in module.named_modules()
        if isinstance(part, ResidualPair)
    }
    found: dict[str, int] = {}

    def count(pair: nn.Module, _: Any, feats: tuple[Tensor, ...]) -> None:
        found[names[pair]] = sum(feat.numel() for feat in feats)

    handles = [pair.register_forward_hook(count) for pair in names]
    try:
        if handles:
            module(image)
    finally:
        for handle in handles:
            handle.remove()
    return found


def measure_pair(config: Mapping, size: tuple[int, int]) -> dict[str, Cost]:
    """Costs of a pair and its parts up to the cut.

    Args:
        config: Host config of the pair's model.
        size: Height and width of the image, in pixels.
    """
    backbone = copy.deepcopy(dict(config['backbone']))
    backbone.pop('type')
    with preserve_rng():
        pair = ResidualPair(**backbone)
    costs = measure(pair, size)
    return {
        'student': costs['student'],
        'assistant': costs['assistant'],
        'pair': costs[''],
    }
