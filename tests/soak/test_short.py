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
    found = soak.soak(kills=3, configs=8, files=8, seed=1)
    for kind, outcome in found.items():
        assert not outcome.failures, kind
    assert found['kills around writes'].counts['resumed bit-identically'] == 3
    text = soak.page(found, seed=1, seconds=2.0)
    assert '| mutated configs | 8 |' in text
