"""TWIHook in real runs: modes evaluated in one pass, weights guarded."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from era_mm.testing import (
    detector_config,
    distillation_config,
    run_ranks,
)

ERA = dict(type='era_mm.ERADistiller', mbrnet=dict(num_branches=2))
HOOK = dict(type='era_mm.TWIHook', modes=['S', 'E0', 'E1', 'T', 'ST'])


class Metrics(Hook):
    """Keeps what validation or test reported."""

    priority = 'LOWEST'

    def after_val_epoch(self, runner, metrics=None):
        self.found = dict(metrics)

    after_test_epoch = after_val_epoch


@pytest.fixture
def trained(make_runner, teacher_file, tmp_path):
    runner = make_runner(
        distillation_config(ERA, checkpoint=teacher_file),
        work_dir=tmp_path / 'train',
        custom_hooks=[HOOK],
        log_level='INFO',
        train_cfg=dict(by_epoch=True, max_epochs=6, val_interval=6),
        optim_wrapper=dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=0.003),
            clip_grad=dict(max_norm=5.0),
        ),
    )
    metrics = Metrics()
    runner.register_hook(metrics)
    calls = []
    runner.model.student.backbone.register_forward_hook(
        lambda module, args, output: calls.append(module.training)
    )
    runner.train()
    return metrics.found, calls, tmp_path / 'train' / 'epoch_6.pth'


def evaluate(make_runner, model, work_dir, file, hooks=()):
    runner = make_runner(
        model,
        work_dir=work_dir,
        load_from=str(file),
        custom_hooks=list(hooks),
    )
    metrics = Metrics()
    runner.register_hook(metrics)
    runner.test()
    return metrics.found


def test_modes__one_pass_gives_what_separate_runs_give(
    trained, make_runner, teacher_file, tmp_path
):
    found, calls, file = trained
    # Those of validation alone, before the modes' metrics.
    shares = [f'era/unexplained_e{step}' for step in range(3)]
    for key in shares:
        assert 0 < found.pop(key)
    prefixes = {key.rpartition('coco/')[0] for key in found}
    assert prefixes == {'', 'E0/', 'E1/', 'T/', 'ST/'}
    # Features once per validation batch, whatever the number of modes, and
    # once more to compare the estimates.
    assert calls.count(False) == 4 + 4
    values = {
        prefix: found[f'{prefix}coco/bbox_mAP_50'] for prefix in prefixes
    }
    assert len(set(values.values())) > 1, values
    # And a user sees them: in the log and in what dashboards read.
    logs = list(file.parent.glob('*/*.log'))
    scalars = list(file.parent.glob('*/vis_data/scalars.json'))
    for text in (logs[0].read_text(), scalars[0].read_text()):
        assert 'T/coco/bbox_mAP' in text
        assert 'E1/coco/bbox_mAP' in text
        assert 'era/unexplained_e2' in text

    # The file alone gives the same again: extras come with it.
    model = distillation_config(ERA, checkpoint=teacher_file)
    again = evaluate(
        make_runner, copy.deepcopy(model), tmp_path / 'again', file, [HOOK]
    )
    assert again == found
    # As does each mode as the model's own prediction, without the hook.
    for mode in ('E0', 'E1', 'T', 'ST'):
        alone = evaluate(
            make_runner,
            {**copy.deepcopy(model), 'inference_mode': mode},
            tmp_path / mode,
            file,
        )
        expected = {
            key.removeprefix(f'{mode}/'): value
            for key, value in found.items()
            if key.startswith(f'{mode}/')
        }
        assert alone == expected, mode
    # S is the plain student, by stock mmdet.
    plain = evaluate(make_runner, model['student'], tmp_path / 'S', file)
    assert plain == {k: v for k, v in found.items() if k.count('/') == 1}


def test_modes__unknown_one_stops_before_training(make_runner, teacher_file):
    runner = make_runner(
        distillation_config(ERA, checkpoint=teacher_file),
        custom_hooks=[dict(type='era_mm.TWIHook', modes=['E7'])],
    )
    with pytest.raises(ValueError, match=r"'E7' is not offered.*'E1'"):
        runner.train()
    assert runner.iter == 0


def log_of(runner):
    (file,) = Path(runner.work_dir).glob('*/*.log')
    return file.read_text()


def test_modes__left_out_ones_must_not_be_watched(make_runner):
    teacher = detector_config(width=16, channels=24)
    teacher['bbox_head'] |= dict(num_classes=7)
    runner = make_runner(
        distillation_config(ERA, teacher=teacher),
        custom_hooks=[dict(type='era_mm.TWIHook', modes=['E0'])],
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook', save_best='E0/coco/bbox_mAP'
            )
        ),
    )
    with pytest.raises(ValueError, match=r'save_best=.E0/coco.*that mode: '):
        runner.train()


@pytest.mark.parametrize('several', [False, True])
def test_modes__that_a_pair_does_not_have_are_left_out(
    several, make_runner, tmp_path
):
    """The config of the README with a teacher of other classes."""
    teacher = detector_config(width=16, channels=24)
    teacher['bbox_head'] |= dict(num_classes=7)
    distiller = ERA
    if several:
        pkd = dict(type='era_mm.FeatureImitationDistiller')
        distiller = dict(era=ERA, pkd=pkd)
    names = ['era.E0', 'era.ST'] if several else ['E0', 'ST']
    hook = dict(type='era_mm.TWIHook', modes=names)
    runner = make_runner(
        distillation_config(distiller, teacher=teacher),
        custom_hooks=[hook],
        log_level='INFO',
        train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=1),
    )
    metrics = Metrics()
    runner.register_hook(metrics)
    runner.train()
    assert not any(name in key for key in metrics.found for name in names)
    assert 'coco/bbox_mAP' in metrics.found
    # What the estimates explain is told without a head as well.
    assert 0 < metrics.found['era/unexplained_e2']
    assert 'branch 1, 2 adds less than 0.1%' in log_of(runner)
    (line,) = (
        t for t in log_of(runner).splitlines() if 'TWIHook without' in t
    )
    assert (
        f'TWIHook without {", ".join(names)}: the teacher has 7 classes'
        in (line)
    )
    # A name that no pair has is a mistake there, too.
    typo = make_runner(
        distillation_config(distiller, teacher=teacher),
        work_dir=tmp_path / 'typo',
        custom_hooks=[dict(hook, modes=[*names, 'TS'])],
    )
    with pytest.raises(ValueError, match="'TS' is not offered"):
        typo.train()


def test_weights__written_to_during_training_are_noticed(
    make_runner, teacher_file
):
    class Vandal(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            head = runner.model.teachers['teacher'].model.bbox_head
            with torch.no_grad():
                head.retina_cls.bias[0] += 1e-6

    runner = make_runner(
        distillation_config(ERA, checkpoint=teacher_file),
        custom_hooks=[dict(type='era_mm.TWIHook', modes=['S'])],
    )
    runner.register_hook(Vandal())
    with pytest.raises(RuntimeError, match='after training are not those of'):
        runner.train()


def test_modes__hook_leaves_the_model_as_it_was(make_runner, teacher_file):
    runner = make_runner(
        distillation_config(ERA, checkpoint=teacher_file),
        custom_hooks=[HOOK],
        train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=1),
    )
    runner.train()
    assert runner.model.active_modes == ()
    assert runner.model.mode_predictions == {}


@pytest.mark.parametrize(
    ('ema', 'modes', 'said'),
    [
        ('EMAHook', ['S', 'E0', 'T'], True),
        ('mmpretrain.EMAHook', ['T'], True),
        ('era_mm.EMAHook', ['T'], False),
        ('EMAHook', ['S'], False),
    ],
)
def test_modes__say_if_the_student_alone_is_averaged(
    make_runner, teacher_file, ema, modes, said
):
    runner = make_runner(
        distillation_config(ERA, checkpoint=teacher_file),
        custom_hooks=[
            dict(type='era_mm.TWIHook', modes=modes),
            dict(type=ema),
        ],
        log_level='WARNING',
    )
    runner.call_hook('before_run')
    names = ', '.join(mode for mode in modes if mode != 'S')
    text = f'EMAHook averages the student alone: {names} use the averaged'
    assert (text in log_of(runner)) == said
    assert ('averages the student alone' in log_of(runner)) == said


def test_hook__on_a_plain_model_is_refused(make_runner):
    runner = make_runner(detector_config(), custom_hooks=[HOOK])
    with pytest.raises(TypeError, match='Distillation'):
        runner.train()


def test_testing__needs_no_teacher_weights(
    trained, make_runner, teacher_file, tmp_path
):
    # S mode of a distilled file must not fetch the teacher.
    found, _, file = trained
    model = distillation_config(ERA, checkpoint='https://nowhere/t.pth')
    alone = evaluate(make_runner, model, tmp_path / 'no_teacher', file)
    assert alone == {k: v for k, v in found.items() if k.startswith('coco/')}


def test_ddp__a_rank_without_images_lets_the_other_go_on(
    coco, teacher_file, tmp_path
):
    worker = Path(__file__).with_name('twi_ddp_worker.py')
    run_ranks(worker, coco, teacher_file, str(tmp_path), timeout=120)
    for images, split in ((1, (1, 0)), (3, (2, 1))):
        ranks = [
            torch.load(tmp_path / f'{images}_rank{rank}.pth')
            for rank in (0, 1)
        ]
        assert tuple(len(measured) for measured, _ in ranks) == split
        # Each batch counts alike, on whatever rank it was.
        rows = torch.tensor([row for measured, _ in ranks for row in measured])
        for _, reported in ranks:
            shares = [
                value
                for key, value in reported.items()
                if key.startswith('era/unexplained_e')
            ]
            assert shares == pytest.approx(rows.mean(dim=0).tolist())
