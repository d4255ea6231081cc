"""Batches of one image, as an epoch's last one may be; grey images;
classifiers of several labels."""

import copy

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample
from torch import nn

from era_mm.core.host_models import image_channels
from era_mm.engine.random_batch import random_batch
from era_mm.engine.step_cost import cost_line
from era_mm.layers import spare_lone_values
from era_mm.methods.era.losses import ERALoss
from era_mm.methods.era.residuals import step_errors
from era_mm.registry import MODELS as ERA_MODELS
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


def step_of_one(distiller, host, **extra):
    """A model after the backward pass of a batch of one image."""
    batch = detection_batch(1)
    if host == 'detector':
        scope = 'mmdet'
        pair = (
            with_a_level_of_one_place(),
            with_a_level_of_one_place(width=16, channels=24),
        )
    else:
        scope = 'mmpretrain'
        pair = (classifier_config(), classifier_config(16))
        batch['data_samples'] = [DataSample().set_gt_label(1)]
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(distillation_config(distiller, *pair) | extra)
    model.init_weights()
    model.train()
    data = model.data_preprocessor(batch, True)
    total, _ = model.parse_losses(model(**data, mode='loss'))
    total.backward()
    assert total.isfinite()
    assert all(module.training for module in model.modules())
    return model


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
    if host == 'classifier' and 'IEKD' in distiller['type']:
        distiller = distiller | dict(source='backbone')
    model = step_of_one(distiller, host)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


BOTH = ('detector', 'classifier')
METHODS = {
    'FeatureImitation': BOTH,
    'PKD': BOTH,
    'AT': BOTH,
    'CWD': BOTH,
    'MGD': BOTH,
    'ReviewKD': BOTH,
    'Logit': BOTH,
    'CrossKD': BOTH[:1],
    'SimKD': BOTH[1:],
    'ResidualKD': BOTH,
    'TrunkToBranch': BOTH,
    'SoKD': BOTH,
}


def test_methods__are_all_tried_with_a_batch_of_one():
    registered = {
        name.removesuffix('Distiller')
        for name, cls in ERA_MODELS.module_dict.items()
        # Other tests register distillers of their own.
        if name.endswith('Distiller') and cls.__module__.startswith('era_mm.')
    }
    assert registered == {*METHODS, 'ERA', 'IEKD'}


@pytest.mark.parametrize(
    ('kind', 'host'),
    [(kind, host) for kind, hosts in METHODS.items() for host in hosts],
)
def test_batch_of_one__is_a_finite_step_of_every_method(kind, host):
    distiller = dict(type=f'era_mm.{kind}Distiller')
    extra = {}
    if kind == 'SoKD':
        # It looks for areas on maps; a classifier's features are vectors.
        distiller['base'] = dict(type='era_mm.FeatureImitationDistiller')
        distiller['dam'] = host == 'detector'
    if kind == 'SimKD':
        distiller['channels'] = [64, 128]
        extra['inherit'] = ['head']
    on_maps = ('AT', 'CWD', 'MGD', 'ReviewKD', 'TrunkToBranch')
    if host == 'classifier' and kind in on_maps:
        distiller['source'] = 'backbone'
    model = step_of_one(distiller, host, **extra)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 10
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_residual_pair__takes_one_place_of_one_image_in_every_norm():
    """The adapter has norms where the pair's channels are not the student's.

    So has the pair after an export: they are the model's own.
    """
    pair = MODELS.build(
        dict(
            type='era_mm.ResidualPair',
            student=dict(backbone=dict(type='mmpretrain.LeNet5')),
            assistant=dict(
                type='era_mm.FeatureAssistant',
                in_channels=[120],
                out_channels=[16],
            ),
            in_channels=[120],
            out_channels=[16],
        )
    ).train()
    norms = [m for m in pair.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 1
    (found,) = pair(torch.randn(1, 1, 32, 32))
    assert found.shape[:2] == (1, 16)
    assert found.isfinite().all()
    assert not any(norm.num_batches_tracked for norm in norms)


def test_first_batch_of_one__teaches_nothing_of_a_variance_that_is_unknown():
    """One value per channel has none; a share of it would be of anything."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(
            distillation_config(
                dict(type='era_mm.ERADistiller', form='normalised'),
                classifier_config(),
                classifier_config(16),
            )
        )
    model.init_weights()
    model.train()

    def step(number):
        batch = detection_batch(number)
        batch['data_samples'] = [
            DataSample().set_gt_label(i % 3) for i in range(number)
        ]
        model.zero_grad()
        losses = model(**model.data_preprocessor(batch, True), mode='loss')
        model.parse_losses(losses)[0].backward()
        distiller = model.distillers['distiller']
        gradients = [p.grad for p in distiller.mbrnet.parameters()]
        assert all(g.isfinite().all() for g in gradients)
        return distiller, losses, gradients

    distiller, losses, gradients = step(1)
    terms = distiller.loss_terms
    assert losses['era_unexplained_e0'] == 1
    assert losses['loss_era_align'] == terms.align_weight
    assert not distiller.explained.any()
    assert not any(g.any() for g in gradients)
    # More of them have a variance.
    distiller, losses, gradients = step(2)
    assert losses['era_unexplained_e0'] != 1
    assert any(g.any() for g in gradients)


@pytest.mark.parametrize('levels', [1, 2])
def test_unknown_variance__counts_as_one_without_gradient(levels):
    """(1 + 0.5 * 4) / 2 where another level is known."""
    terms = ERALoss()
    aligned = [torch.full((1, 2), 2.0, requires_grad=True)] * levels
    losses = terms.of_shares(
        errors=[
            step_errors(
                aligned=level,
                residuals=torch.zeros(1, 4, 2),
                target=torch.zeros(1, 2),
            )
            for level in aligned
        ],
        share_weights=torch.tensor([0.0, 0.5][:levels]),
    )
    found = losses['era_unexplained_e0']
    assert float(found) == (1.0 if levels == 1 else 1.5)
    losses['loss_era_align'].backward()
    assert aligned[0].grad.any() == (levels == 2)


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


def with_channels(number, **kwargs):
    """For images such as RGB with infrared, which no preprocessor changes."""
    config = copy.deepcopy(detector_config(**kwargs))
    config['backbone']['in_channels'] = number
    config['data_preprocessor'] = dict(type='DetDataPreprocessor')
    return config


def test_images_of_four_channels__train_and_are_measured():
    wide = dict(width=16, channels=24)
    model = MODELS.build(
        distillation_config(
            dict(type='era_mm.ERADistiller'),
            with_channels(4),
            with_channels(4, **wide),
        )
    )
    assert 'times the plain one' in cost_line(model)
    model.init_weights()
    raw = random_batch(
        model.student, 2, (64, 64), 3, torch.Generator().manual_seed(0)
    )
    assert raw['inputs'][0].shape == (4, 64, 64)
    data = model.data_preprocessor(raw, True)
    total, _ = model.parse_losses(model(**data, mode='loss'))
    total.backward()
    assert total.isfinite()


@pytest.mark.parametrize(('own', 'theirs'), [(3, 1), (4, 3), (3, 4), (1, 4)])
def test_images_of_other_channels__are_refused(own, theirs):
    with pytest.raises(ValueError) as error:
        MODELS.build(
            distillation_config(
                dict(type='era_mm.ERADistiller'),
                with_channels(own),
                with_channels(theirs, width=16, channels=24),
            )
        )
    message = str(error.value)
    shown = 'one channel' if theirs == 1 else f'{theirs} channels'
    assert f"images of {shown}, and the student's have {own}" in message


def test_image_channels__of_stems_that_are_no_plain_convolution():
    class Focus(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(12, 8, 3)

    assert image_channels(nn.Sequential(Focus())) == 3
    assert image_channels(nn.Sequential(nn.Linear(147, 8))) == 3
    assert image_channels(nn.Sequential(nn.Conv2d(1, 8, 3))) == 1


def test_grey_student__is_counted_and_its_teacher_evaluated():
    """The teacher of RGB images gets the one channel three times."""
    teacher = detector_config(width=16, channels=24)
    model = MODELS.build(
        distillation_config(dict(type='era_mm.ERADistiller'), grey(), teacher)
    )
    assert 'times the plain one' in cost_line(model)
    raw = random_batch(
        model.student, 1, (64, 64), 3, torch.Generator().manual_seed(0)
    )
    assert raw['inputs'][0].shape == (1, 64, 64)
    for sample in raw['data_samples']:
        sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
    colour = copy.deepcopy(raw)
    colour['inputs'] = [i.expand(3, -1, -1) for i in raw['inputs']]
    own = model.teachers['teacher']
    (found,), (expected,) = own.predict(raw), own.predict(colour)
    assert len(found.pred_instances) > 0
    assert torch.equal(
        found.pred_instances.bboxes, expected.pred_instances.bboxes
    )


def test_dry_run__that_fails_names_the_channels():
    broken = with_channels(4)
    widths = broken['neck']['in_channels']
    broken['neck']['in_channels'] = [width + 1 for width in widths]
    with pytest.raises(ValueError, match='256 x 256 with 4 channels'):
        MODELS.build(
            distillation_config(
                dict(type='era_mm.ERADistiller'), broken, with_channels(4)
            )
        )


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
