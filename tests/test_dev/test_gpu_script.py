"""dev/gpu.sh, without a GPU: the commands that it gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dev.gpu_benchmark import STAGES
from era_mm.cli_parsers import suite_parser
from era_mm.engine.preflight import find_config

ROOT = Path(__file__).resolve().parents[2]
#: Notes its arguments instead of doing anything.
NOTE = """#!/usr/bin/env bash
printf '%s\\n' "$(IFS=$'\\t'; echo "$*")" >> "$NOTES"
exit 1
"""


def run(folder, *arguments):
    """The script's end, and the commands that it gave to Python."""
    python = folder / 'python'
    python.write_text(NOTE)
    python.chmod(0o755)
    notes = folder / 'notes'
    done = subprocess.run(
        ['bash', str(ROOT / 'dev/gpu.sh'), *arguments],
        env=os.environ | dict(PYTHON=str(python), NOTES=str(notes)),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    lines = notes.read_text().splitlines() if notes.exists() else []
    return done, [line.split('\t') for line in lines]


def test_measure__goes_on_after_what_fails(tmp_path):
    done, commands = run(tmp_path, 'measure', str(tmp_path / 'out'))
    assert done.returncode == 1
    told = done.stderr.splitlines()[-1]
    assert told.startswith('failed: tests settings_era_retinanet_r101_r50_b2')
    assert len(told.split()) == 1 + len(commands)
    tests = [c for c in commands if c[1] == 'pytest']
    assert tests == [['-m', 'pytest', '-q', '-m', 'gpu', 'tests/test_gpu.py']]
    stages = [c for c in commands if c[1] == 'dev.gpu_benchmark']
    assert {c[2] for c in stages} == set(STAGES)
    for command in stages:
        find_config(command[3])
        assert command[command.index('--lock') + 1]
    outs = {c[c.index('--out') + 1] for c in stages}
    assert len(outs) == len(stages) == len(commands) - 1
    settings = [c for c in stages if c[2] == 'settings']
    assert len(settings) == 3 * 2 * 2


def test_suite__gets_the_options(tmp_path):
    done, commands = run(
        tmp_path, 'suite', '--jobs', '3', '--only', '*/era/s0', 'x'
    )
    assert done.returncode == 1
    (command,) = commands
    args = suite_parser().parse_args(command[3:])
    assert (ROOT / args.file).is_file()
    assert args.jobs == 3
    assert args.only == ['*/era/s0', 'x']


@pytest.mark.parametrize('arguments', [(), ('x',), ('measure', 'a', 'b')])
def test_script__tells_its_commands(tmp_path, arguments):
    done, commands = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert 'dev/gpu.sh measure [FOLDER]' in done.stderr
    assert not commands


def test_script__collects_the_tests_for_a_gpu():
    found = subprocess.run(
        [sys.executable, '-m', 'pytest', '-m', 'gpu', '--collect-only', '-q']
        + ['tests/test_gpu.py'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert 'test_step__waits_for_nothing' in found.stdout
