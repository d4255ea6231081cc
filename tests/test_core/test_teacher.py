"""The teacher: its weights, its depth, its precision."""

import copy
import logging

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import MODELS
from torch import nn

from era_mm.core.teacher import Teacher, classes_of
from era_mm.registry import MODELS as ERA_MODELS
from era_mm.testing import (
    detection_batch,
    detector_config,
    distillation_config,
)

ERA = dict(type='era_mm.ERADistiller')


def test_teacher__dtype_is_what_its_layers_run_in():
    config = distillation_config(ERA)
    config['teacher'] |= dict(dtype='bfloat16')
    model = MODELS.build(config)
    teacher = model.teachers['teacher']
    seen = []
    teacher.model.backbone.conv1.register_forward_hook(
        lambda m, a, out: seen.append(out.dtype)
    )
    feats = teacher.extract(torch.randn(2, 3, 64, 64))
    assert seen == [torch.bfloat16]
    assert {f.dtype for f in feats['neck']} == {torch.float32}


@ERA_MODELS.register_module(name='_Unset', force=True)
class Unset(BaseModel):
    """Leaves memory as it found it, as Deformable DETR does, and names files.

    Its weights are numbers only once `init_weights` has run.
    """

    def __init__(self, init_cfg=None):
        super().__init__()
        self.part = UnsetPart(init_cfg)
        self.found = nn.Parameter(torch.full((2, 2), float('nan')))

    def init_weights(self):
        super().init_weights()
        nn.init.normal_(self.found)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.part.conv(inputs)


class UnsetPart(BaseModule):
    """As Swin it asserts a file where it is told of any initialisation.

    As DetectoRS it keeps the name of the file.
    """

    def __init__(self, init_cfg):
        super().__init__(init_cfg=init_cfg)
        self.conv = nn.Conv2d(3, 2, 1)
        self.pretrained = init_cfg and 'no/such.pth'

    def init_weights(self):
        assert self.init_cfg != []
        assert self.pretrained is None
        super().init_weights()


FILE = dict(type='Pretrained', checkpoint='no/such.pth')


CONSTANT = dict(type='Constant', layer='Conv2d', val=0.25)


@pytest.mark.parametrize(
    ('init_cfg', 'set_by_config'),
    [(None, False), (FILE, False), (CONSTANT, True), ([FILE, CONSTANT], True)],
)
@pytest.mark.parametrize('listed', [False, True])
def test_teacher__random_starts_as_a_training_does_without_files(
    init_cfg, set_by_config, listed, monkeypatch
):
    if listed and isinstance(init_cfg, dict):
        init_cfg = [init_cfg]
    logger = MMLogger.get_current_instance()
    handler, records = logging.Handler(), []
    handler.emit = records.append
    monkeypatch.setattr(logger, 'handlers', [handler])
    logger.warning('heard')
    state = torch.get_rng_state()
    teacher = Teacher(
        config=dict(type='era_mm._Unset', init_cfg=init_cfg),
        checkpoint='random',
    )
    teacher.load()
    assert torch.equal(state, torch.get_rng_state())
    assert teacher.model.found.isfinite().all()
    weight = teacher.model.part.conv.weight
    assert (weight == 0.25).all() == set_by_config
    assert teacher.fingerprint() == teacher.loaded_fingerprint
    # Not a line for every parameter.
    told = [record.getMessage() for record in records]
    assert told[0] == 'heard'
    assert not any('conv.weight' in message for message in told)


def test_teacher__random_may_be_any_module():
    teacher = Teacher(config=dict(type='era_mm._Plain'), checkpoint='random')
    teacher.load()
    assert teacher.is_loaded


@ERA_MODELS.register_module(name='_Plain', force=True)
class Plain(nn.Linear):
    """No module of mmengine."""

    def __init__(self):
        super().__init__(1, 1)


@pytest.mark.parametrize(
    'change',
    [
        dict(pad_size_divisor=64),
        dict(pad_value=7),
        dict(bgr_to_rgb=False),
        dict(std=[1.0, 2.0, 3.0]),
    ],
    ids=lambda change: next(iter(change)),
)
def test_teacher__with_any_other_setting_gets_its_own_inputs(change):
    teacher = detector_config(width=16, channels=24)
    teacher['data_preprocessor'] |= change
    model = MODELS.build(distillation_config(ERA, teacher=teacher))
    batch = detection_batch(size=60)
    own = model.teachers['teacher'].model.data_preprocessor(
        copy.deepcopy(batch), False
    )['inputs']
    data = model.data_preprocessor(batch, True)
    assert torch.equal(data['teacher_inputs']['teacher'], own)


@pytest.mark.parametrize(
    ('source', 'idle'),
    [('backbone.layer2', ('neck', 'bbox_head')), ('neck', ('bbox_head',))],
)
def test_teacher__runs_only_as_deep_as_its_sources(source, idle):
    model = MODELS.build(
        distillation_config(dict(ERA, source=source, twi_steps='none'))
    )
    teacher, called = model.teachers['teacher'], []
    for name in idle:
        # mmdet calls head.forward itself, past the head's own hooks.
        for module in getattr(teacher.model, name).modules():
            module.register_forward_hook(
                lambda *_, name=name: called.append(name)
            )
    teacher.extract(torch.randn(1, 3, 64, 64))
    assert not called


def build(**kwargs):
    return MODELS.build(distillation_config(ERA) | kwargs)


def test_teacher__needs_a_checkpoint():
    with pytest.raises(ValueError, match='has no `checkpoint`'):
        build(teacher=dict(config=detector_config()))


def test_teacher__unknown_key_shows_the_nearest():
    with pytest.raises(TypeError, match="Did you mean 'checkpoint'"):
        build(teacher=dict(config=detector_config(), checkpont='random'))


def test_teacher__config_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match='mmdet::'):
        build(teacher=dict(config='no/such.py', checkpoint='random'))


def test_teacher__without_config_is_refused():
    with pytest.raises(ValueError, match="a dict with 'config'"):
        build(teacher=dict(checkpoint='random'))


def test_classes__of_several_data_sets_are_told_where_they_agree():
    """mmdet's ConcatDataset has a list where anything differs."""
    one = dict(classes=('a', 'b'), palette=[(0, 0, 0)])
    other = dict(classes=['a', 'b'], palette=[(1, 1, 1)])
    assert classes_of([one, other]) == ('a', 'b')
    assert classes_of(dict(dataset_meta=[one, other])) == ('a', 'b')
    assert classes_of([one, dict(classes=('a', 'c'))]) is None
    assert classes_of([one, dict()]) is None
    # One set, or files from before meta data of sets.
    assert classes_of(dict(dataset_meta=one)) == ('a', 'b')
    assert classes_of(dict(CLASSES='a')) == ('a',)
