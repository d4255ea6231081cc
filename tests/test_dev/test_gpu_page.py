"""docs/gpu.md: made of results/gpu alone."""

import json
import shutil
from pathlib import Path

from dev.gpu_page import page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'results/gpu'


def test_page__is_that_of_the_results():
    assert (ROOT / 'docs/gpu.md').read_text() == page(RESULTS)


def test_page__has_the_numbers_of_every_setting():
    text = page(RESULTS)
    files = sorted(RESULTS.glob('settings_*.json'))
    assert files
    for file in files:
        record = json.loads(file.read_text())
        (entry,) = record['distillers']
        for shown in (
            f'{entry["step_ms"]["median"]:.1f}',
            f'{entry["ratio"]["median"]:.3f}',
            f'{entry["memory"]["ratio"]:.3f}',
        ):
            assert shown in text


def test_page__leaves_out_what_is_missing(tmp_path):
    file = next(RESULTS.glob('settings_*.json'))
    shutil.copy(file, tmp_path)
    text = page(tmp_path)
    assert '## What a step costs' in text
    assert '## Where the time goes' not in text
    assert 'pytest' not in text
