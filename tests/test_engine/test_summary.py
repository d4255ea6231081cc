"""What will be trained, in words."""

import copy
import re

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from era_mm.engine import summary
from era_mm.engine.preflight import find_config
from era_mm.engine.summary import summary_of
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
)

ERA = dict(type='era_mm.ERADistiller')


def test_summary__leaves_the_model_as_it_was(teacher_file):
    model = MODELS.build(distillation_config(ERA, checkpoint=teacher_file))
    model.train()
    before = copy.deepcopy(model.student.state_dict())
    teacher = model.teachers['teacher']
    fingerprint = teacher.fingerprint()
    random = torch.get_rng_state()
    summary_of(model, detection_batch(1))
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in model.student.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert teacher.fingerprint() == fingerprint
    assert all(module.training for module in model.student.modules())
    for owner in (model.student, teacher.model):
        assert not any(m._forward_hooks for m in owner.modules())
        assert 'forward' not in vars(owner)


@pytest.mark.parametrize(
    ('form', 'sources', 'weights', 'others', 'uses'),
    [
        (
            'released',
            [],
            (5, 1),
            [],
            ('the labels', 'no terms (released form)'),
        ),
        (
            'auto',
            ['3x32x32 3x16x16 4x32x32 4x16x16'],
            (1, 4),
            ['logit', 'box'],
            ("the teacher's own outputs", 'loss_era_logit, loss_era_box'),
        ),
    ],
)
def test_summary__of_a_detector(form, sources, weights, others, uses):
    schedules = {'loss_era_twi_*': dict(start=300, ramp=450)}
    config = distillation_config(dict(ERA, form=form, schedules=schedules))
    model = MODELS.build(config)
    lines = summary_of(model, detection_batch(1)).splitlines()
    count = sum(p.numel() for p in model.student.parameters())
    assert lines[0].split()[:4] == [
        'student',
        'RetinaNet',
        f'{count / 1e6:.2f}',
        'M',
    ]
    plain = MODELS.build(detector_config()).eval()
    flops = get_model_complexity_info(
        plain, (3, 64, 64), show_table=False, show_arch=False
    )['flops']
    assert lines[0].endswith(f'  {flops / 1e9:.2f} GFLOPs for 64 x 64')
    assert lines[1].split()[:2] == ['teacher', 'RetinaNet']
    count = sum(p.numel() for p in model.distillers.parameters())
    assert f'{count / 1e6:.2f} M parameters in training only' in lines[2]
    assert lines[3:5] == [
        f"  TWI: the teacher's RetinaHead judges estimates by {uses[0]}",
        f"  the student's own head: {uses[1]}",
    ]
    assert re.fullmatch(
        r'a step costs about \d\.\d\d times the plain one \(FLOPs at 256 x '
        r'256\)',
        lines[5],
    )
    assert lines[6:] == [
        'sources, for an image of 256 x 256',
        f'  {"student neck":<30} 16x32x32 16x16x16',
        *(f'  {"student bbox_head":<30} {shapes}' for shapes in sources),
        f'  {"teacher neck":<30} 24x32x32 24x16x16',
        'losses, with their weights',
        f'  {"bbox_head.loss_cls":<30} 1',
        f'  {"bbox_head.loss_bbox":<30} 1',
        f'  {"loss_era_align":<30} {weights[0]}',
        f'  {"loss_era_residual":<30} {weights[1]}',
        f'  {"loss_era_twi_*":<30} 1  0 to 1 over 450 iterations (linear), '
        'from iteration 300',
        *(f'  {f"loss_era_{term}":<30} 1' for term in others),
    ]
    assert all(len(line) < 100 for line in lines)


@pytest.mark.parametrize(
    ('options', 'twi', 'own'),
    [
        (
            dict(twi_steps='none', logit=None),
            "off (twi_steps='none')",
            'no terms (logit=None)',
        ),
        (
            dict(logit=None),
            "the teacher's RetinaHead judges estimates by the labels",
            'no terms (logit=None)',
        ),
        (
            dict(twi_targets='both'),
            "the teacher's RetinaHead judges estimates by the labels and the "
            "teacher's own outputs",
            'loss_era_logit, loss_era_box',
        ),
    ],
)
def test_summary__says_what_era_uses(options, twi, own):
    model = MODELS.build(distillation_config(dict(ERA, **options)))
    lines = summary_of(model).splitlines()
    assert lines[3:5] == [f'  TWI: {twi}', f"  the student's own head: {own}"]


def test_summary__of_unlike_heads():
    config = Config.fromfile(
        find_config('era_retinanet_r18w32_gfl_r18w16_digits')
    )
    config.model.teacher.checkpoint = 'random'
    init_default_scope(config.default_scope)
    lines = summary_of(MODELS.build(config.model)).splitlines()
    assert lines[3] == (
        "  TWI: the teacher's RetinaHead judges estimates by the "
        "teacher's own outputs"
    )
    assert lines[4].startswith("  the student's own head: no terms (the ")
    assert lines[4].endswith('anchors and classes must agree)')
    # Its outputs were recorded in the dry run alone.
    assert not [line for line in lines if line.startswith('  student bbox')]


def test_summary__says_why_flops_are_not_counted(monkeypatch):
    model = MODELS.build(distillation_config(ERA))

    def fail(self, module_name=''):
        raise RuntimeError('no such\noperator')

    monkeypatch.setattr(summary.FlopAnalyzer, 'total', fail)
    line = summary_of(model, detection_batch(1)).splitlines()[0]
    assert line.endswith('GFLOPs not counted (RuntimeError: no such)')
    large = detection_batch(1, size=544)
    line = summary_of(model, large).splitlines()[0]
    assert 'not counted (an image of 544 x 544 takes too long' in line


def test_summary__says_why_the_cost_is_not_counted(monkeypatch):
    model = MODELS.build(distillation_config(ERA))

    def fail(*args, **kwargs):
        raise KeyError('metainfo')

    monkeypatch.setattr(type(model.student), 'forward', fail)
    assert 'cost of a step not counted (KeyError: metainfo)' in (
        summary_of(model, detection_batch(1)).splitlines()
    )


def test_summary__of_other_models():
    # No teacher and no data; several distillers; weights that are not told.
    methods = dict(
        x=dict(type='era_mm._Dropping', schedules={'*': dict(scale=2)}),
        y=dict(type='era_mm.IEKDDistiller'),
    )
    config = dict(
        type='era_mm.MutualDistillation',
        students=dict(a=detector_config(), b=detector_config(width=16)),
        distiller=dict(a=methods, b=methods),
    )
    lines = summary_of(MODELS.build(config)).splitlines()
    assert [line.split()[0] for line in lines[:4]] == [
        'a',
        'x',
        'y',
        'sources,',
    ]
    assert lines[0].endswith('GFLOPs for 256 x 256')
    assert '  x.Dropping does not define its weights' in lines
    assert f'  x.{"*":<30}    times 2' in lines
    assert f'  y.{"loss_iekd_explore":<30} 50' in lines
    assert sum(line.startswith('b ') for line in lines) == 1
    inherits = distillation_config(None) | dict(inherit=['bbox_head'])
    inherits['student'] = detector_config(channels=24)
    text = summary_of(MODELS.build(inherits))
    assert 'sources' not in text
    classifier = dict(
        type='era_mm.Distillation',
        student=classifier_config(),
        teacher=dict(config=classifier_config(width=16), checkpoint='random'),
        distiller=dict(ERA, logit=dict(weight=3)),
        input_size=32,
    )
    text = summary_of(MODELS.build(classifier))
    assert 'GFLOPs for 32 x 32' in text
    assert f'  {"student neck":<30} 64' in text
    assert f'  {"head.loss_module":<30} 1' in text
    assert f'  {"loss_era_logit":<30} 3' in text
