"""Means, intervals and differences by seed."""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.special import stdtrit

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean with its interval.

    Args:
        mean: Mean of the values.
        half: Half of its 95 % interval; None for a single value.
        number: Number of values.
    """

    mean: float
    half: float | None
    number: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its ends; None for a single value."""
        if self.half is None:
            return None
        return self.mean - self.half, self.mean + self.half

    @property
    def is_above_0(self) -> bool:
        """Whether the whole interval is."""
        return self.interval is not None and self.interval[0] > 0

    @property
    def is_below_0(self) -> bool:
        """Whether the whole interval is."""
        return self.interval is not None and self.interval[1] < 0


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval, by Student's t.

        half = t(0.975, n - 1) * s / sqrt(n)

    s is the standard deviation with n - 1.

    Raises:
        ValueError: No values.
    """
    if not values:
        raise ValueError('expected at least one value')
    number = len(values)
    half = None
    if number > 1:
        quantile = float(stdtrit(number - 1, (1 + LEVEL) / 2))
        half = quantile * stdev(values) / sqrt(number)
    return Estimate(fmean(values), half, number)


def paired(
    values: Mapping[int, float], others: Mapping[int, float]
) -> Estimate | None:
    """The mean difference by seed: ``values - others``.

    Runs with the same seed share data order and initial weights, so their
    difference varies less than the runs.

    Args:
        values: Values by seed.
        others: Values by seed; seeds that only one of the two has are
            ignored.

    Returns:
        The estimate; None without a common seed.
    """
    common = sorted(set(values) & set(others))
    if not common:
        return None
    return estimate([values[seed] - others[seed] for seed in common])


def mean_ratio(
    values: Mapping[int, float], others: Mapping[int, float]
) -> float | None:
    """The mean of ``values / others`` by seed; None without a common one."""
    common = sorted(set(values) & set(others))
    if not common:
        return None
    return fmean(values[seed] / others[seed] for seed in common)
