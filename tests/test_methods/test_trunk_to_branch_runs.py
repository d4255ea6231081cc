"""Trunk-to-Branch in whole runs, on one rank and on two."""

from pathlib import Path

import pytest
import torch

from era_mm.core import extras_of
from era_mm.testing import detector_config, run_ranks

WORKER = Path(__file__).with_name('trunk_to_branch_ddp_worker.py')


@pytest.mark.smoke
def test_run__shows_the_correlation_and_goes_on(make_runner, tmp_path):
    def run(**kwargs):
        runner = make_runner(
            dict(
                type='era_mm.Distillation',
                student=detector_config(),
                distiller=dict(type='era_mm.TrunkToBranchDistiller'),
            ),
            experiment_name=kwargs['work_dir'].name,
            **kwargs,
        )
        runner.train()
        return runner

    whole = run(work_dir=tmp_path / 'whole')
    for key in ('correlation', 'embed_std', 'score_trunk', 'score_ensemble'):
        history = whole.message_hub.get_scalar(f'train/t2b_{key}').data[0]
        assert len(history) == 8
        assert all(0 < value < 1 for value in history)
    # 0.27 of 8 iterations: t = 0, 1, 2 of 2.16, then 1.
    history = whole.message_hub.get_scalar('train/t2b_ramp').data[0]
    expected = [0.0067, 0.2364, 0.9729, 1, 1, 1, 1, 1]
    assert list(history) == pytest.approx(expected, abs=5e-5)

    resumed = run(
        work_dir=tmp_path / 'resumed',
        resume=True,
        load_from=str(tmp_path / 'whole/epoch_1.pth'),
    )
    history = resumed.message_hub.get_scalar('train/t2b_ramp').data[0]
    assert list(history)[-4:] == [1, 1, 1, 1]
    # It went on with the extras of the file, which are the later ones now.
    extras = [
        extras_of(torch.load(file, weights_only=False)['state_dict'])
        for file in (
            tmp_path / 'whole/epoch_1.pth',
            tmp_path / 'resumed/epoch_2.pth',
        )
    ]
    steps = [
        extra['distiller']['state_dict'][
            'peers.permeation.norms.0.num_batches_tracked'
        ]
        for extra in extras
    ]
    assert steps == [4, 8]


@pytest.fixture(scope='module')
def ranks(coco, tmp_path_factory):
    """What two gloo ranks found."""
    out = tmp_path_factory.mktemp('t2b_ddp')
    run_ranks(WORKER, coco, str(out), timeout=300)
    return [torch.load(out / f'rank{rank}.pth') for rank in (0, 1)]


@pytest.mark.parametrize('name', ['correlation', 'uneven'])
def test_ddp__decorrelation_is_that_of_the_joint_batch(ranks, name):
    joint = ranks[0]['joint'][name]
    assert all(value.abs().max() > 0 for value in joint.values())
    values = [rank['found'][name].pop('value') for rank in ranks]
    torch.testing.assert_close(sum(values) / 2, joint['value'])
    # Both ranks know the statistics of all.
    assert torch.equal(values[0], values[1])
    for rank in ranks:
        for key, gradient in rank['found'][name].items():
            torch.testing.assert_close(gradient, joint[key])


def test_ddp__two_ranks_end_with_the_same_weights(ranks):
    assert any('branches' in key for key in ranks[0]['weights'])
    for key, value in ranks[0]['weights'].items():
        assert torch.equal(value, ranks[1]['weights'][key]), key
    assert ranks[0]['logged'] == ranks[1]['logged']
