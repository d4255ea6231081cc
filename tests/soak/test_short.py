"""A few of what `make soak` tries by the hundred."""

import importlib.util
import sys
from pathlib import Path

import pytest


def load_soak():
    file = Path(__file__).with_name('soak.py')
    spec = importlib.util.spec_from_file_location('era_mm_soak', file)
    module = importlib.util.module_from_spec(spec)
    sys.modules['era_mm_soak'] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_soak__a_few_of_each_fail_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv('ERA_MM_TRUST_CHECKPOINT', '0')
    soak = load_soak()
    numbers = {
        'kills around writes': 3,
        'kills at random times': 1,
        'kills of two ranks': 1,
        'wrong configs': 8,
        'damaged and harmful files': 8,
        'faults': 2,
    }
    record = soak.Record(tmp_path / 'record.jsonl')
    soak.soak(numbers, seed=1, record=record)
    assert not [line for line in record.lines if line['failure']]
    assert len(record.lines) == sum(numbers.values())
    assert all(
        line['ending'].endswith('bit-identically')
        for line in record.of('kills around writes')
    )
    # A soak that was stopped goes on, and repeats what failed if asked.
    read = soak.Record(tmp_path / 'record.jsonl')
    assert read.lines == record.lines
    failed = dict(record.lines[0], index=99, failure='it broke')
    read.add(**failed)
    assert '`it broke`' in soak.page(read, seed=1)
    read.drop_failures()
    assert soak.Record(tmp_path / 'record.jsonl').lines == record.lines
    assert '| wrong configs | 8 |' in soak.page(record, seed=1)
