"""dev/gpu.sh, without a GPU: the commands that it gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from era_mm.cli_parsers import benchmark_parser, suite_parser
from era_mm.engine.preflight import find_config

ROOT = Path(__file__).resolve().parents[2]
#: Notes its arguments instead of doing anything.
NOTE = """#!/usr/bin/env bash
printf '%s\\n' "$(IFS=$'\\t'; echo "$*")" >> "$NOTES"
exit 1
"""


@pytest.fixture(scope='module')
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gpu')
    python = folder / 'python'
    python.write_text(NOTE)
    python.chmod(0o755)
    done = subprocess.run(
        ['bash', str(ROOT / 'dev/gpu.sh'), str(folder / 'out')],
        env=os.environ
        | dict(PYTHON=str(python), NOTES=str(folder / 'notes'), JOBS='3'),
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Every command failed, so the script says so of each.
    assert done.returncode == 1
    told = done.stderr.splitlines()[-1]
    assert told.startswith('failed: tests benchmark_era_retinanet_r101_r50_b2')
    assert told.endswith(' suite')
    assert len(told.split()) == 1 + 14
    lines = (folder / 'notes').read_text().splitlines()
    return [line.split('\t') for line in lines]


def test_script__goes_on_after_what_fails(commands):
    assert commands[0][:4] == ['-m', 'pytest', '-q', '-m']
    assert [c[2] for c in commands[1:]] == ['benchmark'] * 12 + ['suite']


def test_script__names_options_and_configs_that_exist(commands):
    for command in commands[1:13]:
        args = benchmark_parser().parse_args(command[3:])
        assert args.device == 'cuda'
        assert args.size == [800, 1333]
        for config in args.configs:
            find_config(config, '')
    assert {c[c.index('--batch-size') + 1] for c in commands[1:13]} == {
        '2',
        '8',
    }
    args = suite_parser().parse_args(commands[-1][3:])
    assert (ROOT / args.file).is_file()
    assert args.jobs == 3


def test_script__collects_the_tests_for_a_gpu():
    found = subprocess.run(
        [sys.executable, '-m', 'pytest', '-m', 'gpu', '--collect-only', '-q']
        + ['tests/test_gpu.py'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert 'test_step__waits_for_nothing' in found.stdout
