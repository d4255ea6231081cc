"""The run's visualizer gets pictures and shares; the run stays as it is."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.logging import MessageHub

from era_mm import testing
from era_mm.report.runs import read_run

ERA = dict(type='era_mm.ERADistiller', mbrnet=dict(num_branches=2))
HOOK = dict(type='era_mm.ResidualVisHook', interval=4, num_images=2)


def train(make_runner, model, work_dir, hooks):
    MessageHub.get_instance(str(work_dir))
    runner = make_runner(
        model, work_dir=work_dir, custom_hooks=hooks, log_level='INFO'
    )
    runner.train()
    return runner


def test_hook__pictures_shares_and_an_unchanged_run(
    make_runner, teacher_file, tmp_path
):
    model = testing.distillation_config(ERA, checkpoint=teacher_file)
    plain = train(make_runner, model, tmp_path / 'without', [])
    seen = train(make_runner, model, tmp_path / 'with', [HOOK])
    # Eight iterations: looked at after the fourth and the eighth.
    names = {p.name for p in (tmp_path / 'with').rglob('*.png')}
    assert names == {
        f'residuals_image{image}_level{level}_{step}.png'
        for image in (0, 1)
        for level in (0, 1)
        for step in (4, 8)
    }
    run = read_run(tmp_path / 'with')
    assert set(run.levels) == {
        f'residuals/unexplained_e{i}_level{level}'
        for i in range(3)
        for level in range(2)
    }
    series = run.levels['residuals/unexplained_e0_level0']
    assert [step for step, _ in series] == [4, 8]
    assert all(0 < value < 10 for _, value in series)
    # Validation and losses are read as before.
    assert run.val.keys() == read_run(tmp_path / 'without').val.keys()
    weights = seen.model.state_dict()
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    for key, value in plain.model.distillers['distiller'].state_dict().items():
        other = seen.model.distillers['distiller'].state_dict()[key]
        assert torch.equal(value, other), key
    (log,) = (tmp_path / 'with').glob('*/*.log')
    assert 'ResidualVisHook took' in log.read_text()


def test_hook__shares_are_those_of_the_losses(
    make_runner, teacher_file, tmp_path
):
    from era_mm.report.parts import parts_of

    model = testing.distillation_config(ERA, checkpoint=teacher_file)
    runner = train(make_runner, model, tmp_path / 'run', [])
    loader = runner.val_dataloader
    batch = loader.collate_fn([loader.dataset[0], loader.dataset[1]])
    parts, names = parts_of(runner.model, batch)
    assert names == ['e0', 'e1', 'e2']
    runner.model.eval()
    (expected,) = runner.model.compare(batch).values()
    torch.testing.assert_close(parts.shares.mean(dim=0), expected)


def test_hook__of_several_ranks_the_first_works_alone(
    coco, teacher_file, tmp_path
):
    """No rank waits for ever, and each ends as it does without the hook."""
    worker = Path(__file__).with_name('vis_ddp_worker.py')
    testing.run_ranks(worker, coco, teacher_file, str(tmp_path), timeout=600)
    for rank in (0, 1):
        seen, plain = (
            torch.load(tmp_path / f'{name}_rank{rank}.pth')
            for name in ('with', 'without')
        )
        assert seen.keys() == plain.keys()
        for key, value in plain.items():
            assert torch.equal(value, seen[key]), (rank, key)
    # One picture for each image, level and look, from one rank.
    pictures = sorted(p.name for p in (tmp_path / 'with').rglob('*.png'))
    steps = {name.rpartition('_')[2] for name in pictures}
    assert pictures == sorted(
        f'residuals_image0_level{level}_{step}'
        for level in (0, 1)
        for step in steps
    )
    run = read_run(tmp_path / 'with')
    series = run.levels['residuals/unexplained_e0_level0']
    assert len(series) == len(steps) >= 2


def test_hook__reaches_tensorboard(make_runner, teacher_file, tmp_path):
    loader = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator'
    )
    model = testing.distillation_config(ERA, checkpoint=teacher_file)
    runner = make_runner(
        model,
        work_dir=tmp_path / 'run',
        custom_hooks=[HOOK],
        visualizer=dict(
            type='Visualizer',
            vis_backends=[dict(type='TensorboardVisBackend')],
        ),
    )
    runner.train()
    runner.visualizer.close()
    (events,) = (tmp_path / 'run').rglob('events.out*')
    found = loader.EventAccumulator(str(events))
    found.Reload()
    assert 'residuals_image0_level0' in found.Tags()['images']
    assert 'residuals/unexplained_e2_level1' in found.Tags()['scalars']


def test_hook__refuses_a_plain_run(make_runner, tmp_path):
    runner = make_runner(testing.detector_config(), custom_hooks=[HOOK])
    with pytest.raises(TypeError, match='Remove the hook'):
        runner.train()


def test_hook__refuses_no_images():
    from era_mm.engine import ResidualVisHook

    with pytest.raises(ValueError, match='num_images'):
        ResidualVisHook(num_images=0)


def test_scalars__are_plain_json(make_runner, teacher_file, tmp_path):
    model = testing.distillation_config(ERA, checkpoint=teacher_file)
    train(make_runner, model, tmp_path / 'run', [HOOK])
    (scalars,) = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    for line in scalars.read_text().splitlines():
        json.loads(line)
