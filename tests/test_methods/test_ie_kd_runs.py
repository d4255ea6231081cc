"""IE-KD in whole runs: phases, interruption and resumption."""

import copy
from pathlib import Path

import pytest
import torch

from era_mm.testing import differ, distillation_config, run_config, run_ranks

# 12 iterations, four per epoch; the seventh is the student's first.
PRETRAIN = 6


@pytest.fixture
def train(make_runner, coco, teacher_file, tmp_path):
    """Trains three epochs and tells what each iteration did."""

    loader = run_config({}, coco, tmp_path).train_dataloader
    # What augmentation draws is not part of a checkpoint.
    loader.dataset.pipeline = [
        step for step in loader.dataset.pipeline if step.type != 'RandomFlip'
    ]

    def run(name, resume=None):
        model = distillation_config(
            dict(type='era_mm.IEKDDistiller', pretrain_iters=PRETRAIN),
            checkpoint=teacher_file,
        )
        runner = make_runner(
            model,
            work_dir=tmp_path / name,
            experiment_name=name,
            train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=3, val_interval=9),
            resume=resume is not None,
            load_from=resume,
        )
        steps = {}
        train_step = type(runner.model).train_step

        def spy(model, data, optim_wrapper):
            before = copy.deepcopy(model.student.state_dict())
            inner = model.distillers['distiller'].inner
            coder = copy.deepcopy(inner.state_dict())
            logged = train_step(model, data, optim_wrapper)
            changed = (
                differ(before, model.student.state_dict()),
                differ(coder, inner.state_dict()),
            )
            steps[model.step] = (
                changed,
                {key: value.item() for key, value in logged.items()},
            )
            return logged

        runner.model.train_step = spy.__get__(runner.model)
        runner.train()
        return runner.model, steps

    return run


def test_run__phases_and_resumption_in_each(train, tmp_path):
    whole, expected = train('whole')
    assert list(expected) == list(range(12))
    for step, (changed, logged) in expected.items():
        student_changed, coder_changed = changed
        assert student_changed == (step >= PRETRAIN)
        assert coder_changed == (step < PRETRAIN)
        assert ('distiller.pretrain' in logged) == (step < PRETRAIN)
        assert ('loss_iekd_explore' in logged) == (step >= PRETRAIN)

    # Epoch 1 ends at iteration 4, inside the phase; epoch 2 at 8, after it.
    for epoch in (1, 2):
        model, steps = train(
            f'resumed_{epoch}',
            resume=str(tmp_path / 'whole' / f'epoch_{epoch}.pth'),
        )
        assert list(steps) == list(range(4 * epoch, 12))
        for step, (changed, logged) in steps.items():
            assert changed == expected[step][0], step
            assert logged == expected[step][1], step
        for mine, theirs in (
            (model.student, whole.student),
            (model.distillers, whole.distillers),
            (
                model.distillers['distiller'].inner,
                whole.distillers['distiller'].inner,
            ),
        ):
            assert not differ(mine.state_dict(), theirs.state_dict())


@pytest.fixture(scope='module')
def ranks(coco, teacher_file, tmp_path_factory):
    """What a rank has: extras and losses, by phase and first epoch."""
    out = tmp_path_factory.mktemp('ie_kd_ddp')
    worker = Path(__file__).with_name('ie_kd_ddp_worker.py')
    run_ranks(worker, coco, teacher_file, str(out))
    return lambda pretrain, epoch, rank: torch.load(
        out / f'pretrain_{pretrain}_from_{epoch}_{rank}.pth'
    )


@pytest.mark.parametrize('pretrain', [3, 0])
def test_ddp__two_ranks_end_with_the_same_factors(ranks, pretrain):
    (first, steps), (second, others) = (ranks(pretrain, 0, r) for r in (0, 1))
    # Weights of the extras; of the auto-encoder the statistics too, on which
    # the factors depend.
    assert any('encoders' in key for key in first)
    assert any('inner' in key and 'running' in key for key in first)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    # Each rank has images of its own.
    assert steps != others


# Interrupted within the phase; and where the coder learns to the end.
@pytest.mark.parametrize('pretrain', [3, 0])
def test_ddp__two_ranks_resumed_end_as_the_whole_run(ranks, pretrain):
    for rank in (0, 1):
        state, steps = ranks(pretrain, 0, rank)
        resumed, again = ranks(pretrain, 1, rank)
        assert list(again) == [2, 3]
        for step, logged in again.items():
            assert ('distiller.pretrain' in logged) == (step < pretrain)
            assert logged == pytest.approx(steps[step], rel=1e-5), step
        for key, value in state.items():
            torch.testing.assert_close(resumed[key], value)
