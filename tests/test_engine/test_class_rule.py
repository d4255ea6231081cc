"""A teacher's head that knows other classes than the data does not judge."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS

from era_mm.core.classes import why_other_classes
from era_mm.engine.class_rule import leave_other_heads
from era_mm.engine.preflight_hook import add_preflight
from era_mm.engine.runner import TestingRunner, TrainingRunner
from era_mm.errors import UserError
from era_mm.testing import distillation_config, run_config
from era_mm.testing.toy import CLASSES

ERA = dict(type='era_mm.ERADistiller')
PKD = dict(type='era_mm.FeatureImitationDistiller')
OTHERS = ('lamp', 'chair', 'cross')


def test_names__are_compared_in_their_order_spelling_aside():
    assert why_other_classes(('a b', 'c'), ('A_b', 'c')) is None
    assert why_other_classes(None, ('a',)) is None
    assert why_other_classes(('a',), None) is None
    assert 'other ones or another order' in why_other_classes('ab', 'ac')
    assert 'other ones or another order' in why_other_classes('ab', 'ba')
    assert why_other_classes('ab', 'abc') == (
        'the teacher knows 3 classes and the data has 2'
    )


@pytest.fixture
def make(coco, teacher_file, tmp_path):
    """A run whose teacher knows classes of some names."""

    def build(distiller, classes=OTHERS, teacher=(), **kwargs):
        content = torch.load(teacher_file, weights_only=False)
        content['meta'] = {'dataset_meta': {'classes': classes}}
        file = tmp_path / 'others.pth'
        torch.save(content, file)
        model = distillation_config(distiller, checkpoint=str(file))
        model['teacher'] |= dict(teacher)
        kwargs.setdefault('preflight', dict(num_images=0))
        kwargs.setdefault('work_dir', tmp_path / 'run')
        # Nothing here is about validation.
        kwargs |= dict(val_dataloader=None, val_cfg=None, val_evaluator=None)
        config = run_config(
            model, coco, kwargs.pop('work_dir'), log_level='INFO', **kwargs
        )
        runner = TrainingRunner.from_cfg(Config(config))
        add_preflight(runner, runner.cfg)
        runner.register_hook(Terms())
        return runner

    return build


class Terms(Hook):
    """Keeps the names of what a step logs."""

    def __init__(self):
        self.names = set()

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.names |= set(outputs)


def terms_of(runner):
    runner.train()
    (hook,) = (h for h in runner.hooks if isinstance(h, Terms))
    return {name for name in hook.names if name.startswith('loss_era')}


def log_of(work_dir):
    (file,) = work_dir.glob('*/*.log')
    return file.read_text()


FEATURES = {'loss_era_align', 'loss_era_residual'}
HEADS = {'loss_era_logit', 'loss_era_box', 'loss_era_twi_logit'}


def test_era__goes_on_without_what_the_head_says(make, tmp_path):
    runner = make(ERA)
    assert terms_of(runner) == FEATURES
    log = log_of(tmp_path / 'run')
    (line,) = (text for text in log.splitlines() if 'ERA without' in text)
    assert "ERA without TWI and terms on the student's own logits: " in line
    assert 'same_classes=True' in line
    assert runner.model.distillers['distiller'].inference_modes() == ()
    assert 'loss_era_twi' not in log
    # Its files have what any other run's have, so they can be gone on with.
    again = make(
        ERA,
        work_dir=tmp_path / 'again',
        resume=True,
        load_from=str(tmp_path / 'run' / 'epoch_1.pth'),
    )
    assert terms_of(again) == FEATURES


def test_era__uses_the_head_where_the_config_says_they_are_the_same(make):
    terms = terms_of(make(ERA, teacher=dict(same_classes=True)))
    assert HEADS < terms


def test_era__uses_the_head_of_the_same_classes(make):
    names = [name.upper() for name in CLASSES]
    assert HEADS < terms_of(make(ERA, names))


def settle(runner):
    runner.model.init_weights()
    leave_other_heads(runner, runner.train_dataloader.dataset)
    return runner.model.distillers['distiller']


@pytest.mark.parametrize(
    'distiller',
    [
        ERA | dict(twi_steps='all'),
        ERA | dict(logit=dict(weight=2.0)),
        ERA | dict(twi_targets='both'),
        dict(type='era_mm.SoKDDistiller', base=ERA | dict(twi_steps='last')),
        dict(type='era_mm.LogitDistiller'),
        dict(type='era_mm.CrossKDDistiller'),
    ],
    ids=['twi', 'logit', 'targets', 'wrapped', 'logits', 'crosskd'],
)
def test_head__that_is_asked_for_by_name_is_refused(make, distiller):
    runner = make(distiller)
    with pytest.raises(UserError) as error:
        settle(runner)
    message = str(error.value)
    assert message.startswith("distiller 'distiller': ")
    assert 'but other ones or another order' in message
    assert 'teacher=dict(..., same_classes=True)' in message
    assert settle(make(distiller, CLASSES)).uses_predictions


def test_head__in_a_wrapped_distiller_does_not_judge_either(make):
    distiller = settle(make(dict(type='era_mm.SoKDDistiller', base=ERA)))
    assert distiller.base.twi_steps == 'none'
    assert not distiller.uses_predictions
    assert distiller.base.left_predictions
    assert set(distiller.absent_modes()) >= {'E0', 'T', 'ST'}


def test_features__teach_whatever_the_classes_are_called(make, tmp_path):
    runner = make(PKD, CLASSES[::-1])
    runner.train()
    log = log_of(tmp_path / 'run')
    assert 'in another order, 2 of 3 are elsewhere' in log
    assert 'Its features can teach, its predictions cannot.' in log
    off = ERA | dict(twi_steps='none', logit=None)
    terms = terms_of(make(off, CLASSES[::-1], work_dir=tmp_path / 'off'))
    assert terms == FEATURES


@pytest.mark.parametrize('classes', [OTHERS, CLASSES[::-1]])
def test_modes__that_go_through_such_a_head_are_left_out(
    make, tmp_path, classes
):
    """Of the config in the README: other names, and another order."""
    hook = dict(type='era_mm.TWIHook', modes=['E0', 'T', 'ST'])
    runner = make(ERA, classes, custom_hooks=[hook])
    assert terms_of(runner) == FEATURES
    log = log_of(tmp_path / 'run')
    (line,) = (text for text in log.splitlines() if 'TWIHook without' in text)
    assert 'TWIHook without E0, T, ST: student and teacher have the' in line
    runner = make(ERA, custom_hooks=[hook], work_dir=tmp_path / 'own')
    runner.model.inference_mode = 'T'
    with pytest.raises(UserError) as error:
        settle(runner)
    message = str(error.value)
    assert "model.inference_mode: Inference mode 'T' is not offered" in message
    assert 'same_classes=True' in message


def test_modes__of_a_test_do_not_go_through_such_a_head(make, tmp_path):
    hook = dict(type='era_mm.TWIHook', modes=['E0', 'T'])
    runner = make(ERA, custom_hooks=[hook])
    runner.train()
    config = copy.deepcopy(runner.cfg)
    config.load_from = str(tmp_path / 'run' / 'epoch_2.pth')
    found = []
    for same in (False, True):
        config.model.teacher.same_classes = same
        config.work_dir = str(tmp_path / f'test_{same}')
        config.experiment_name = f'test_{same}'
        tester = TestingRunner.from_cfg(config)
        found.append(tester.test())
        assert (
            'TWIHook without E0, T' in log_of(tmp_path / f'test_{same}')
        ) is not same
    plain, modes = found
    assert not any(key.startswith('T/') for key in plain)
    assert 'T/coco/bbox_mAP' in modes
    # Without modes no teacher is read.
    config.custom_hooks = []
    config.model.teacher.checkpoint = 'nowhere.pth'
    config.work_dir = str(tmp_path / 'alone')
    assert TestingRunner.from_cfg(config).test() == plain


def test_classes__of_another_number_in_the_files_are_other_ones(make):
    """The heads have three, and the file tells of more."""
    distiller = settle(make(ERA, (*CLASSES, 'more')))
    assert not distiller.uses_predictions


def test_cross_kd__of_another_number_of_classes_is_refused():
    config = distillation_config(dict(type='era_mm.CrossKDDistiller'))
    config['teacher']['config']['bbox_head']['num_classes'] = 5
    with pytest.raises(ValueError, match='has 5 classes and the student 3'):
        MODELS.build(config)
