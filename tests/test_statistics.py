"""Means, intervals and differences, computed by hand."""

import pytest

from era_mm.statistics import Estimate, estimate, mean_ratio, paired


def test_estimate__of_three_values():
    # Mean 2, variance ((-1)^2 + 0 + 1^2) / 2 = 1; t(0.975, 2) = 4.30265,
    # and 4.30265 * sqrt(1 / 3) = 2.48414.
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(2.48414, abs=1e-5)
    assert found.interval == (2.0 - found.half, 2.0 + found.half)
    assert not found.is_above_0
    assert estimate([5.0]).interval is None
    assert estimate([5.0]) == Estimate(5.0, None, 1)
    assert estimate([4.0, 4.0]) == (4.0, 0.0, 2)
    with pytest.raises(ValueError):
        estimate([])


def test_paired__is_narrower_than_the_runs_are():
    # Runs from 40 to 50, but differences 2, 3, 4: mean 3, as above.
    values = {0: 42.0, 1: 48.0, 2: 54.0, 7: 1.0}
    others = {0: 40.0, 1: 45.0, 2: 50.0, 9: 99.0}
    found = paired(values, others)
    assert found.number == 3
    assert found.mean == pytest.approx(3.0)
    assert found.half == pytest.approx(2.48414, abs=1e-5)
    assert found.is_above_0
    assert paired(others, values).is_below_0
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert paired({0: 1.0}, {0: 4.0}) == (-3.0, None, 1)
    # One pair of runs shows nothing.
    assert not paired({0: 9.0}, {0: 4.0}).is_above_0


def test_mean_ratio__is_by_seed():
    # 2 / 1 and 9 / 3.
    assert mean_ratio({0: 2.0, 1: 9.0}, {0: 1.0, 1: 3.0}) == 2.5
    assert mean_ratio({0: 2.0}, {1: 1.0}) is None
