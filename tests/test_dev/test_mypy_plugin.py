"""The types that mypy sees: torch's own, submodules as they come."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import torch
from torch import nn

layers = nn.ModuleDict({'a': nn.Linear(1, 1)})
layers['a'].weight.shape
for layer in nn.ModuleList():
    layer.anything[0]()
nn.Module().some.child(1)
torch.zeros(1).nothing
nn.Linear(1, 1, bias='x')
"""


def test_mypy__sees_torchs_types_and_lets_submodules_be_called(tmp_path):
    file = tmp_path / 'code.py'
    file.write_text(CODE)
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'mypy'),
            *('--config-file', ROOT / 'pyproject.toml', file),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = [line for line in done.stdout.splitlines() if ': error:' in line]
    assert [line.split(': ')[0].split(':')[-1] for line in found] == [
        '10',
        '11',
    ], done.stdout
