"""ReviewKD: HCL by hand, fusion against its formula, routing."""

import functools

import pytest
import torch
from mmengine.registry import MODELS
from torch.nn.functional import batch_norm, conv2d

from era_mm.methods.reviewkd import AttentionFusion, hierarchical_loss
from era_mm.testing import detection_batch, distillation_config
from era_mm.testing import noise as double_noise

STAGES = [f'backbone.layer{index}' for index in range(1, 5)]


noise = functools.partial(double_noise, dtype=torch.float32)


def test_hcl__by_hand():
    # Differences 2, 0, 0, 0: mean 1, and of the pooled map 1/2: 1/4.
    # (1 + 1/2 * 1/4) / (1 + 1/2); sides 4 and 2 are not smaller than 2.
    student = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]]])
    found = hierarchical_loss(
        student_feat=student, teacher_feat=torch.zeros(1, 1, 2, 2)
    )
    assert found.item() == pytest.approx((1 + 0.125) / 1.5)
    # A single place: the squared error alone.
    found = hierarchical_loss(
        student_feat=torch.full((1, 1, 1, 1), 3.0),
        teacher_feat=torch.zeros(1, 1, 1, 1),
    )
    assert found.item() == 9


def test_hcl__against_a_loop():
    student, teacher = noise(2, 3, 8, 8), noise(2, 3, 8, 8, seed=1)
    expected = (student - teacher).square().mean()
    for side, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
        step = 8 // side
        pooled = [
            torch.stack(
                [
                    one[..., y : y + step, x : x + step].mean((2, 3))
                    for y in range(0, 8, step)
                    for x in range(0, 8, step)
                ]
            )
            for one in (student, teacher)
        ]
        expected += weight * (pooled[0] - pooled[1]).square().mean()
    found = hierarchical_loss(student_feat=student, teacher_feat=teacher)
    torch.testing.assert_close(found, expected / 1.875)


def normed(feat, norm):
    return batch_norm(feat, None, None, norm.weight, norm.bias, training=True)


def test_fusion__against_its_formula():
    fusion = AttentionFusion(5, 4, 6, fuse=True)
    feat, deeper = noise(3, 5, 4, 4), noise(3, 4, 2, 2, seed=1)
    out, fused = fusion(feat, deeper, torch.Size((8, 8)))
    x = normed(conv2d(feat, fusion.reduce[0].weight), fusion.reduce[1])
    y = deeper.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    layer = fusion.attend[0]
    z = conv2d(torch.cat([x, y], 1), layer.weight, layer.bias).sigmoid()
    mixed = x * z[:, 0:1] + y * z[:, 1:2]
    mixed = mixed.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(fused, mixed)
    expected = conv2d(mixed, fusion.expand[0].weight, padding=1)
    torch.testing.assert_close(out, normed(expected, fusion.expand[1]))


def test_distiller__deep_levels_teach_shallow_ones(teacher_file):
    model = MODELS.build(
        distillation_config(
            dict(type='era_mm.ReviewKDDistiller', loss_weight=2.0),
            checkpoint=teacher_file,
        )
    )
    model.load_teachers()
    distiller = model.distillers['distiller']
    assert [fusion.attend is None for fusion in distiller.fusions] == [
        False,
        True,
    ]
    maps = [noise(2, 16, 8, 8), noise(2, 16, 4, 4, seed=1)]
    maps = [feat.requires_grad_() for feat in maps]
    targets = (noise(2, 24, 8, 8, seed=2), noise(2, 24, 4, 4, seed=3))
    feats = dict(
        student_feats={'neck': tuple(maps)},
        teacher_feats={'neck': targets},
        data_samples=[],
    )
    loss = distiller.loss(**feats)['loss_reviewkd']
    deep, fused = distiller.fusions[1](maps[1], None, targets[1].shape[2:])
    shallow, _ = distiller.fusions[0](maps[0], fused, targets[0].shape[2:])
    expected = 2 * (
        hierarchical_loss(student_feat=shallow, teacher_feat=targets[0])
        + hierarchical_loss(student_feat=deep, teacher_feat=targets[1])
    )
    torch.testing.assert_close(loss, expected)
    # The first level's loss reaches the deep map, not the other way round.
    first = hierarchical_loss(student_feat=shallow, teacher_feat=targets[0])
    grads = torch.autograd.grad(first, maps, retain_graph=True)
    assert all(grad.abs().max() > 0 for grad in grads)
    second = hierarchical_loss(student_feat=deep, teacher_feat=targets[1])
    grads = torch.autograd.grad(second, maps, allow_unused=True)
    assert grads[0] is None

    data = model.data_preprocessor(detection_batch(2), True)
    losses = model(**data, mode='loss')
    losses['loss_reviewkd'].backward()
    assert model.student.backbone.conv1.weight.grad.abs().max() > 0
    assert model.student.bbox_head.retina_cls.weight.grad is None
    for name, parameter in distiller.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_distiller__takes_stages_and_pooled_features(classifiers, image_batch):
    model = classifiers(
        dict(type='era_mm.ReviewKDDistiller', source=[*STAGES, 'neck'])
    )
    fusions = model.distillers['distiller'].fusions
    assert [f.reduce[0].in_channels for f in fusions] == [8, 16, 32, 64, 64]
    assert [f.expand[0].out_channels for f in fusions] == [
        *(16, 32, 64, 128, 128)
    ]
    losses = model(**image_batch(), mode='loss')
    losses['loss_reviewkd'].backward()
    assert model.student.head.fc.weight.grad is None
    for index in range(1, 5):
        stage = getattr(model.student.backbone, f'layer{index}')
        assert stage[0].bn2.weight.grad.abs().max() > 0


def test_distiller__maps_of_two_sizes(classifiers, image_batch):
    model = classifiers(
        dict(
            type='era_mm.ReviewKDDistiller',
            source=dict(student=STAGES[1:], teacher=STAGES[:3]),
        )
    )
    assert model(**image_batch(), mode='loss')['loss_reviewkd'].isfinite()
    with pytest.raises(ValueError, match='pairs of levels'):
        classifiers(
            dict(
                type='era_mm.ReviewKDDistiller',
                source=dict(student=STAGES, teacher=STAGES[:3]),
            )
        )
