"""Small helpers of tests: noise, and what has changed."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def noise(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Standard normal numbers, the same for a seed.

    Args:
        shape: Of the tensor.
        seed: Of a generator of its own.
        dtype: In double precision, so that references agree closely.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def differ(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether any tensor of a state dict is another one."""
    return any(not torch.equal(v, after[k]) for k, v in before.items())


def checksums(folder: Path) -> dict[Path, bytes]:
    """The SHA-256 of every file below a folder, by its path there."""
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).digest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def run_ranks(worker: str | Path, *arguments: str, timeout: int = 500) -> str:
    """Run a script on two ranks of this machine, on the CPU.

    Args:
        worker: The script.
        arguments: Its arguments.
        timeout: In seconds.

    Returns:
        What the ranks printed.

    Raises:
        AssertionError: One of them failed; its last lines are the message.
    """
    result = subprocess.run(
        [
            *(sys.executable, '-m', 'torch.distributed.run'),
            *('--standalone', '--nproc-per-node=2', str(worker), *arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1'),
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return result.stdout
