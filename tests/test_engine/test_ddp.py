import subprocess
import sys
from pathlib import Path


def test_data_parallel__trains_two_cpu_ranks() -> None:
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'torch.distributed.run'),
            *('--standalone', '--nproc-per-node=2'),
            str(Path(__file__).with_name('ddp_worker.py')),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert 'rank 0 agrees' in done.stdout
    assert 'rank 1 agrees' in done.stdout
