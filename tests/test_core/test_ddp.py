"""Invariant 6: DDP with find_unused_parameters=False, on two CPU ranks."""

from pathlib import Path

import pytest
import torch

from era_mm.testing import run_ranks

WORKER = Path(__file__).with_name('ddp_worker.py')


@pytest.fixture(scope='module')
def out(coco, teacher_file, tmp_path_factory):
    """Where two ranks have trained every variant of ERA."""
    out = tmp_path_factory.mktemp('ddp')
    run_ranks(WORKER, coco, teacher_file, str(out), timeout=300)
    return out


@pytest.mark.parametrize(
    'name', ['all', 'sampled', 'none', 'detached', 'off', 'lone']
)
def test_ddp__two_ranks_end_with_the_same_weights(name, out):
    ranks = [torch.load(out / f'{name}_rank{rank}.pth') for rank in (0, 1)]
    assert any('mbrnet' in key for key in ranks[0])
    for key, value in ranks[0].items():
        assert torch.equal(value, ranks[1][key]), key
        assert value.isfinite().all(), key


@pytest.mark.parametrize('name', ['all', 'sampled', 'none', 'detached'])
def test_ddp__distilling_reaches_the_student(name, out):
    """Hooks that a wrapper's prefix hides would leave it a plain run."""
    found, plain = (
        torch.load(out / f'{run}_rank0.pth') for run in (name, 'off')
    )
    key = 'backbone.layer3.0.conv1.weight'
    assert not torch.equal(found[key], plain[key])
