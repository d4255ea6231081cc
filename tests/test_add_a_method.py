"""The method of docs/add_a_method.md: three files, and nothing else."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    'era_mm/methods/channel_mean.py',
    'configs/channel_mean/channel_mean_retinanet_r18w32_r18w16_digits.py',
    'tests/test_methods/test_channel_mean.py',
)
FOLDERS = (
    *('.github', 'configs', 'demo', 'dev', 'docs', 'era_mm', 'results'),
    *('tests', 'tools'),
)


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A copy of the repository with the doc's three files in it."""
    folder = tmp_path_factory.mktemp('checkout')
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns('__pycache__'),
        )
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    text = (ROOT / 'docs/add_a_method.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    for name, block in zip(FILES, blocks, strict=True):
        assert text.index(f'`{name}`') < text.index(block)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(block)
    return folder


def run(checkout, *command):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=checkout,
        env=os.environ | {'PYTHONPATH': str(checkout)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_method__passes_its_own_and_the_contracts_tests(checkout):
    said = run(
        checkout,
        *(
            '-m',
            'pytest',
            '-q',
            '-p',
            'no:cacheprovider',
            '-k',
            'channel_mean',
        ),
        *('tests/test_contract.py', 'tests/test_configs.py', FILES[2]),
    )
    # Its own, two or more of the contract, three or more of its config.
    assert int(re.search(r'(\d+) passed', said)[1]) >= 6


@pytest.mark.slow
def test_method__needs_no_other_edit(checkout):
    run(
        checkout,
        *(
            '-m',
            'pytest',
            '-q',
            '-p',
            'no:cacheprovider',
            'tests/test_docs.py',
        ),
        *('tests/test_configs.py', 'tests/test_dev/test_config_pages.py'),
        *('-k', 'imports or names or page or index or make_config or links'),
    )


def test_method__is_linted_and_listed(checkout):
    run(checkout, '-m', 'ruff', 'check', '--no-cache', *FILES)
    run(checkout, '-m', 'ruff', 'format', '--no-cache', '--check', *FILES)
    code = 'from era_mm.engine.make_config import methods; print(*methods())'
    assert 'channel_mean' in run(checkout, '-c', code).split()
