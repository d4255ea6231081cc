"""Schedules of the weights of loss terms."""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..registry import explain_unknown_keys


@explain_unknown_keys
class LossSchedule:
    """Factor of one loss term as a function of the global step.

        factor(t) = 0                                 t < start or t >= stop
                  = scale * gamma^m * (initial + (1 - initial) * shape(x))
        x = min(1, (t - start + 1) / ramp),  1 without a ramp
        shape(x) = x (linear) or (1 - cos(pi x)) / 2 (cosine)
        m = number of milestones <= t

    It depends on the global step only, so a resumed run continues correctly.
    ``LossSchedule(scale=0.5)`` is a constant weight; ``initial=0`` ramps up;
    ``scale=0.1, initial=10`` ramps from 1 down to 0.1.

    Source: ours.

    Args:
        scale: Factor after the ramp.
        start: First step at which the term is used, in iterations.
        stop: First step at which it is no longer used. None: no end.
        ramp: Number of iterations from ``initial`` to the full weight. 0: no
            ramp.
        initial: Start of the ramp, relative to ``scale``.
        shape: Shape of the ramp, 'linear' or 'cosine'.
        milestones: Steps at each of which the factor is multiplied by
            ``gamma``.
        gamma: See ``milestones``.

    Raises:
        ValueError: Steps that are not in order.
    """

    SHAPES = ('linear', 'cosine')

    def __init__(
        self,
        scale: float = 1.0,
        start: int = 0,
        stop: int | None = None,
        ramp: int = 0,
        initial: float = 0.0,
        shape: str = 'linear',
        milestones: Sequence[int] = (),
        gamma: float = 0.1,
    ) -> None:
        if shape not in self.SHAPES:
            raise ValueError(
                f'`shape` of a loss schedule must be one of {self.SHAPES}, '
                f'but got {shape!r}.'
            )
        if start < 0 or ramp < 0 or (stop is not None and stop <= start):
            raise ValueError(
                'A loss schedule needs 0 <= start < stop and ramp >= 0, but '
                f'got start={start}, stop={stop}, ramp={ramp}.'
            )
        if scale < 0 or initial < 0 or gamma < 0:
            raise ValueError(
                'Factors of a loss schedule must not be negative, but got '
                f'scale={scale}, initial={initial}, gamma={gamma}.'
            )
        if sorted(milestones) != list(milestones):
            raise ValueError(
                '`milestones` of a loss schedule must be in rising order, '
                f'but got {list(milestones)}.'
            )
        self.scale, self.start, self.stop = scale, start, stop
        self.ramp, self.initial, self.shape = ramp, initial, shape
        self.milestones, self.gamma = tuple(milestones), gamma

    def __str__(self) -> str:
        """In words, for the summary."""
        parts = []
        if self.ramp:
            begin = self.scale * self.initial
            parts.append(
                f'{begin:g} to {self.scale:g} over {self.ramp} iterations '
                f'({self.shape})'
            )
        else:
            parts.append(f'times {self.scale:g}')
        if self.start:
            parts.append(f'from iteration {self.start}')
        if self.stop is not None:
            parts.append(f'until {self.stop}')
        if self.milestones:
            at = ', '.join(map(str, self.milestones))
            parts.append(f'times {self.gamma:g} at {at}')
        return ', '.join(parts)

    def __call__(self, step: int) -> float:
        """Factor at a global step."""
        if step < self.start or (self.stop is not None and step >= self.stop):
            return 0.0
        passed = sum(milestone <= step for milestone in self.milestones)
        factor = self.scale * self.gamma**passed
        if not self.ramp:
            return factor
        progress = min(1.0, (step - self.start + 1) / self.ramp)
        if self.shape == 'cosine':
            progress = (1 - math.cos(math.pi * progress)) / 2
        return factor * (self.initial + (1 - self.initial) * progress)


def scheduled(
    losses: Mapping[str, Any],
    schedules: Mapping[str, LossSchedule],
    step: int,
    *,
    is_complete: bool,
    owner: str,
) -> dict[str, Any]:
    """Multiply the terms of one step by the factors of their schedules.

    Args:
        losses: Terms by their keys; only keys with "loss" are multiplied.
        schedules: Schedules by the key of a loss, in which ``*`` matches
            anything. The factors of several that match are multiplied.
        step: The run's global iteration.
        is_complete: Whether every term of the method is there.
        owner: What messages call the method.

    Raises:
        ValueError: A schedule of a term that the method does not have.
    """
    factors = dict.fromkeys(losses, 1.0)
    for pattern, schedule in schedules.items():
        keys = [
            key for key in fnmatch.filter(losses, pattern) if 'loss' in key
        ]
        if not keys and is_complete:
            raise ValueError(
                f'`schedules` of {owner} has {pattern!r}, which is none of '
                f'its losses: {sorted(losses)}.'
            )
        for key in keys:
            factors[key] *= schedule(step)
    return {
        key: value if factors[key] == 1 else factors[key] * value
        for key, value in losses.items()
    }
