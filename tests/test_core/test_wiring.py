"""Which source of whom reaches which distiller."""

import re

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from era_mm.core import BaseDistiller
from era_mm.core.dry_run import at_first_size
from era_mm.core.wiring import Wiring
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
)


class Reading(BaseDistiller):
    """Keeps what the dry run gave it."""

    def prepare(self, *, student, teacher, student_feats, teacher_feats):
        self.pair = [student, teacher]
        self.met = student_feats, teacher_feats

    def loss(self, *, student_feats, teacher_feats, data_samples):
        return {}


MODELS.register_module(name='_Reading', module=Reading, force=True)


def build():
    config = distillation_config({})
    entry = config['teacher']
    config['teacher'] = dict(a=entry, b=entry, unasked=entry)
    config['distiller'] = {
        name: dict(type='_Reading', teacher=name, source=source)
        for name, source in (
            ('a', 'neck'),
            ('b', dict(student=['neck', 'backbone'], teacher='backbone')),
        )
    }
    return MODELS.build(dict(config, input_size=(64, 96)))


def test_dry_run__lets_each_distiller_meet_its_pair():
    model = build()
    for name, distiller in model.distillers.items():
        assert distiller.pair == [model.student, model.teachers[name].model]
    student, teacher = model.distillers['b'].met
    assert (list(student), list(teacher)) == (
        ['neck', 'backbone'],
        ['backbone'],
    )
    # Strides of 8 and 16.
    assert [f.shape[2:] for f in teacher['backbone']] == [(8, 12), (4, 6)]
    wiring = model.wiring
    assert wiring.input_size == (64, 96)
    assert wiring.student_shapes == {
        'neck': [(1, 16, 8, 12), (1, 16, 4, 6)],
        'backbone': [(1, 16, 8, 12), (1, 32, 4, 6)],
    }
    assert list(wiring.teacher_shapes) == ['a', 'b']


@pytest.mark.parametrize(
    ('runs_at', 'suits_at', 'expected', 'tried'),
    [
        ([1, 2, 3], [1, 2], 1, [1]),
        ([2, 3], [3], 3, [1, 2, 3]),
        ([2, 3], [], 2, [1, 2, 3]),
    ],
    ids=['first', 'one that suits', 'none that suits'],
)
def test_first_size__is_one_that_runs(runs_at, suits_at, expected, tried):
    calls = []

    def run(size):
        calls.append(size)
        if size not in runs_at:
            raise RuntimeError(f'not at {size}')
        return size

    assert at_first_size([1, 2, 2, 3], run, suits_at.__contains__) == expected
    assert calls == tried
    with pytest.raises(RuntimeError, match='not at 4'):
        at_first_size([4, 5], run, bool)


def swin(width):
    return classifier_config() | dict(
        backbone=dict(
            type='mmpretrain.SwinTransformer',
            arch=dict(
                embed_dims=width, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]
            ),
        ),
        head=dict(
            type='mmpretrain.LinearClsHead',
            num_classes=3,
            in_channels=8 * width,
            loss=dict(type='mmpretrain.CrossEntropyLoss'),
        ),
    )


def test_dry_run__is_as_large_as_windows_need():
    """Those of Swin are 7 places wide, also at a stride of 32."""
    config = distillation_config(ERA, classifier_config(), swin(8))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(config)
        assert model.wiring.input_size == (224, 224)
        with pytest.raises(ValueError, match=r'teacher cannot run.*64 x 64'):
            MODELS.build(dict(config, input_size=64))


def test_dry_run__is_as_large_as_the_teachers_head_needs():
    model = MODELS.build(distillation_config(dict(type='_Reading')))
    assert model.wiring.input_size == (256, 256)

    def refuse(head, args):
        # At a stride of 16, so from 512 pixels on.
        if min(feat.shape[-1] for feat in args[0]) < 32:
            raise RuntimeError('input image is smaller than kernel')

    teacher = model.teachers['teacher'].model
    teacher.bbox_head.register_forward_pre_hook(refuse)
    wiring = Wiring(
        student=model.student,
        teachers=model.teachers,
        distillers=model.distillers,
        input_size=None,
    )
    assert wiring.input_size == (512, 512)
    assert wiring.teacher_shapes['teacher']['neck'][-1][2:] == (32, 32)


def test_wiring__hears_each_source_once_and_asks_no_idle_teacher():
    model = build()
    assert model.wiring.recorder.sources == ('neck', 'backbone')
    inputs = torch.zeros(2, 3, 64, 64)
    found = model.wiring.teach(inputs, None, {'b': inputs[:1]})
    assert {name: list(feats) for name, feats in found.items()} == dict(
        a=['neck'], b=['backbone']
    )
    assert len(found['a']['neck'][0]) == 2
    assert len(found['b']['backbone'][0]) == 1


def test_feats__of_a_distiller_are_of_its_own_sources_and_teacher():
    model = build()
    recorded = (
        {'neck': 'own neck', 'backbone': 'own backbone'},
        {'a': {'neck': 'neck of a'}, 'b': {'backbone': 'backbone of b'}},
    )
    found = {
        name: model.wiring.feats_of(distiller, recorded)
        for name, distiller in model.distillers.items()
    }
    assert found == dict(
        a=dict(
            student_feats={'neck': 'own neck'},
            teacher_feats={'neck': 'neck of a'},
        ),
        b=dict(
            student_feats=recorded[0],
            teacher_feats={'backbone': 'backbone of b'},
        ),
    )


ERA = dict(type='era_mm.ERADistiller')


def message_of(error):
    return re.sub(r'\s+', ' ', str(error.value))


def test_source__unknown_shows_the_nearest_names():
    with pytest.raises(ValueError) as error:
        MODELS.build(distillation_config(ERA | dict(source='nekc')))
    assert "'nekc' is not a module of the student" in message_of(error)
    assert 'neck' in message_of(error).partition('Nearest names:')[2]
    with pytest.raises(ValueError) as error:
        MODELS.build(
            distillation_config(
                ERA
                | dict(source=dict(student='neck', teacher='neck.fpn_conv.0'))
            )
        )
    assert 'of the teacher' in message_of(error)
    assert 'neck.fpn_convs.0' in message_of(error)


def test_source__must_name_both_roles():
    with pytest.raises(ValueError, match='dict\\(student='):
        MODELS.build(
            distillation_config(ERA | dict(source=dict(student='neck')))
        )


@pytest.mark.parametrize(
    ('form', 'logit', 'terms'),
    [('released', False, 4), ('normalised', True, 6)],
)
def test_two_teachers__at_half_weight_are_one(
    form, logit, terms, teacher_file
):
    def era(teacher, factor):
        return dict(
            type='era_mm.ERADistiller',
            form=form,
            teacher=teacher,
            loss=dict(
                align_weight=5 * factor,
                residual_weight=factor,
                twi_weight=factor,
            ),
            **(
                {'logit': dict(weight=factor, box_weight=factor)}
                if logit
                else {}
            ),
        )

    entry = dict(
        config=detector_config(width=16, channels=24), checkpoint=teacher_file
    )
    config = dict(type='era_mm.Distillation', student=detector_config())
    one = MODELS.build(
        {**config, 'teacher': entry, 'distiller': era('teacher', 1.0)}
    )
    two = MODELS.build(
        {
            **config,
            'teacher': {'a': entry, 'b': entry},
            'distiller': {'first': era('a', 0.5), 'second': era('b', 0.5)},
        }
    )
    two.student.load_state_dict(one.student.state_dict())
    for distiller in two.distillers.values():
        distiller.load_state_dict(one.distillers['distiller'].state_dict())
    data = one.data_preprocessor(detection_batch(), True)
    found = {}
    for key, value in two(**data, mode='loss').items():
        name = key.rpartition('.')[2]
        if 'loss_era' in name:
            found[name] = found.get(name, 0) + value
    expected = one(**data, mode='loss')
    assert len(found) == terms
    for key, value in found.items():
        # Halves are exact in binary: no rounding to allow for.
        assert torch.equal(value, expected[key]), key


def test_two_teachers__each_distiller_hears_its_own():
    config = distillation_config({})
    entry = config['teacher']
    config['teacher'] = {
        name: dict(entry, config=detector_config(width=16, channels=channels))
        for name, channels in (('a', 24), ('b', 40))
    }
    config['distiller'] = {
        f'of_{name}': dict(type='era_mm.ERADistiller', teacher=name)
        for name in 'ab'
    }
    model = MODELS.build(config).train()
    heard = {}
    for name, distiller in model.distillers.items():

        def spy(
            *, teacher_feats, name=name, loss=distiller.early_loss, **kwargs
        ):
            heard[name] = teacher_feats['neck']
            return loss(teacher_feats=teacher_feats, **kwargs)

        distiller.early_loss = spy
    data = model.data_preprocessor(detection_batch(), True)
    losses = model(**data, mode='loss')
    for name in 'ab':
        assert f'of_{name}.loss_era_align' in losses
        expected = model.teachers[name].extract(data['inputs'])['neck']
        for found, feat in zip(heard[f'of_{name}'], expected, strict=True):
            assert torch.equal(found, feat)


@pytest.mark.parametrize('owner', ['student', 'teacher'])
def test_dry_run__says_whose_parts_do_not_fit(owner):
    wrong = detector_config()
    wrong['neck']['in_channels'] = [7, 9]
    with pytest.raises(ValueError, match=f'The {owner} cannot run') as caught:
        MODELS.build(
            distillation_config(
                dict(type='era_mm.FeatureImitationDistiller'), **{owner: wrong}
            )
        )
    assert '`in_channels` of neck and head' in str(caught.value)
