"""Resampling between the recorders and a method."""

import copy

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.core import BaseDistiller, connections, student_config_of
from era_mm.core.connections import split_source
from era_mm.layers import Resampler
from era_mm.testing import (
    detection_batch,
    detector_config,
    distillation_config,
)


class Hearing(BaseDistiller):
    """Keeps what it gets."""

    def prepare(self, *, student_feats, teacher_feats, **pair):
        self.prepared = student_feats, teacher_feats

    def loss(self, *, student_feats, teacher_feats, data_samples):
        self.heard = student_feats, teacher_feats
        total = sum(feat.sum() for feat in student_feats['neck'])
        return {'loss_hearing': 0 * total}


MODELS.register_module(name='ReadingForResample', module=Hearing)


def build(distiller=None, **source):
    """The teacher has one level more, and the student wants it resized."""
    teacher = detector_config(width=16, channels=24)
    teacher['neck'] = dict(teacher['neck'], num_outs=3)
    teacher['bbox_head'] = copy.deepcopy(teacher['bbox_head'])
    teacher['bbox_head']['anchor_generator']['strides'] = [8, 16, 32]
    return MODELS.build(
        distillation_config(
            dict(distiller or dict(type='ReadingForResample'))
            | dict(source=dict(student='neck', teacher='neck', **source)),
            teacher=teacher,
        )
    )


def logged_by(module, monkeypatch):
    """What the module logs from now on."""
    said = []
    monkeypatch.setattr(
        module, 'print_log', lambda text, **kwargs: said.append(text)
    )
    return said


COVER = dict(student=dict(levels=[0, 1, 1], scales=[1, 1, 0.5]))


def test_resample__stands_before_prepare_and_loss():
    model = build(resample=COVER)
    hearing = model.distillers['distiller']
    for feats in hearing.prepared:
        # Of an image of 256 pixels, strides 8 and 16.
        assert [f.shape[2] for f in feats['neck']] == [32, 16, 8]
    model.train()
    data = model.data_preprocessor(detection_batch(), True)
    model(**data, mode='loss')
    student, teacher = hearing.heard
    with torch.no_grad():
        own = model.student.extract_feat(data['inputs'])
        theirs = model.teachers['teacher'].model.extract_feat(data['inputs'])
    torch.testing.assert_close(student['neck'][0], own[0])
    torch.testing.assert_close(
        student['neck'][2],
        own[1].unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5)),
    )
    torch.testing.assert_close(teacher['neck'], theirs)
    assert student['neck'][2].requires_grad


@pytest.mark.parametrize('unpadded', ['student', 'teacher'])
def test_padding__is_cut_off_without_a_connector(unpadded):
    models = dict(student=detector_config(), teacher=detector_config(width=16))
    for role, model in models.items():
        divisor = 1 if role == unpadded else 32
        model['data_preprocessor'] |= dict(pad_size_divisor=divisor)
    hearing = dict(type='ReadingForResample')
    model = MODELS.build(distillation_config(hearing, **models)).train()
    data = model.data_preprocessor(detection_batch(size=100), True)
    model(**data, mode='loss')
    student, teacher = model.distillers['distiller'].heard
    with torch.no_grad():
        own = model.student.extract_feat(data['inputs'])
        theirs = model.teachers['teacher'].model.extract_feat(
            data['teacher_inputs']['teacher']
        )
    assert own[0].shape != theirs[0].shape
    for heard, feats in ((student, own), (teacher, theirs)):
        assert [feat.shape[2] for feat in heard['neck']] == [13, 7]
        for found, feat in zip(heard['neck'], feats, strict=True):
            side = found.shape[2]
            assert torch.equal(found, feat[..., :side, :side])


def test_padding__of_a_source_that_is_left_out_later_is_not_cut_off():
    found_by = connections.Connections(
        None, student=('neck', 'bbox_head'), teacher=('neck',), owner='Some'
    )
    maps = {
        side: (torch.zeros(1, 2, side, side), torch.zeros(1, 2, 2, 2))
        for side in (4, 5)
    }
    found_by.meet(
        student_feats=dict(neck=maps[4], bbox_head=maps[4]),
        teacher_feats=dict(neck=maps[4]),
    )
    found = found_by.connect(
        student_feats=dict(neck=maps[5]), teacher_feats=dict(neck=maps[4])
    )
    assert {role: list(feats) for role, feats in found.items()} == {
        'student_feats': ['neck'],
        'teacher_feats': ['neck'],
    }
    for feats in found.values():
        assert [feat.shape[2] for feat in feats['neck']] == [4, 2]


def test_padding__explains_no_other_stride():
    """Maps of 2x2 and 1x1 on the trial image, of strides 32 and 64 or 128."""
    between = Hearing().connections

    def shapes_of(call, own, theirs):
        feats = [
            {'neck': tuple(torch.rand(1, 1, side, side) for side in sides)}
            for sides in (own, theirs)
        ]
        found = call(student_feats=feats[0], teacher_feats=feats[1])
        return [
            [feat.shape[2] for feat in feats['neck']]
            for feats in found.values()
        ]

    def meet(own, theirs):
        return shapes_of(between.meet, own, theirs)

    def connect(own, theirs):
        return shapes_of(between.connect, own, theirs)

    meet([2, 1], [2, 1])
    assert connect([25, 13], [24, 12]) == [[24, 12]] * 2
    assert connect([28, 14], [25, 13]) == [[25, 13]] * 2
    assert connect([25, 13], [25, 7]) == [[25, 13], [25, 7]]
    # Other strides on the trial image: the method's own business.
    meet([4, 2], [2, 1])
    assert connect([4, 2], [2, 1]) == [[4, 2], [2, 1]]


def test_resample__has_no_part_in_the_files():
    model = build(resample=COVER)
    assert not list(model.distillers.state_dict())
    plain = MODELS.build(detector_config())
    assert set(model.state_dict()) == set(plain.state_dict())


def test_resample__says_what_it_resizes(monkeypatch):
    said = logged_by(connections, monkeypatch)
    build(resample=COVER)
    assert said == [
        'Resampling of the student: outputs [0, 1, 1].',
        'Resampling of the student: level 2 resized by 0.5 (mean of the '
        'cells).',
    ]


@pytest.mark.parametrize(
    ('resample', 'message'),
    [
        (dict(student=dict(levels=[1, 0, 0])), 'all but the channels'),
        (dict(student=dict(levels=[0, 5])), 'outputs 2'),
        (dict(pupil=dict(levels=[0])), r'dict\(student='),
    ],
)
def test_resample__that_does_not_fit_is_refused(resample, message):
    with pytest.raises(ValueError, match=message):
        build(resample=resample)


def test_resample__takes_one_name_for_each():
    with pytest.raises(ValueError, match='one module name each'):
        MODELS.build(
            distillation_config(
                dict(
                    type='ReadingForResample',
                    source=dict(
                        student=['neck', 'backbone'],
                        teacher='neck',
                        resample=dict(student=dict(levels=[0])),
                    ),
                )
            )
        )


def test_resample__with_nothing_to_resample_is_refused():
    with pytest.raises(ValueError, match='nothing to resample'):
        MODELS.build(
            distillation_config(
                dict(
                    type='era_mm.ResidualKDDistiller',
                    source=dict(
                        student='neck',
                        teacher='neck',
                        resample=dict(student=dict(levels=[0, 1])),
                    ),
                )
            )
        )


def test_era__predicts_through_the_connector_but_does_not_blend():
    era = dict(type='era_mm.ERADistiller', mbrnet=dict(num_branches=1))
    model = build(era, resample=COVER).eval()
    distiller = model.distillers['distiller']
    assert distiller.inference_modes() == ('E0', 'T')
    model.active_modes = ('T',)
    data = model.data_preprocessor(detection_batch(), False)
    with torch.no_grad():
        model(**data, mode='predict')
        own = model.student.extract_feat(data['inputs'])
        estimate = distiller.mbrnet(Resampler(**COVER['student'])(own))
        expected = model.teachers['teacher'].model.bbox_head.predict(
            estimate, data['data_samples'], rescale=True
        )
    found = model.mode_predictions['T']
    assert len(expected[0].scores) > 0
    for sample, want in zip(found, expected, strict=True):
        torch.testing.assert_close(sample.pred_instances.scores, want.scores)


def test_student_config_of__does_not_mind():
    config = dict(
        type='era_mm.Distillation',
        student=detector_config(),
        teacher=dict(config=detector_config(), checkpoint='random'),
        distiller=dict(
            type='era_mm.ERADistiller',
            source=dict(student='neck', teacher='neck', resample=COVER),
        ),
    )
    assert student_config_of(config)[0].type == 'mmdet.RetinaNet'


def test_sokd__hears_what_its_base_connects():
    base = dict(
        type='era_mm.FeatureImitationDistiller',
        source=dict(student='neck', teacher='neck', resample=COVER),
    )
    teacher = detector_config(width=16, channels=24)
    teacher['neck'] = dict(teacher['neck'], num_outs=3)
    model = MODELS.build(
        distillation_config(
            dict(type='era_mm.SoKDDistiller', base=base, dam=False),
            teacher=teacher,
        )
    )
    model.train()
    data = model.data_preprocessor(detection_batch(), True)
    losses = model(**data, mode='loss')
    assert len(model.distillers['distiller'].base.connectors) == 3
    assert losses['loss_sokd_adapter'] > 0


def test_resample__has_its_former_name_for_now(monkeypatch):
    said = logged_by(connections, monkeypatch)
    model = build(connector=COVER)
    (distiller,) = model.distillers.values()
    assert distiller.connections.resamplers['student'].levels == (0, 1, 1)
    assert '`source.connector` is now `source.resample`' in said[0]
    with pytest.raises(ValueError, match=r'dict\(student='):
        build(connector=COVER, resample=COVER)


def test_resampler__has_its_former_name_for_now(monkeypatch):
    said = logged_by(connections, monkeypatch)
    former = MODELS.build(dict(type='era_mm.Connector', levels=[1, 0]))
    assert isinstance(former, Resampler)
    assert former.levels == (1, 0)
    assert '`era_mm.Connector` is now `era_mm.Resampler`' in said[0]


def test_source__is_split_into_names_of_both_and_the_resampling():
    assert split_source('neck', has_teacher=True) == (
        ('neck',),
        ('neck',),
        None,
    )
    assert split_source(['a', 'b'], has_teacher=False) == (
        ('a', 'b'),
        (),
        None,
    )
    source = dict(student='a', teacher=['b', 'c'], resample=COVER)
    assert split_source(source, has_teacher=True) == (
        ('a',),
        ('b', 'c'),
        COVER,
    )
    for wrong in (dict(student='a'), dict(teacher='a'), dict(source, x=1)):
        with pytest.raises(ValueError, match=r'dict\(student='):
            split_source(wrong, has_teacher=True)
