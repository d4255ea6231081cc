"""Model separation: student and assistant together cost at most the model."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.registry import MODELS
from torch import Tensor, nn

from ...core.utils import evaluating, preserve_rng
from .pair import FeatureExtractor, ResidualPair
from .pair_config import arguments_of, class_of, pair_config, parts_before

#: What to do where no rule applies.
BY_HAND = 'write `student` and `assistant` of ResidualKDDistiller yourself.'
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
    divisor: int | None = None,
    input_size: int | tuple[int, int] = 224,
) -> Split:
    """Separate a model into a student and an assistant of its kind.

        FLOPs(assistant) <= share * FLOPs(model)
        FLOPs(student) + FLOPs(assistant) + adapters + sum <= FLOPs(model)

    Both are as wide as these bounds allow; all costs are measured. A
    convolution's FLOPs grow with the square of the width, so the widths are
    near sqrt(share) and sqrt(1 - share).

    Source: Residual KD [paper: student and assistant are derived from one
    model within its cost]; the rule is [inference].

    Args:
        model: Host model config.
        share: The assistant's share, in [0, 1). 0.1 to 0.2 is [inference]:
            the residual is a small signal.
        source: The cut, 'backbone' or 'neck'.
        divisor: Channels are rounded down to its multiples, before a group
            norm to multiples of its groups as well. None: a sixteenth of the
            first stage's channels, rounded down to a power of two, at most 8;
            so a step of width is at most an eighth of the model's FLOPs.
            Backbones whose width is a factor round by themselves.
        input_size: Height and width at which FLOPs are measured, in pixels.

    Raises:
        ValueError: A share outside the range, an invalid divisor, a model
            whose widths cannot be changed, or no width is narrow enough.
    """
    if not 0 <= share < 1:
        raise ValueError(f'`share` must be in [0, 1), but got {share}.')
    if divisor is not None and divisor < 1:
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
        try:
            config = pair_config(
                model, source=source, student=student, assistant=assistant
            )
        # A class of a host may take some widths only.
        except Exception as error:
            raise ValueError(
                f'{_name_of(given.backbone)} cannot be narrowed: with '
                f'{(student or assistant)["backbone"]} it raises '
                f'{type(error).__name__}: {str(error).rstrip(".")}. Give a '
                f'larger share if that is too narrow. Otherwise {BY_HAND}'
            ) from error
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
            f'{share:.3f} of it; the narrowest one'
            + (f' with channels divisible by {divisor}' if divisor else '')
            + f' takes {least:.3f}. Give a larger share or a smaller divisor.'
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


def widths(
    parts: Mapping, divisor: int | None, *, with_neck: bool
) -> list[dict]:
    """Changes that make parts narrower, from the narrowest to unchanged.

    Args:
        parts: ``backbone`` and, optionally, ``neck``.
        divisor: See :func:`split_by_flops`.
        with_neck: Whether the neck's channels shrink too. A student keeps
            them, because the head expects them.
    """
    found: list[dict] = []
    backbone = parts['backbone']
    known = _width_of(backbone)
    for step in range(1, STEPS + 1):
        changes = dict(backbone=_narrow(backbone, known, step, divisor))
        neck = parts.get('neck')
        if with_neck and isinstance(neck, (list, tuple)):
            raise ValueError(
                'The neck is a list, whose channels depend on each other: '
                "cut behind the backbone (source='backbone'), or write the "
                "assistant's neck yourself."
            )
        if with_neck and neck and 'out_channels' in neck:
            channels = neck['out_channels']
            own = _with_groups(neck, divisor or _divisor_for(channels))
            changes['neck'] = dict(out_channels=_round(channels, step, own))
        if changes not in found:
            found.append(changes)
    return found


def _round(channels: int, step: int, divisor: int) -> int:
    rounded = channels * step // STEPS // divisor * divisor
    return min(channels, max(divisor, rounded))


def _with_groups(settings: Mapping, divisor: int) -> int:
    """A multiple of a divisor and of the groups of a part's norm."""
    groups = (settings.get('norm_cfg') or {}).get('num_groups', 1)
    return math.lcm(divisor, groups)


def _width_of(backbone: Mapping) -> dict[str, Any]:
    """The arguments that set a backbone's width, and their values.

    In backbones of the hosts and of the project these are a factor
    (MobileNet, CSPDarknet, ShuffleNets for CIFAR; ``width`` of a wide
    ResNet), the first stage's channels, which later stages double (ResNet and
    its variants; ResNeXt also has groups), or an ``arch`` with a list of
    channels (ConvNeXt) or with the first stage's channels and the attention
    heads of each stage (CSWin).
    """
    settings = arguments_of(backbone) | dict(backbone)
    if 'widen_factor' in settings:
        return dict(widen_factor=settings['widen_factor'])
    if 'base_channels' in settings:
        if settings['base_channels'] is None:
            # Another argument decides (CIFARResNet's `width`).
            with preserve_rng():
                built = MODELS.build(copy.deepcopy(dict(backbone)))
            settings['base_channels'] = built.base_channels
            settings['stem_channels'] = built.stem_channels
        base = settings['base_channels']
        found = dict(base_channels=base)
        if 'stem_channels' in settings:
            found['stem_channels'] = settings['stem_channels'] or base
        if settings.get('groups', 1) > 1:
            found['groups'] = settings['groups']
        return found
    arch = settings.get('arch')
    if isinstance(arch, str):
        known = class_of(backbone)
        zoo = getattr(known, 'arch_settings', getattr(known, 'arch_zoo', {}))
        arch = zoo.get(arch)
    if isinstance(arch, Mapping) and (
        _is_list(arch.get('channels'))
        or (
            isinstance(arch.get('embed_dims'), int)
            and _is_list(arch.get('num_heads'))
        )
    ):
        return dict(arch=dict(arch))
    if isinstance(settings.get('width'), (int, float)):
        return dict(width=settings['width'])
    raise ValueError(
        f'How to narrow a {_name_of(backbone)} is not known: it takes none of '
        '`widen_factor`, `width` and `base_channels`, and no `arch` with a '
        'list of `channels`, or with `embed_dims` of the first stage and a '
        f'list of `num_heads`. So {BY_HAND}'
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _name_of(backbone: Mapping) -> str:
    kind = backbone['type']
    return kind if isinstance(kind, str) else kind.__name__


def _narrow(
    backbone: Mapping, known: Mapping, step: int, divisor: int | None
) -> dict:
    """Changes to a backbone's width.

    Args:
        backbone: Host config.
        known: See :func:`_width_of`.
        step: Of ``STEPS``.
        divisor: See :func:`split_by_flops`.
    """
    for factor in ('widen_factor', 'width'):
        if factor in known:
            return {factor: known[factor] * step / STEPS}
    if 'arch' in known:
        arch = known['arch']
        channels = arch.get('channels', arch.get('embed_dims'))
        first = channels if isinstance(channels, int) else channels[0]
        divisor = _with_groups(backbone, divisor or _divisor_for(first))
        if 'channels' in arch:
            narrow: Any = [_round(c, step, divisor) for c in channels]
            changed = dict(arch, channels=narrow)
        else:
            # Channels double from stage to stage; the heads stay.
            for index, heads in enumerate(arch['num_heads']):
                divisor = math.lcm(divisor, heads // math.gcd(heads, 2**index))
            changed = dict(arch, embed_dims=_round(first, step, divisor))
        return dict(arch=dict(changed, _delete_=True))
    base = known['base_channels']
    changes = {}
    for key in ('base_channels', 'stem_channels'):
        if key in known:
            own = _with_groups(backbone, divisor or _divisor_for(known[key]))
            changes[key] = _round(known[key], step, own)
    if 'groups' in known:
        # The width of a group stays, so their number changes.
        changes['groups'] = max(
            1, known['groups'] * changes['base_channels'] // base
        )
    return changes


def _divisor_for(channels: int) -> int:
    """The power of two next to a sixteenth of the channels, 8 at most."""
    return min(8, 2 ** max(0, (channels // 16).bit_length() - 1))


def measure(module: nn.Module, size: tuple[int, int]) -> dict[str, Cost]:
    """FLOPs and parameters of a module that takes images, and of its parts.

    mmengine's counter ignores additions; those of a ``ResidualPair``, one per
    element, are added here.

    Args:
        module: The module.
        size: Height and width of the image, in pixels.

    Returns:
        Costs by dotted name; '' is the whole.
    """
    image = torch.zeros(1, 3, *size)
    with torch.no_grad(), evaluating(module):
        analyzer = FlopAnalyzer(module, image)
        # It would warn of every element-wise operation that it ignores, and
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
