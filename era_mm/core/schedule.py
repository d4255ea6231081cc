"""When a distillation term counts, and how much."""

import math

from ..registry import explain_unknown_keys


@explain_unknown_keys
class LossSchedule:
    """Factor of one loss term as a function of the global step.

        factor(t) = 0                               t < start or t >= stop
                  = shape((t - start + 1) / ramp)   in the ramp
                  = 1                               after it
        shape(x) = x (linear) or (1 - cos(pi x)) / 2 (cosine)

    A function of the global step alone, so a resumed run goes on where it
    was.

    Source: ours.

    Args:
        start: First step, in iterations, at which the term counts.
        stop: Step from which on it does not count any more. None: never.
        ramp: Number of iterations from 0 to the full weight. 0: at once.
        shape: 'linear' or 'cosine'.
    """

    SHAPES = ('linear', 'cosine')

    def __init__(
        self,
        start: int = 0,
        stop: int | None = None,
        ramp: int = 0,
        shape: str = 'linear',
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
        self.start, self.stop = start, stop
        self.ramp, self.shape = ramp, shape

    def __call__(self, step: int) -> float:
        """Factor at a global step."""
        if step < self.start or (self.stop is not None and step >= self.stop):
            return 0.0
        if not self.ramp:
            return 1.0
        progress = min(1.0, (step - self.start + 1) / self.ramp)
        if self.shape == 'cosine':
            return (1 - math.cos(math.pi * progress)) / 2
        return progress
