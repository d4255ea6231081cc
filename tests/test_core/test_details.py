"""Details of the core that a review found or a mutation survived."""

import copy
import logging
import random

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import MODELS
from torch import nn

from era_mm.core import (
    BaseDistiller,
    Recorder,
    checkpoint,
    extras_of,
    step,
    utils,
)
from era_mm.core.host_models import forward_until
from era_mm.core.teacher import Teacher
from era_mm.core.utils import preserve_rng
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


def test_preserve_rng__gives_every_generator_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    with preserve_rng():
        draw()
    assert draw() == expected


def test_extras__are_put_on_the_cpu_when_a_file_is_written(
    monkeypatch, tmp_path
):
    moved = []
    to_cpu = checkpoint.to_cpu
    monkeypatch.setattr(
        checkpoint,
        'to_cpu',
        lambda value: moved.append(value) or to_cpu(value),
    )
    model = MODELS.build(distillation_config(ERA))
    state = model.state_dict()
    assert not moved
    torch.save(state, tmp_path / 'f.pth')
    assert [set(value) for value in moved] == [{'distiller'}]


def test_files__module_versions_reach_the_students_modules(monkeypatch):
    model = MODELS.build(distillation_config(ERA))
    norm = model.student.backbone.bn1
    seen = {}
    load = norm._load_from_state_dict

    def spy(state_dict, prefix, local_metadata, *args):
        seen.update(local_metadata)
        load(state_dict, prefix, local_metadata, *args)

    monkeypatch.setattr(norm, '_load_from_state_dict', spy)
    model.load_state_dict(model.state_dict())
    assert seen['version'] == norm._version == 2


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


def test_predict__modes_get_samples_without_predictions(monkeypatch):
    model = MODELS.build(distillation_config(ERA)).eval()
    era, seen = model.distillers['distiller'], []
    predict = era.predict

    def spy(modes, *, data_samples, **kwargs):
        seen.extend(data_samples)
        return predict(modes, data_samples=data_samples, **kwargs)

    monkeypatch.setattr(era, 'predict', spy)
    model.active_modes = ('T',)
    data = model.data_preprocessor(detection_batch(), False)
    with torch.no_grad():
        own = model(**data, mode='predict')
    assert all('pred_instances' in sample for sample in own)
    assert seen
    assert not any('pred_instances' in sample for sample in seen)


def test_load__extras_of_another_method_are_left_out():
    model, other = (MODELS.build(distillation_config(ERA)) for _ in range(2))
    state = model.state_dict()
    extras_of(state)['distiller']['type'] = 'OtherDistiller'
    before = copy.deepcopy(other.distillers.state_dict())
    other.load_state_dict(state)
    for key, value in other.distillers.state_dict().items():
        assert torch.equal(value, before[key]), key


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


def test_init_weights__leaves_the_random_state_of_a_plain_run():
    drawn = []
    for config in (detector_config(), distillation_config(ERA)):
        torch.manual_seed(0)
        MODELS.build(config).init_weights()
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


@ERA_MODELS.register_module(name='_SGDCoder', force=True)
class SGDCoder(BaseDistiller):
    needs_teacher = False

    def prepare(self, *, student_feats, **pair):
        self.channels = student_feats['neck'][0].shape[1]

    def build_inner(self):
        coder = nn.Conv2d(self.channels, self.channels, 1)
        return coder, torch.optim.SGD(coder.parameters(), lr=0.1)

    def inner_loss(self, *, student_feats, teacher_feats, data_samples):
        return (self.inner(student_feats['neck'][0]) - 1).square().mean()

    def loss(self, *, student_feats, teacher_feats, data_samples):
        return {'loss_toy': student_feats['neck'][0].mean()}


def test_inner__gradients_are_averaged_over_the_ranks(monkeypatch):
    config = dict(
        type='era_mm.Distillation',
        student=detector_config(),
        distiller=dict(type='era_mm._SGDCoder'),
    )

    def weight_after_a_step():
        torch.manual_seed(0)
        model = MODELS.build(config)
        model(**model.data_preprocessor(detection_batch(), True), mode='loss')
        return model.distillers['distiller'].inner.weight

    alone = weight_after_a_step()
    # Two ranks with one and the same batch: the sum is twice the gradient.
    monkeypatch.setattr(utils, 'all_reduce', lambda g: g.mul_(2))
    monkeypatch.setattr(utils, 'get_world_size', lambda: 2)
    torch.testing.assert_close(weight_after_a_step(), alone)


def test_inner__learns_in_training_only():
    config = dict(
        type='era_mm.Distillation',
        student=detector_config(),
        distiller=dict(type='era_mm._SGDCoder'),
    )
    model = MODELS.build(config).eval()
    before = model.distillers['distiller'].inner.weight.clone()
    data = model.data_preprocessor(detection_batch(), True)
    with torch.no_grad():
        model(**data, mode='loss')
    assert torch.equal(model.distillers['distiller'].inner.weight, before)


def test_init_weights__puts_the_extras_alike_on_all_ranks(monkeypatch):
    sent = []
    monkeypatch.setattr(step, 'broadcast', sent.append)
    config = distillation_config(ERA)
    model = MODELS.build(config)
    model.init_weights()
    expected = model.distillers['distiller'].state_dict().values()
    assert [t.data_ptr() for t in sent] == [t.data_ptr() for t in expected]


def training_loss(config, batch_size=2):
    model = MODELS.build(config)
    data = model.data_preprocessor(detection_batch(batch_size), True)
    return model(**data, mode='loss')


def test_source__in_a_frozen_stage_is_refused():
    student = detector_config()
    student['backbone'] |= dict(frozen_stages=1)
    config = distillation_config(
        dict(ERA, source='backbone.layer1', twi_steps='none'), student=student
    )
    model = MODELS.build(config)
    # mmdet freezes in train().
    model.train()
    data = model.data_preprocessor(detection_batch(), True)
    with pytest.raises(RuntimeError, match='has no gradient'):
        model(**data, mode='loss')


def test_source__changed_in_place_afterwards_is_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    recorder = Recorder(net, ['0'], owner='student')
    with recorder:
        net(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match='changed in place'):
        recorder.pop()


def test_source__replaced_by_sync_norm_is_still_heard():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    recorder = Recorder(net, ['1'], owner='student')
    net[1] = nn.Identity()
    with recorder:
        net(torch.ones(3, 2))
    assert recorder.pop()['1'][0].shape == (3, 2)


def test_source__of_a_dense_head_gives_its_outputs_level_by_level():
    model = MODELS.build(ConfigDict(detector_config(head='FCOSHead'))).eval()
    inputs = torch.rand(1, 3, 64, 64)
    recorder = Recorder(model, ['neck', 'bbox_head'], owner='student')
    with recorder, torch.no_grad():
        forward_until(model, inputs, recorder.sources)
    found = recorder.pop()
    with torch.no_grad():
        scores, boxes, centerness = model(inputs, mode='tensor')
    # Class scores of both levels, then boxes, then centre-ness.
    expected = [*scores, *boxes, *centerness]
    assert len(found['bbox_head']) == len(expected) == 6
    assert all(map(torch.equal, found['bbox_head'], expected))
    assert len(found['neck']) == 2


def test_source__that_puts_out_more_than_tensors_is_refused():
    class Tokens(nn.Module):
        def forward(self, x):
            return [x], (2, 2)

    recorder = Recorder(nn.Sequential(Tokens()), ['0'], owner='student')
    with recorder, pytest.raises(ValueError, match=r"'0' .* but gave int"):
        recorder.model(torch.ones(1, 2))


def test_modes__of_a_plain_file_are_refused(tmp_path):
    plain = MODELS.build(detector_config())
    config = distillation_config(ERA) | dict(inference_mode='T')
    model = MODELS.build(config).eval()
    model.load_state_dict(plain.state_dict())
    data = model.data_preprocessor(detection_batch(), False)
    with pytest.raises(RuntimeError, match='plain student only'):
        model(**data, mode='predict')
    # What the distillation itself has written is fine.
    model.load_state_dict(MODELS.build(config).state_dict())
    model(**data, mode='predict')


def test_modes__of_two_distillers_are_told_apart():
    config = distillation_config({}) | dict(distiller=dict(a=ERA, b=ERA))
    model = MODELS.build(config).eval()
    model.check_modes(['a.T', 'b.T'])
    with pytest.raises(ValueError, match="'T' is not offered"):
        model.check_modes(['T'])
    model.active_modes = ('a.T', 'b.T')
    data = model.data_preprocessor(detection_batch(), False)
    with torch.no_grad():
        model(**data, mode='predict')
    assert set(model.mode_predictions) == {'a.T', 'b.T'}


@pytest.mark.parametrize('name', ['feat_loss', 'a.b'])
def test_distiller__name_that_would_enter_the_loss_is_refused(name):
    config = distillation_config({}) | dict(distiller={name: ERA})
    with pytest.raises(ValueError, match='must not be named'):
        MODELS.build(config)


def test_parameters__have_the_students_names():
    # Layer-wise decay of the hosts looks at names that begin "backbone".
    model = MODELS.build(distillation_config(ERA))
    names = [name for name, _ in model.named_parameters()]
    own = [name for name, _ in model.student.named_parameters()]
    assert names[: len(own)] == own
    assert all(name.startswith('distillers.') for name in names[len(own) :])
    assert len(names) == len(list(model.parameters()))


def test_gradients__are_not_missed_where_none_are_computed():
    model = MODELS.build(distillation_config(ERA))
    data = model.data_preprocessor(detection_batch(), True)
    with torch.no_grad():
        for _ in range(3):
            model(**data, mode='loss')


def test_pretraining__without_an_inner_module_is_refused():
    class Hollow(BaseDistiller):
        pretrain_iters = 3

        def loss(self, **kwargs):
            return {}

    with pytest.raises(ValueError, match='no inner module'):
        Hollow().set_up_inner()


def test_inner__without_its_loss_is_refused_when_built():
    class Mute(BaseDistiller):
        needs_teacher = False

        def build_inner(self):
            return nn.Linear(1, 1), None

        def loss(self, **kwargs):
            return {}

    with pytest.raises(ValueError, match='no `inner_loss` to train it'):
        Mute().set_up_inner()


def test_schedule__unknown_key_shows_the_nearest():
    config = distillation_config(
        dict(ERA, schedules=dict(loss_era_align=dict(strat=1)))
    )
    with pytest.raises(TypeError, match="Did you mean 'start'"):
        MODELS.build(config)


@pytest.mark.parametrize(
    ('form', 'reason'),
    # Bottlenecks lie side by side in one tensor.
    [('released', 'missing'), ('normalised', 'other shapes')],
)
def test_load__extras_of_other_settings_are_refused(form, reason):
    def with_branches(num):
        era = dict(ERA, form=form, mbrnet=dict(num_branches=num))
        return MODELS.build(distillation_config(era))

    state = with_branches(3).state_dict()
    with pytest.raises(ValueError, match=f"extras of 'distiller'.*{reason}"):
        with_branches(4).load_state_dict(state)
