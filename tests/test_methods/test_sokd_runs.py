"""SoKD in whole runs: the search's end, resumption, ranks, the hook."""

import copy
import json
from pathlib import Path

import pytest
import torch

from era_mm.testing import differ, distillation_config, run_config, run_ranks


@pytest.fixture
def train(make_runner, coco, teacher_file, tmp_path):
    """Trains three epochs of four iterations; what each has logged."""

    loader = run_config({}, coco, tmp_path).train_dataloader
    # What augmentation draws is not part of a checkpoint.
    loader.dataset.pipeline = [
        step for step in loader.dataset.pipeline if step.type != 'RandomFlip'
    ]

    def run(name, resume=None):
        model = distillation_config(
            dict(
                type='era_mm.SoKDDistiller',
                dam=dict(anchor='boxes'),
                search_share=0.5,
            ),
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
            custom_hooks=[dict(type='era_mm.PolicyHook', interval=3)],
        )
        steps = {}
        train_step = type(runner.model).train_step

        def spy(model, data, optim_wrapper):
            policy = model.distillers['distiller'].policy
            before = copy.deepcopy(policy.state_dict())
            logged = train_step(model, data, optim_wrapper)
            steps[model.step] = (
                differ(before, policy.state_dict()),
                {key: value.item() for key, value in logged.items()},
            )
            return logged

        runner.model.train_step = spy.__get__(runner.model)
        runner.train()
        return runner.model, steps

    return run


def test_run__searches_its_share_and_resumes_with_its_state(train, tmp_path):
    whole, expected = train('whole')
    assert list(expected) == list(range(12))
    for step, (searched, logged) in expected.items():
        assert searched == (step < 6)
        assert logged['sokd_searching'] == (step < 6)
    lines = [
        json.loads(line)
        for line in (tmp_path / 'whole/sokd_policy.jsonl')
        .read_text()
        .splitlines()
    ]
    assert [line['step'] for line in lines] == [0, 3, 6, 9, 12]
    assert lines[0]['probability'] != lines[2]['probability']
    assert lines[2] | {'step': 0} == lines[4] | {'step': 0}
    policy = whole.distillers['distiller'].policy
    assert lines[4]['gate'] == policy.beta.tolist()
    assert lines[4]['usage'] == {
        name: list(pair) for name, pair in policy.usage().items()
    }
    assert lines[0]['policies'][0] == ['Identity', 'Identity']

    # Epoch 1 ends at iteration 4, in the search; epoch 2 at 8, after it.
    for epoch in (1, 2):
        model, steps = train(
            f'resumed_{epoch}',
            resume=str(tmp_path / 'whole' / f'epoch_{epoch}.pth'),
        )
        assert list(steps) == list(range(4 * epoch, 12))
        for step, found in steps.items():
            assert found == expected[step], step
        for mine, theirs in (
            (model.student, whole.student),
            (model.distillers, whole.distillers),
            (
                model.distillers['distiller'].policy,
                whole.distillers['distiller'].policy,
            ),
        ):
            assert not differ(mine.state_dict(), theirs.state_dict())


def test_hook__refuses_a_model_without_a_policy(make_runner, teacher_file):
    for options in (
        dict(type='era_mm.FeatureImitationDistiller'),
        dict(type='era_mm.SoKDDistiller', dafa=False),
    ):
        runner = make_runner(
            distillation_config(options, checkpoint=teacher_file),
            experiment_name=str(len(options)),
            custom_hooks=[dict(type='era_mm.PolicyHook')],
        )
        with pytest.raises(TypeError, match='one SoKDDistiller'):
            runner.train()


def test_ddp__all_ranks_sample_and_learn_the_same_policy(
    coco, teacher_file, tmp_path
):
    worker = Path(__file__).with_name('sokd_ddp_worker.py')
    run_ranks(worker, coco, teacher_file, str(tmp_path), timeout=300)
    for order in ('first', 'second'):
        first, second = (
            torch.load(tmp_path / f'{order}_rank{rank}.pth') for rank in (0, 1)
        )
        # Other images, so another L_aug, but the same draws.
        assert first['losses'] != second['losses']
        assert len(first['draws']) == 4
        assert len({tuple(draw) for draw in first['draws']}) > 1
        assert first['draws'] == second['draws']
        for key, value in first['weights'].items():
            assert torch.equal(value, second['weights'][key]), key
        policy = first['policy']
        assert all(
            torch.equal(v, second['policy'][k]) for k, v in policy.items()
        )
        assert policy['alpha'].std() > 0
