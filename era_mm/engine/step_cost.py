"""Counts the cost of a training step relative to the plain student's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from era_mm.core import Distillation
from era_mm.core.host_models import (
    blank_sample,
    image_channels,
    images_for,
)
from era_mm.core.utils import evaluating, preserve_rng
from era_mm.errors import first_line

#: Height and width of the image for counting, in pixels: large enough for the
#: coarsest level of a pyramid.
SIZE = 256


def flops_of(run: Callable[[], Any]) -> int:
    """FLOPs of the convolutions and matrix products of a call."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def step_cost(model: Distillation) -> float | None:
    """FLOPs of a step relative to the plain student's step.

        (3 F_student + F_teachers + F_distillers) / (3 F_student)

    A step is a forward pass F and a backward pass of 2 F. Teachers have only
    the forward pass; a distiller tells its own FLOPs by ``extra_flops``. Only
    convolutions and matrix products count, on one image, without optimiser
    and data loading. The model is not changed.

    Source: ours.

    Args:
        model: Built, with or without weights.

    Returns:
        The ratio; None if a distiller does not tell its FLOPs.
    """
    distillers = model.distillers.values()
    device = next(model.student.parameters()).device
    channels = image_channels(model.student)
    inputs = torch.zeros(1, channels, SIZE, SIZE, device=device)
    samples = [blank_sample(SIZE, SIZE)]
    with preserve_rng(), torch.no_grad(), evaluating(model.student):
        student = flops_of(
            lambda: model.student(inputs, samples, mode='tensor')
        )
        teachers = sum(
            flops_of(
                partial(
                    teacher.extract,
                    images_for(teacher.model, inputs),
                    samples,
                )
            )
            for teacher in model.teachers.values()
            if teacher.is_recorded
        )
        feats_of = model.record(inputs, samples, load=False)
        extra = 0.0
        for distiller in distillers:
            with evaluating(distiller):
                found = distiller.extra_flops(flops_of, **feats_of(distiller))
            if found is None:
                return None
            extra += found
    plain = 3 * student
    return (plain + teachers + extra) / plain if plain else None


def cost_line(model: Distillation) -> str | None:
    """The ratio in words, or the reason why it could not be counted.

    None if a distiller does not tell its FLOPs.
    """
    try:
        ratio = step_cost(model)
    except Exception as error:
        # Models that cannot run on a blank image; a summary must not stop.
        reason = f'{type(error).__name__}: {first_line(error)[:60]}'
        return f'cost of a step not counted ({reason})'
    if ratio is None:
        return None
    return (
        f'a step costs about {ratio:.2f} times the plain one (FLOPs at '
        f'{SIZE} x {SIZE})'
    )
