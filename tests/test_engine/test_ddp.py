from pathlib import Path

from era_mm.testing import run_ranks


def test_data_parallel__trains_two_cpu_ranks() -> None:
    printed = run_ranks(Path(__file__).with_name('ddp_worker.py'), timeout=300)
    assert 'rank 0 agrees' in printed
    assert 'rank 1 agrees' in printed
