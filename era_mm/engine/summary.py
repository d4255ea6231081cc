"""What is going to be trained, on one screen."""

import copy
import fnmatch
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer
from torch import nn

from era_mm.core import BaseDistiller, Distillation, MutualDistillation
from era_mm.core.host_models import blank_sample, image_channels
from era_mm.core.mutual import Peer
from era_mm.core.utils import preserve_rng
from era_mm.engine.step_cost import cost_line

#: Pixels above which a CPU takes too long to count FLOPs.
MAX_CPU_PIXELS = 512 * 512


def summary_of(
    model: Distillation | MutualDistillation, batch: Any = None
) -> str:
    """Models, sources, extras and losses, a line each.

    Nothing in the model is changed, and no random number is drawn.

    Args:
        model: What is going to be trained.
        batch: One image as a dataloader of val gives it, whose FLOPs are
            counted; None: an image of the dry run's size.
    """
    with preserve_rng():
        if isinstance(model, MutualDistillation):
            lines = [
                line
                for name, half in model.students.items()
                for line in _lines(half, name, batch)
            ]
        else:
            lines = list(_lines(model, 'student', batch))
    return '\n'.join(lines)


def _lines(model: Distillation, name: str, batch: Any) -> Iterator[str]:
    size = model.wiring.input_size
    yield _model_line(name, model.student, batch, size)
    for key, teacher in model.teachers.items():
        if not isinstance(teacher, Peer):
            yield _model_line(key, teacher.model, batch, size)
    for key, distiller in model.distillers.items():
        yield _extras_line(key, distiller)
        for line in distiller.uses():
            yield f'  {line}'
    cost = cost_line(model)
    if cost is not None:
        yield cost
    if model.wiring.student_shapes:
        yield f'sources, for an image of {size[0]} x {size[1]}'
    # Without those that a method has given up after the dry run.
    used = {s for d in model.distillers.values() for s in d.student_sources}
    own = {k: v for k, v in model.wiring.student_shapes.items() if k in used}
    owners = {name: own, **model.wiring.teacher_shapes}
    for owner, shapes in owners.items():
        for source, levels in shapes.items():
            shown = ' '.join('x'.join(map(str, s[1:])) for s in levels)
            yield f'  {f"{owner} {source}":<30} {shown}'
    yield 'losses, with their weights'
    for path, module in model.student.named_modules():
        weight = getattr(module, 'loss_weight', None)
        if isinstance(weight, (int, float)):
            yield f'  {path:<30} {weight:g}'
    for key, distiller in model.distillers.items():
        start = f'{key}.' if len(model.distillers) > 1 else ''
        for line in _loss_lines(distiller):
            yield f'  {start}{line}'


def _model_line(
    name: str, model: nn.Module, batch: Any, size: tuple[int, ...]
) -> str:
    number = sum(p.numel() for p in model.parameters())
    return (
        f'{name:<10} {type(model).__name__:<21} {number / 1e6:8.2f} M '
        f'parameters  {flops_text(model, batch, size)}'
    )


def _extras_line(name: str, distiller: BaseDistiller) -> str:
    line = f'{name:<10} {type(distiller).__name__:<21} '
    number = sum(p.numel() for p in distiller.parameters())
    line += f'{number / 1e6:8.2f} M parameters in training only'
    if distiller.inner is not None:
        number = sum(p.numel() for p in distiller.inner.parameters())
        line += f', {number / 1e6:.2f} M in the inner module'
    return line


def _loss_lines(distiller: BaseDistiller) -> Iterator[str]:
    weights = distiller.loss_weights()
    if not weights:
        yield f'{type(distiller).__name__} does not tell its weights'
    told = set()
    for key, weight in weights.items():
        line = f'{key:<30} {weight:g}'
        for pattern, schedule in distiller.schedules.items():
            if fnmatch.fnmatch(key, pattern):
                told.add(pattern)
                line += f'  {schedule}'
        yield line
    # For single terms of a group, or where the weights are not told.
    for pattern, schedule in distiller.schedules.items():
        if pattern not in told:
            yield f'{pattern:<30}    {schedule}'


def flops_text(
    model: nn.Module, batch: Any, size: tuple[int, ...] = (224, 224)
) -> str:
    """GFLOPs of a forward pass without post-processing, as the hosts count.

    That is mmengine's counter, in which a multiplication with its addition is
    one.
    """
    try:
        # A copy, because the counter leaves hooks behind where it fails.
        model = copy.deepcopy(model).eval()
        if batch is None:
            device = next(model.parameters()).device
            inputs = torch.zeros(
                1, image_channels(model), *size, device=device
            )
            samples = [blank_sample(*size)]
        else:
            data = model.data_preprocessor(copy.deepcopy(batch), False)
            inputs, samples = data['inputs'], data['data_samples']
        height, width = inputs.shape[-2:]
        if inputs.device.type == 'cpu' and height * width > MAX_CPU_PIXELS:
            return (
                f'GFLOPs not counted (an image of {height} x {width} takes '
                'too long on a CPU)'
            )
        model.forward = partial(model.forward, data_samples=samples)
        counter = FlopAnalyzer(model, inputs)
        counter.unsupported_ops_warnings(False)
        counter.uncalled_modules_warnings(False)
        counter.tracer_warnings('none')
        with torch.no_grad():
            number = counter.total()
    except Exception as error:
        # Some models cannot be traced, and a summary must not stop a run.
        reason = (str(error).splitlines() or ['no details'])[0]
        return f'GFLOPs not counted ({type(error).__name__}: {reason[:60]})'
    return f'{number / 1e9:.2f} GFLOPs for {height} x {width}'
