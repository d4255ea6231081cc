"""CWD: by hand, by a loop, through the model."""

import math

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.methods.cwd import channel_wise_loss
from era_mm.testing import (
    detection_batch,
    detector_config,
    distillation_config,
    noise,
)


def test_loss__by_hand():
    # Two places. Teacher (1/2, 1/2), student (3/4, 1/4):
    # KL = 1/2 log 2/3 + 1/2 log 2. A second channel that agrees halves it.
    teacher = torch.zeros(1, 2, 1, 2)
    student = torch.zeros(1, 2, 1, 2)
    student[0, 0, 0, 0] = math.log(3)
    expected = 0.5 * (math.log(2 / 3) + math.log(2)) / 2
    found = channel_wise_loss(student_feat=student, teacher_feat=teacher)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    # What is added to a channel does not matter.
    moved = channel_wise_loss(student_feat=student + 5, teacher_feat=teacher)
    torch.testing.assert_close(moved, found)


def test_loss__against_a_loop():
    student, teacher = noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1)
    total = 0.0
    for image in range(2):
        for channel in range(3):
            q, p = (
                (one[image, channel].flatten() / 4).softmax(0)
                for one in (teacher, student)
            )
            total += sum(
                float(a * (a / b).log()) for a, b in zip(q, p, strict=True)
            )
    found = channel_wise_loss(
        student_feat=student, teacher_feat=teacher, temperature=4.0
    )
    assert found.item() == pytest.approx(16 * total / 6, rel=1e-9)


def test_distiller__adds_the_levels_up(teacher_file):
    model = MODELS.build(
        distillation_config(
            dict(type='era_mm.CWDDistiller'), checkpoint=teacher_file
        )
    )
    model.load_teachers()
    data = model.data_preprocessor(detection_batch(2), True)
    losses = model(**data, mode='loss')
    targets = model.teachers['teacher'].extract(data['inputs'])['neck']
    maps = model.student.extract_feat(data['inputs'])
    aligns = model.distillers['distiller'].aligns
    expected = 10 * sum(
        channel_wise_loss(student_feat=align(s), teacher_feat=t)
        for align, s, t in zip(aligns, maps, targets, strict=True)
    )
    torch.testing.assert_close(losses['loss_cwd'], expected)
    losses['loss_cwd'].backward()
    assert model.student.backbone.conv1.weight.grad.abs().max() > 0
    assert model.student.bbox_head.retina_cls.weight.grad is None
    assert all(a.weight.grad.abs().max() > 0 for a in aligns)


def test_distiller__has_no_convolution_where_channels_agree():
    pair = [detector_config(), detector_config()]
    model = MODELS.build(
        distillation_config(dict(type='era_mm.CWDDistiller'), *pair)
    )
    assert not list(model.distillers.parameters())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(temperature=0), 'above 0'),
        (
            dict(source=dict(student='neck', teacher='backbone.layer3')),
            'pairs of levels',
        ),
    ],
)
def test_distiller__refuses(teacher_file, options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(
            distillation_config(
                dict(type='era_mm.CWDDistiller', **options),
                checkpoint=teacher_file,
            )
        )


def test_distiller__refuses_vectors(classifiers):
    with pytest.raises(ValueError, match="source='backbone'"):
        classifiers(dict(type='era_mm.CWDDistiller'))
