"""Statistics of the benchmark."""

import pytest

from era_mm.engine.benchmark_report import spread, step_memory, step_times


def test_spread__is_the_median_and_the_tenths():
    # Of 0, 10, ..., 100 the percentiles are their own names.
    values = [100, 0, 20, 10, 40, 30, 60, 50, 80, 70, 90]
    assert spread(values) == dict(median=50, p10=10, p90=90)
    # Between 1 and 2: 1 + 0.1, 1 + 0.9.
    assert spread([2, 1]) == pytest.approx(dict(median=1.5, p10=1.1, p90=1.9))


def test_step_times__compares_within_each_round():
    # Floors 4 and 40; the machine was ten times as slow in the second round.
    found = step_times(plain=[3, 30], teacher=[1, 10], step=[6, 60])
    assert found['ratio'] == dict(median=1.5, p10=1.5, p90=1.5)
    assert found['floor_ms']['median'] == 22
    assert found['step_ms']['rounds'] == [6, 60]


def test_step_memory__adds_the_floor_up():
    found = step_memory(
        peak=300,
        plain_peak=100,
        teacher_weights=50,
        teacher_feats=20,
        extras=30,
    )
    assert found['floor'] == 200
    assert found['ratio'] == 1.5
