"""Small helpers of tests: noise, training steps, and what has changed."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from torch import Tensor

#: What the steps of a training have: its log and its gradients, by name.
Steps = Sequence[tuple[Mapping[str, float], Mapping[str, Tensor]]]


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


def train_steps(
    model: BaseModel, batches: Iterable[dict], begin: int = 0
) -> Steps:
    """Train by plain SGD, lr 0.001.

    Args:
        model: The model.
        batches: Preprocessed batches, one for each step.
        begin: The run's iteration in the first of them.

    Returns:
        Logged losses, and gradients of the parameters that get one.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = []
    for step, batch in enumerate(batches, begin):
        MessageHub.get_current_instance().update_info('iter', step)
        total, log = model.parse_losses(model(**batch, mode='loss'))
        optimizer.zero_grad()
        total.backward()
        gradients = {
            name: p.grad.clone()
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        optimizer.step()
        found.append(
            ({k: float(v.detach()) for k, v in log.items()}, gradients)
        )
    return found


def assert_same_steps(found: Steps, expected: Steps, rtol: float) -> None:
    """Fail if two trainings differ.

    Args:
        found: See :func:`train_steps`.
        expected: Likewise.
        rtol: Of losses; of gradients to their largest value.
    """
    for (losses, gradients), (wanted, expected_gradients) in zip(
        found, expected, strict=True
    ):
        assert set(losses) == set(wanted)
        for name, value in wanted.items():
            assert abs(losses[name] - value) <= max(
                rtol * abs(value), 1e-12
            ), (name, losses[name], value)
        assert set(gradients) == set(expected_gradients)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(
                gradients[name],
                gradient,
                rtol=rtol,
                atol=rtol * float(gradient.abs().max()) + 1e-12,
                msg=name,
            )


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
