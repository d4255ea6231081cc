"""The hook that looks before the first step, in real runs."""

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner

from era_mm import cli
from era_mm.engine import preflight_hook
from era_mm.engine.preflight_hook import (
    PreflightHook,
    add_preflight,
    check_length,
    unknown_classes,
)
from era_mm.engine.summary import summary_of
from era_mm.errors import UserError
from era_mm.testing import (
    detector_config,
    distillation_config,
    run_config,
    write_coco,
)
from era_mm.testing.toy import CLASSES

ERA = dict(type='era_mm.ERADistiller')


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def enough(tmp_path_factory):
    """As many objects as it takes."""
    return write_coco(tmp_path_factory.mktemp('enough'), num_images=50)


def make(root, work_dir, model, hook=True, **kwargs):
    kwargs = dict(log_level='INFO') | kwargs
    config = run_config(model, root, work_dir, **kwargs)
    if config.val_dataloader is not None:
        # So that reading an image of val draws random numbers.
        flip = dict(type='RandomFlip', prob=0.5)
        config.val_dataloader.dataset.pipeline.insert(3, flip)
    runner = Runner.from_cfg(Config(config))
    if hook:
        add_preflight(runner, runner.cfg)
    return runner


def log_of(work_dir):
    (file,) = Path(work_dir).glob('*/*.log')
    return file.read_text()


class LossRecorder(Hook):
    """Keeps all that the model returns in every iteration."""

    def __init__(self):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.losses.append({k: float(v) for k, v in outputs.items()})


# -- it changes nothing -----------------------------------------------------


def test_run__is_the_same_with_it_and_without(many, teacher_file, tmp_path):
    found = []
    for name, hook in (('with', True), ('without', False)):
        model = distillation_config(
            dict(era=ERA, dropping=dict(type='era_mm._Dropping')),
            checkpoint=teacher_file,
        )
        runner = make(
            many,
            tmp_path / name,
            model,
            hook,
            train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
            preflight=dict(num_images=16),
        )
        recorder = LossRecorder()
        runner.register_hook(recorder)
        runner.train()
        found.append((recorder.losses, runner.model.state_dict()))
    (losses, state), (expected, expected_state) = found
    assert len(losses) == 24
    assert losses == expected
    for key, value in expected_state.items():
        assert torch.equal(state[key], value), key
    log = log_of(tmp_path / 'with')
    assert 'What will be trained' in log
    assert 'teacher: coco/bbox_mAP' in log
    assert 'on 16 images of val' in log
    assert 'What will be trained' not in log_of(tmp_path / 'without')


# -- the summary ------------------------------------------------------------


def test_summary__counts_at_the_size_of_the_configs_images(many, tmp_path):
    # The val pipeline resizes to 64; the padding divides by 32.
    runner = make(many, tmp_path, distillation_config(ERA))
    for transform in runner.val_dataloader.dataset.pipeline.transforms:
        if type(transform).__name__ == 'Resize':
            transform.scale = (80, 80)
    text = summary_of(runner.model, preflight_hook._one_image(runner))
    assert text.splitlines()[0].endswith('GFLOPs for 96 x 96')


# -- which teachers it evaluates --------------------------------------------


def messages(many, tmp_path, model, **kwargs):
    runner = make(many, tmp_path / 'run', model, **kwargs)
    said: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())
    runner.logger.addHandler(handler)
    hook = next(h for h in runner.hooks if isinstance(h, PreflightHook))
    if hasattr(runner.model, 'load_teachers'):
        runner.model.load_teachers()
    # Built by `train` before the hooks are called; they say things, too.
    assert runner.train_loop is not runner.val_loop
    said.clear()
    hook.before_train(runner)
    runner.logger.removeHandler(handler)
    return [line for line in said if 'What will be' not in line]


def test_teachers__that_are_random_or_of_other_classes_are_not_evaluated(
    many, tmp_path, teacher_file
):
    config = distillation_config(ERA)
    assert messages(many, tmp_path, config) == [
        'teacher: random weights, not evaluated'
    ]
    coco = dict(config['teacher'], checkpoint=teacher_file)
    wide = copy.deepcopy(coco['config'])
    wide['bbox_head']['num_classes'] = 5
    state = MODELS.build(wide).state_dict()
    for name, meta in (('five', {}), ('named', {'CLASSES': tuple('abcde')})):
        file = tmp_path / f'{name}.pth'
        torch.save({'meta': meta, 'state_dict': state}, file)
        config['teacher'] = dict(config=wide, checkpoint=str(file))
        said = messages(many, tmp_path, config)
        if name == 'five':
            assert said == [
                'teacher: not evaluated, its head has 5 classes and the data 3'
            ]
        else:
            assert said[0].startswith('The teacher knows 5 classes')
            assert "class 0: 'square' in the data, 'a' in the" in said[0]
            assert said[1:] == [
                'teacher: not evaluated, its classes are not those of the data'
            ]


def test_teachers__each_is_evaluated_and_none_need_be_there(
    many, tmp_path, teacher_file
):
    config = distillation_config(dict(ERA, teacher='a'))
    entry = dict(config['teacher'], checkpoint=teacher_file)
    # The second is there for the start alone.
    config['teacher'] = dict(a=entry, b=copy.deepcopy(entry))
    config['student'] = detector_config(channels=24)
    config['inherit'] = dict(bbox_head='b')
    config['input_size'] = 64
    said = messages(
        many, tmp_path, config, preflight=dict(num_images=4, seconds=9)
    )
    assert [line[:2] for line in said] == ['a:', 'b:']
    assert all('on 4 images of val' in line for line in said)
    mutual = dict(
        type='era_mm.MutualDistillation',
        students=dict(a=detector_config(), b=detector_config(width=16)),
        distiller=dict(type='era_mm.IEKDDistiller'),
    )
    assert messages(many, tmp_path, mutual) == []


def test_teachers__that_cannot_be_evaluated_stop_no_run(
    many, tmp_path, teacher_file
):
    config = distillation_config(ERA, checkpoint=teacher_file)
    no_val = dict(val_cfg=None, val_dataloader=None, val_evaluator=None)
    assert messages(many, tmp_path, config, **no_val) == [
        'teacher: not evaluated, the config has no val_dataloader'
    ]
    evaluator = dict(
        type='CocoMetric', ann_file=f'{many}/annotations.json', metric='segm'
    )
    (said,) = messages(many, tmp_path, config, val_evaluator=evaluator)
    assert said.startswith('teacher: not evaluated, this raised ')


def test_teacher__near_chance_stops_before_the_first_step(
    enough, tmp_path, teacher_file
):
    runner = make(
        enough,
        tmp_path / 'run',
        distillation_config(ERA, checkpoint=teacher_file),
    )
    recorder = LossRecorder()
    runner.register_hook(recorder)
    with pytest.raises(UserError) as error:
        runner.train()
    message = str(error.value)
    assert message.startswith('pre-flight: the teacher is near chance: coco/')
    assert 'on 50 images of val with 50 objects' in message
    assert teacher_file in message
    assert "'bgr_to_rgb': True" in message
    assert 'preflight=False' in message
    assert not recorder.losses


def test_teacher__whose_classes_are_in_another_order_stops_the_run(
    many, tmp_path, teacher_file
):
    content = torch.load(teacher_file, weights_only=False)
    content['meta'] = {'dataset_meta': {'classes': CLASSES[::-1]}}
    torch.save(content, tmp_path / 'turned.pth')
    config = distillation_config(ERA, checkpoint=str(tmp_path / 'turned.pth'))
    with pytest.raises(UserError, match='2 of 3 are elsewhere'):
        messages(many, tmp_path, config)


@pytest.mark.parametrize(
    ('distiller', 'least'),
    [
        (
            dict(
                type='era_mm.ResidualKDDistiller',
                phases=dict(student=3, assistant=2, head=None),
            ),
            5,
        ),
        (dict(type='era_mm.IEKDDistiller', pretrain_iters=7), 7),
    ],
    ids=['phases', 'pretraining'],
)
def test_length__must_exceed_all_phases_but_the_last(distiller, least):
    model = MODELS.build(distillation_config(distiller))
    check_length(model, least + 1)
    with pytest.raises(UserError, match=f'the {least} iterations before'):
        check_length(model, least)


def test_length__must_exceed_the_start_of_every_schedule():
    distiller = ERA | dict(schedules={'loss_era_*': dict(start=8)})
    model = MODELS.build(distillation_config(distiller))
    check_length(model, 9)
    with pytest.raises(
        UserError, match=r"starts 'loss_era_\*' in iteration 8"
    ):
        check_length(model, 8)


def test_unknown_classes__are_counted_through_wrappers():
    def data(found, **images):
        return SimpleNamespace(
            metainfo=dict(classes=('a', 'b', 'c')), cat_ids=found, **images
        )

    assert unknown_classes(data([1, 2, 3])) == ''
    images = {1: [7], 2: [], 3: [7, 8]}
    remark = unknown_classes(data([1, 2, 3], cat_img_map=images))
    assert '1 of the 3 classes (b) have no training annotation' in remark
    images[2] = [9]
    assert unknown_classes(data([1, 2, 3], cat_img_map=images)) == ''
    wrapped = SimpleNamespace(dataset=data([1]))
    assert 'Only 1 of the 3 classes (a, b, c)' in unknown_classes(wrapped)
    assert unknown_classes(SimpleNamespace(metainfo={})) == ''


def test_run__that_ends_before_its_last_phase_does_not_begin(many, tmp_path):
    model = distillation_config(
        dict(
            type='era_mm.ResidualKDDistiller',
            phases=dict(student=99, head=None),
        )
    )
    runner = make(many, tmp_path, model)
    with pytest.raises(UserError, match=r"'distiller'.* would never train"):
        runner.train()
    assert runner.iter == 0


def test_resume__evaluates_nothing_again(many, tmp_path, teacher_file):
    config = distillation_config(ERA, checkpoint=teacher_file)
    off = dict(preflight=dict(num_images=0))
    make(many, tmp_path / 'a', config, **off).train()
    make(
        many,
        tmp_path / 'b',
        config,
        resume=True,
        load_from=str(tmp_path / 'a' / 'epoch_1.pth'),
    ).train()
    log = log_of(tmp_path / 'b')
    assert 'What will be trained' in log
    assert 'images of val' not in log
    assert (tmp_path / 'b' / 'epoch_2.pth').is_file()


# -- how it comes into a run ------------------------------------------------


def hooks_of(many, tmp_path, **kwargs):
    runner = make(many, tmp_path, distillation_config(ERA), **kwargs)
    return [h for h in runner.hooks if isinstance(h, PreflightHook)]


def test_key__turns_it_off_and_gives_it_arguments(many, tmp_path):
    (hook,) = hooks_of(many, tmp_path)
    assert (hook.num_images, hook.seconds) == (64, 60)
    (hook,) = hooks_of(many, tmp_path, preflight=True)
    (hook,) = hooks_of(many, tmp_path, preflight=dict(num_images=5))
    assert (hook.num_images, hook.seconds) == (5, 60)
    assert not hooks_of(many, tmp_path, preflight=False)
    # One that the config lists, for another launcher, is not doubled.
    listed = [dict(type='era_mm.PreflightHook', num_images=3)]
    (hook,) = hooks_of(many, tmp_path, custom_hooks=listed)
    assert hook.num_images == 3
    with pytest.raises(UserError, match='expected True, False, or a dict'):
        hooks_of(many, tmp_path, preflight='no')
    with pytest.raises(TypeError, match="Did you mean 'num_images'"):
        hooks_of(many, tmp_path, preflight=dict(num_image=3))


def test_plain_model__is_left_alone(many, tmp_path):
    assert messages(many, tmp_path, detector_config()) == []


def test_train__that_stops_leaves_the_former_runs_config(
    enough, tmp_path, teacher_file, capsys
):
    work_dir = tmp_path / 'run'
    config = Config(
        run_config(
            distillation_config(ERA, checkpoint=teacher_file), enough, work_dir
        ).to_dict()
    )
    file = tmp_path / 'toy.py'
    config.dump(file)
    work_dir.mkdir()
    (work_dir / 'toy.py').write_text('former = True\n')
    assert cli.run_train([str(file)]) == 1
    printed = capsys.readouterr().err
    assert 'error: pre-flight: the teacher is near chance' in printed
    assert 'Traceback' not in printed
    assert (work_dir / 'toy.py').read_text() == 'former = True\n'
    assert not list(work_dir.glob('*.pth'))

    options = ['preflight=False', 'train_cfg.max_epochs=1']
    # Two steps, and no validation.
    options += ['train_cfg.val_interval=9', 'train_dataloader.batch_size=25']
    assert cli.run_train([str(file), '--cfg-options', *options]) == 0
    dumped = Config.fromfile(work_dir / 'toy.py')
    assert dumped.train_cfg.max_epochs == 1
    assert dumped.preflight is False
    assert (work_dir / 'epoch_1.pth').is_file()


@pytest.mark.slow
def test_ddp__all_ranks_stop_together(enough, tmp_path, teacher_file):
    config = run_config(
        distillation_config(ERA, checkpoint=teacher_file),
        enough,
        tmp_path / 'run',
    )
    Config(config.to_dict()).dump(tmp_path / 'toy.py')
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'torch.distributed.run'),
            *('--standalone', '--nproc-per-node=2'),
            *('tools/train.py', str(tmp_path / 'toy.py')),
            *('--launcher', 'pytorch'),
        ],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=300,
    )
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert output.count('error: pre-flight: the teacher is near') == 2, output
    assert not list((tmp_path / 'run').glob('*.pth'))
