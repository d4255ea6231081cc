"""SimKD: loss by hand, routing, what is saved and used."""

import pytest
import torch
from mmengine.registry import MODELS
from torch.nn.functional import batch_norm, conv2d

from era_mm.methods.simkd import SimKDProjector, projection_loss
from era_mm.testing import classifier_config, distillation_config

DISTILLER = dict(type='era_mm.SimKDDistiller', channels=[64, 128])


def test_loss__by_hand():
    # Squared differences 1, 0, 4, 9.
    student = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    teacher = torch.tensor([[[[0.0, 2.0], [5.0, 1.0]]]])
    pair = dict(student_feat=student, teacher_feat=teacher)
    assert projection_loss(**pair).item() == 3.5
    # The larger is pooled: means 2.5 and 2.
    pair['teacher_feat'] = torch.tensor([[[[2.0]]]])
    assert projection_loss(**pair).item() == 0.25
    pair = dict(student_feat=pair['teacher_feat'], teacher_feat=student)
    assert projection_loss(**pair).item() == 0.25


def test_projector__by_its_layers():
    projector = SimKDProjector(6, 8, factor=4)
    feat = expected = torch.randn(3, 6, 5, 5)
    layers = projector.layers
    assert [layer.out_channels for layer in layers[::3]] == [2, 2, 8]
    for index, padding in ((0, 0), (3, 1), (6, 0)):
        norm = layers[index + 1]
        expected = conv2d(expected, layers[index].weight, padding=padding)
        expected = batch_norm(
            expected, None, None, norm.weight, norm.bias, training=True
        ).clamp(min=0)
    (found,) = projector((torch.zeros(1), feat))
    torch.testing.assert_close(found, expected)


def test_distiller__trains_features_alone(classifiers, image_batch):
    model = classifiers(DISTILLER | dict(loss_weight=2.0), inherit=['head'])
    model.train()
    teacher = model.teachers['teacher'].model
    head = {k: v.clone() for k, v in teacher.head.state_dict().items()}
    batch = image_batch()
    losses = model(**batch, mode='loss')
    assert list(losses) == ['loss_simkd']
    model.eval()
    value = model(**batch, mode='loss')['loss_simkd']
    with torch.no_grad():
        target = teacher.backbone(batch['inputs'])[-1]
        (own,) = model.student.neck[0](model.student.backbone(batch['inputs']))
    torch.testing.assert_close(value, 2 * (own - target).square().mean())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    losses['loss_simkd'].backward()
    for name, parameter in model.student.named_parameters():
        assert (parameter.grad is None) == name.startswith('head.'), name
    optimizer.step()
    # Not even weight decay has touched it.
    for key, value in model.student.head.state_dict().items():
        assert torch.equal(value, head[key])


def test_distiller__with_equal_features_predicts_as_the_teacher(
    classifiers, image_batch
):
    model = classifiers(DISTILLER, inherit=['head']).eval()
    teacher = model.teachers['teacher'].model
    batch = image_batch()
    feats = teacher.backbone(batch['inputs'])
    logits = model.student.head(model.student.neck[1](feats))
    torch.testing.assert_close(logits, teacher(batch['inputs']))


def test_distiller__saves_a_model_of_the_host(classifiers):
    model = classifiers(DISTILLER, inherit=['head'])
    config = model.student_config
    assert config.type == 'mmpretrain.ImageClassifier'
    assert [one.type for one in config.neck] == [
        'era_mm.SimKDProjector',
        'mmpretrain.GlobalAveragePooling',
    ]
    plain = MODELS.build(config)
    plain.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    model.eval()
    assert torch.equal(plain.eval()(images), model(images))


def test_distiller__refuses_another_head(classifiers, image_batch):
    model = classifiers(DISTILLER, inherit=['head'])
    model.student.head.fc.weight.data.add_(1)
    with pytest.raises(RuntimeError, match='Set inherit='):
        model(**image_batch(), mode='loss')


def test_distiller__refuses(classifiers):
    with pytest.raises(ValueError, match='Correct `channels`'):
        classifiers(DISTILLER | dict(channels=[64, 64]), inherit=['head'])
    with pytest.raises(ValueError, match='two numbers'):
        classifiers(DISTILLER | dict(channels=[64]))
    with pytest.raises(ValueError, match='and the student needs'):
        classifiers(DISTILLER, student=classifier_config(num_classes=4))


def test_distiller__refuses_detectors():
    with pytest.raises(ValueError, match='needs a classifier'):
        MODELS.build(distillation_config(DISTILLER))
