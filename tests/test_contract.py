"""The core's guarantees, for every registered method.

A new method is found without an edit here. It must have a config that names
it, a test file, and a docstring with its source.
"""

import copy
import fnmatch
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from torch import nn

import era_mm.methods
from era_mm.core import BaseDistiller, extras_of
from era_mm.engine.measure import Member
from era_mm.engine.pairing import Pair
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
)

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = [file.read_text() for file in (ROOT / 'configs').rglob('*.py')]


def find_methods():
    found = []
    for module in pkgutil.iter_modules(era_mm.methods.__path__):
        module = importlib.import_module(f'era_mm.methods.{module.name}')
        for cls in vars(module).values():
            if (
                isinstance(cls, type)
                and issubclass(cls, BaseDistiller)
                # A method may import the one it extends.
                and cls.__module__.startswith(module.__name__)
            ):
                found.append((module.__name__.rpartition('.')[2], cls))
    return found


METHODS = find_methods()
each_method = pytest.mark.parametrize(
    ('name', 'cls'), METHODS, ids=[name for name, _ in METHODS]
)


#: Methods for classifiers alone, with what the toy pair needs of them.
OF_CLASSIFIERS = {'SimKDDistiller': dict(channels=[64, 128])}


def build(cls, teacher_file):
    distiller = dict(type=f'era_mm.{cls.__name__}')
    if cls.__name__ in OF_CLASSIFIERS:
        distiller |= OF_CLASSIFIERS[cls.__name__]
        init_default_scope('mmpretrain')
        model = MODELS.build(
            distillation_config(
                distiller, classifier_config(), classifier_config(width=16)
            )
            | dict(inherit=['head'])
        )
        model.init_weights()
        return model
    config = distillation_config(distiller, checkpoint=teacher_file)
    if not cls.needs_teacher:
        del config['teacher']
    return MODELS.build(config)


def batch_of(cls, num=2, seed=0):
    batch = detection_batch(num, seed=seed)
    if cls.__name__ in OF_CLASSIFIERS:
        batch['data_samples'] = [
            DataSample().set_gt_label(index % 3) for index in range(num)
        ]
    return batch


def test_methods__are_found():
    assert 'ERADistiller' in [cls.__name__ for _, cls in METHODS]


@each_method
def test_method__brings_config_test_and_source(name, cls):
    assert any(f'era_mm.{cls.__name__}' in text for text in CONFIGS)
    assert list((ROOT / 'tests/test_methods').glob(f'test_{name}*.py'))
    assert 'Source:' in cls.__doc__
    assert 'Args:' in cls.__doc__


@each_method
def test_extras__have_no_names_of_the_students_parts(name, cls, teacher_file):
    """mmengine's `custom_keys` hold for all names that contain a key."""
    model = build(cls, teacher_file)
    names = dict(model.named_parameters())
    extras = [key for key in names if key.startswith('distillers.')]
    for part in ('backbone', 'neck', 'head'):
        assert not [key for key in extras if part in key]


@each_method
def test_method__trains_two_steps(name, cls, teacher_file):
    model = build(cls, teacher_file)
    model.train()
    before = copy.deepcopy(model.student.state_dict())
    teachers = {
        key: copy.deepcopy(teacher.model.state_dict())
        for key, teacher in model.teachers.items()
        if teacher.load() is None
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    # The third forward is where a parameter without gradient is noticed.
    for seed in range(3):
        data = model.data_preprocessor(batch_of(cls, 4, seed), True)
        losses = model(**data, mode='loss')
        own = {key for key in losses if 'loss_' in key}
        assert own - {'loss_cls', 'loss_bbox'}
        total, log_vars = model.parse_losses(losses)
        assert all(
            torch.tensor(float(v)).isfinite() for v in log_vars.values()
        )
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert any(
        not torch.equal(before[key], value)
        for key, value in model.student.state_dict().items()
    )
    for key, teacher in model.teachers.items():
        assert not any(m.training for m in teacher.model.modules())
        for k, value in teacher.model.state_dict().items():
            assert torch.equal(teachers[key][k], value)


#: Models of each host, student and teacher, and a raw batch.
HOSTS = {
    'detector': (
        detector_config(),
        detector_config(width=16, channels=24),
        detection_batch(4),
    ),
    'classifier': (
        classifier_config(),
        classifier_config(width=16),
        dict(
            inputs=list(
                torch.randint(
                    256, (4, 3, 64, 64), generator=torch.Generator()
                ).byte()
            ),
            data_samples=[DataSample().set_gt_label(i % 3) for i in range(4)],
        ),
    ),
}
each_host = pytest.mark.parametrize('host', HOSTS)


def build_for(cls, host):
    """A method on a host's pair, as make_config would set it up."""
    student, teacher, _ = HOSTS[host]
    if not cls.needs_teacher:
        return MODELS.build(
            dict(
                type='era_mm.Distillation',
                student=student,
                distiller=dict(type=f'era_mm.{cls.__name__}'),
            )
        )
    pair = Pair(
        *(
            Member(role, role, ConfigDict(config))
            for role, config in (('student', student), ('teacher', teacher))
        ),
        input_sizes=[64],
    )
    plan = cls.plan_for(pair)
    config = distillation_config(plan.distiller, student, teacher)
    if plan.inherit:
        config['inherit'] = list(plan.inherit)
    model = MODELS.build(config)
    model.init_weights()
    return model


def assert_teaches(model, batch):
    """The distiller's own terms alone have a gradient in the student.

    Unless its first phase says that the student rests.
    """
    model.train()
    distiller = model.distillers['distiller']
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    hosts = set(
        model.student(
            data['inputs'], copy.deepcopy(data['data_samples']), mode='loss'
        )
    )
    losses = model(**data, mode='loss')
    own = {key: v for key, v in losses.items() if key not in hosts}
    assert own
    total, _ = model.parse_losses(own)
    total.backward()
    phase = distiller.phase()
    resting = () if phase is None else phase.frozen
    reached = {
        name
        for name, parameter in model.student.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    awake = {
        name
        for name, _ in model.student.named_parameters()
        if not name.startswith(tuple(f'{part}.' for part in resting))
    }
    assert reached <= awake
    assert reached or not awake, f'{type(distiller).__name__} teaches nothing'


#: Methods that are for models of one host alone.
OF_ONE_HOST = {'CrossKDDistiller': 'detector', 'SimKDDistiller': 'classifier'}


@each_host
@each_method
def test_method__teaches_the_student_by_its_own_terms(name, cls, host):
    if OF_ONE_HOST.get(cls.__name__, host) != host:
        with pytest.raises(ValueError, match='cannot pair these'):
            build_for(cls, host)
        return
    assert_teaches(build_for(cls, host), HOSTS[host][2])


def pooled(feats):
    return [f.mean((2, 3)) if f.dim() == 4 else f for f in feats['neck']]


class Attached(BaseDistiller):
    """Pulls what a layer makes of the student to the teacher's."""

    def prepare(self, *, student_feats, teacher_feats, **pair):
        self.layers = nn.ModuleList(
            nn.Linear(s.shape[1], t.shape[1])
            for s, t in zip(
                pooled(student_feats), pooled(teacher_feats), strict=True
            )
        )

    def loss(self, *, student_feats, teacher_feats, data_samples):
        levels = zip(
            self.layers,
            pooled(student_feats),
            pooled(teacher_feats),
            strict=True,
        )
        return {
            'loss_attached': sum(
                (layer(self.hear(s)) - t).square().mean()
                for layer, s, t in levels
            )
        }

    @staticmethod
    def hear(feat):
        return feat


class Detached(Attached):
    """Trains its layer alone: the student is cut off."""

    @staticmethod
    def hear(feat):
        return feat.detach()


@each_host
def test_method__that_detaches_its_features_is_found_out(host):
    student, teacher, batch = HOSTS[host]
    models = []
    for cls in (Attached, Detached):
        MODELS.register_module(name=f'_{cls.__name__}', module=cls, force=True)
        distiller = dict(type=f'_{cls.__name__}')
        models.append(
            MODELS.build(distillation_config(distiller, student, teacher))
        )
    assert_teaches(models[0], batch)
    with pytest.raises(AssertionError, match='Detached teaches nothing'):
        assert_teaches(models[1], batch)


@each_method
def test_method__tells_the_weights_of_its_losses(name, cls, teacher_file):
    model = build(cls, teacher_file)
    weights = model.distillers['distiller'].loss_weights()
    data = model.data_preprocessor(batch_of(cls, 4), True)
    own = [
        key
        for key in model(**data, mode='loss')
        if key not in ('loss_cls', 'loss_bbox') and 'loss' in key
    ]
    for pattern in weights:
        assert fnmatch.filter(own, pattern), pattern
    for key in own:
        assert any(fnmatch.fnmatch(key, p) for p in weights), key


@each_method
def test_method__saves_a_plain_student_and_restores_its_extras(
    name, cls, teacher_file, tmp_path
):
    model, other = build(cls, teacher_file), build(cls, teacher_file)
    torch.save(model.state_dict(), tmp_path / 'file.pth')
    state = torch.load(tmp_path / 'file.pth', weights_only=True)
    # The given student, or what the method makes of it.
    plain = MODELS.build(copy.deepcopy(model.student_config))
    plain.load_state_dict(state, strict=True)
    assert extras_of(state)['distiller']['type'] == cls.__name__

    other.load_state_dict(state)
    theirs = other.distillers.state_dict()
    for key, value in model.distillers.state_dict().items():
        assert torch.equal(value, theirs[key]), key

    plain.eval()
    model.eval()
    batch = batch_of(cls)
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    with torch.no_grad():
        first = plain(**plain.data_preprocessor(batch, False), mode='tensor')
        second = model(data['inputs'], mode='tensor')
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_method
def test_method__runs_in_mixed_precision(name, cls, teacher_file):
    model = build(cls, teacher_file)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        data = model.data_preprocessor(batch_of(cls, 4), True)
        losses = model(**data, mode='loss')
    total, _ = model.parse_losses(losses)
    assert total.isfinite()
    total.backward()
    assert next(model.student.parameters()).grad.isfinite().all()


def test_toy_student__is_the_plain_one():
    assert distillation_config({})['student'] == detector_config()
