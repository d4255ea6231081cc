"""Batches of one image, as an epoch's last one may be; grey images;
classifiers of several labels."""

import copy

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample
from torch import nn

from era_mm.layers import spare_lone_values
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
)


def test_lone_values__are_normalised_by_the_running_statistics():
    norm = nn.BatchNorm1d(2, eps=1e-9, momentum=0.5)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 3.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0]))
    spare_lone_values(norm)

    # (5 - 1) / 2 and 3 * (5 - 2) / 3 + 1.
    found = norm(torch.tensor([[5.0, 5.0]]))
    assert torch.allclose(found, torch.tensor([[2.0, 4.0]]))
    found.sum().backward()
    assert torch.allclose(norm.weight.grad, torch.tensor([2.0, 1.0]))
    assert norm.training
    assert torch.equal(norm.running_mean, torch.tensor([1.0, 2.0]))

    # Two values have statistics: -1 and 1, mean 3 and 0.
    found = norm(torch.tensor([[2.0, -1.0], [4.0, 1.0]]))
    assert torch.allclose(found, torch.tensor([[-1.0, -2.0], [1.0, 4.0]]))
    assert torch.equal(norm.running_mean, torch.tensor([2.0, 1.0]))


def with_a_level_of_one_place(**kwargs):
    config = copy.deepcopy(detector_config(**kwargs))
    config['neck'].update(num_outs=4, add_extra_convs='on_input')
    config['bbox_head']['anchor_generator']['strides'] = [8, 16, 32, 64]
    return config


@pytest.mark.parametrize('host', ['detector', 'classifier'])
@pytest.mark.parametrize(
    'distiller',
    [
        dict(type='era_mm.ERADistiller'),
        dict(type='era_mm.ERADistiller', form='released'),
        dict(type='era_mm.IEKDDistiller'),
    ],
    ids=['era', 'era-released', 'ie-kd'],
)
def test_batch_of_one__is_a_finite_step(host, distiller):
    if host == 'detector':
        pair = (
            with_a_level_of_one_place(),
            with_a_level_of_one_place(width=16, channels=24),
        )
        scope, batch = 'mmdet', detection_batch(1)
    else:
        pair = (classifier_config(), classifier_config(16))
        scope = 'mmpretrain'
        batch = detection_batch(1)
        batch['data_samples'] = [DataSample().set_gt_label(1)]
        if 'IEKD' in distiller['type']:
            distiller = distiller | dict(source='backbone')
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(distillation_config(distiller, *pair))
    model.init_weights()
    model.train()
    data = model.data_preprocessor(batch, True)
    total, _ = model.parse_losses(model(**data, mode='loss'))
    total.backward()
    assert total.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(module.training for module in model.distillers.modules())


def grey(**kwargs):
    config = copy.deepcopy(detector_config(**kwargs))
    config['backbone']['in_channels'] = 1
    config['data_preprocessor'].update(
        mean=[110.0], std=[55.0], bgr_to_rgb=False
    )
    return config


@pytest.mark.parametrize('colour', [False, True])
def test_grey_student__trains(colour):
    """A teacher of RGB images gets the one channel three times."""
    wide = dict(width=16, channels=24)
    teacher = detector_config(**wide) if colour else grey(**wide)
    model = MODELS.build(
        distillation_config(dict(type='era_mm.ERADistiller'), grey(), teacher)
    )
    model.init_weights()
    raw = detection_batch(2)
    raw['inputs'] = [image[:1] for image in raw['inputs']]
    data = model.data_preprocessor(copy.deepcopy(raw), True)
    total, _ = model.parse_losses(model(**data, mode='loss'))
    total.backward()
    assert total.isfinite()

    image = torch.stack(raw['inputs']).float()
    assert torch.equal(data['inputs'], (image - 110) / 55)
    if not colour:
        assert 'teacher_inputs' not in data
        return
    mean, std = (
        torch.tensor(teacher['data_preprocessor'][key]).view(3, 1, 1)
        for key in ('mean', 'std')
    )
    found = data['teacher_inputs']['teacher']
    assert torch.allclose(found, (image.expand(2, 3, 64, 64) - mean) / std)


def test_grey_teacher__of_a_colour_student_is_refused():
    with pytest.raises(ValueError, match='images of one channel'):
        MODELS.build(
            distillation_config(
                dict(type='era_mm.ERADistiller'),
                detector_config(),
                grey(width=16, channels=24),
            )
        )


def of_several_labels(width):
    config = classifier_config(width)
    config['head'] = dict(
        type='mmpretrain.MultiLabelLinearClsHead',
        num_classes=3,
        in_channels=8 * width,
    )
    return config


def with_sigmoids(width):
    config = classifier_config(width)
    config['head']['loss']['use_sigmoid'] = True
    return config


@pytest.mark.parametrize('config_of', [of_several_labels, with_sigmoids])
@pytest.mark.parametrize(
    'distiller',
    [
        dict(type='era_mm.ERADistiller', logit={}),
        dict(type='era_mm.LogitDistiller'),
    ],
    ids=['era', 'logit'],
)
def test_sigmoid_classifiers__are_not_compared_by_softmax(
    config_of, distiller
):
    with (
        DefaultScope.overwrite_default_scope('mmpretrain'),
        pytest.raises(ValueError, match=r'may give several|sigmoid'),
    ):
        MODELS.build(
            distillation_config(distiller, config_of(8), config_of(16))
        )


@pytest.mark.parametrize('config_of', [of_several_labels, classifier_config])
def test_mode_st__of_the_student_alone_is_the_students_prediction(config_of):
    distiller = dict(type='era_mm.ERADistiller', alpha=0.0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(
            distillation_config(distiller, config_of(8), config_of(16))
            | dict(inference_mode='ST')
        ).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        samples = [DataSample() for _ in images]
        own = model.student(images, copy.deepcopy(samples), mode='predict')
        found = model(images, samples, mode='predict')
    for expected, blend in zip(own, found, strict=True):
        assert torch.equal(blend.pred_score, expected.pred_score)
        assert torch.equal(blend.pred_label, expected.pred_label)
