"""Which source of whom reaches which distiller."""

import torch
from mmengine.registry import MODELS

from era_mm.core import BaseDistiller
from era_mm.testing import distillation_config


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
