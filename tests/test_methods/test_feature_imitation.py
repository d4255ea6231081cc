"""Feature imitation: FitNet and PKD by hand, masks, connectors."""

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.methods.feature_imitation import imitation_loss, standardise
from era_mm.testing import detection_batch, distillation_config, noise

ROLES = ('student', 'teacher')


def test_mse__by_hand():
    # Differences 1, 0, -2, 3: (1 + 0 + 4 + 9) / 4 = 3.5
    student = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    teacher = torch.tensor([[[[0.0, 2.0], [5.0, 1.0]]]])
    pair = dict(student_feat=student, teacher_feat=teacher)
    assert imitation_loss(**pair).item() == 3.5
    # Two areas that share the lower right cell: 4, 9 of the bottom row.
    masks = torch.zeros(1, 2, 2, 2)
    masks[0, 0, 1] = masks[0, 1, 1, 1] = 1
    assert imitation_loss(**pair, masks=masks).item() == 6.5
    assert imitation_loss(**pair, masks=0 * masks).item() == 0


def test_standardise__by_hand():
    # Mean 2 and deviation sqrt(2); mean 5 and sqrt(8).
    feat = torch.tensor([[1.0, 7.0], [3.0, 3.0]])
    half = 0.5**0.5
    expected = torch.tensor([[-half, half], [half, -half]])
    torch.testing.assert_close(standardise(feat), expected)


def test_pearson__is_one_minus_the_correlation():
    """1/2 mean (a - b)^2 of standardised a, b = (1 - r) (M - 1) / M."""
    student, teacher = noise(3, 2, 4, 5), noise(3, 2, 4, 5, seed=1)
    found = imitation_loss(
        student_feat=student, teacher_feat=teacher, measure='pearson'
    )
    count, expected = 3 * 4 * 5, 0.0
    for channel in range(2):
        pair = torch.stack(
            [student[:, channel].flatten(), teacher[:, channel].flatten()]
        )
        r = torch.corrcoef(pair)[0, 1]
        expected += (1 - r) * (count - 1) / count / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Scale and shift of a channel do not matter.
    moved = imitation_loss(
        student_feat=3 * student + 1, teacher_feat=teacher, measure='pearson'
    )
    torch.testing.assert_close(found, moved, rtol=1e-4, atol=1e-5)
    assert standardise(noise(8, 3)).std(0).tolist() == pytest.approx(
        [1] * 3, abs=1e-4
    )


def test_pearson__of_constant_channels_and_lone_values_is_finite():
    """One image with a 1x1 map, or a dead channel, has no deviation."""
    student = noise(2, 3, 4, 4)
    student[:, 1] = 0.1
    for feat in (student, noise(1, 3, 1, 1), noise(1, 3)):
        feat = feat.requires_grad_()
        teacher = noise(*feat.shape, seed=1)
        imitation_loss(
            student_feat=feat, teacher_feat=teacher, measure='pearson'
        ).backward()
        assert feat.grad.isfinite().all()
        assert standardise(feat).isfinite().all()
    assert standardise(noise(1, 3, 1, 1)).abs().max() == 0
    # The student's share of the dead channel is 0: what is left is the
    # teacher's variance, 1 as (M - 1) / M of M = 32.
    teacher = noise(2, 1, 4, 4)
    found = imitation_loss(
        student_feat=torch.zeros(2, 1, 4, 4),
        teacher_feat=teacher,
        measure='pearson',
    )
    assert found.item() == pytest.approx(31 / 32 / 2, rel=1e-4)


@pytest.mark.parametrize('measure', ['mse', 'pearson'])
def test_distiller__is_the_mean_or_the_sum_over_levels(teacher_file, measure):
    """FitNet's mean [ours]; PKD's sum, as published."""
    model = MODELS.build(
        distillation_config(
            dict(
                type='era_mm.FeatureImitationDistiller',
                measure=measure,
                loss_weight=3.0,
            ),
            checkpoint=teacher_file,
        )
    )
    model.load_teachers()
    data = model.data_preprocessor(detection_batch(2), True)
    losses = model(**data, mode='loss')
    targets = model.teachers['teacher'].extract(data['inputs'])['neck']
    maps = model.student.extract_feat(data['inputs'])
    distiller = model.distillers['distiller']
    expected = [
        imitation_loss(
            student_feat=connector(s), teacher_feat=t, measure=measure
        )
        for connector, s, t in zip(
            distiller.connectors, maps, targets, strict=True
        )
    ]
    assert len(expected) == 2
    total = sum(expected) if measure == 'pearson' else sum(expected) / 2
    torch.testing.assert_close(losses['loss_imitation'], 3 * total)
    losses['loss_imitation'].backward()
    assert model.student.backbone.conv1.weight.grad.abs().max() > 0


def prepared(student_channels=8, teacher_channels=8, levels=5, **options):
    """A distiller that has met pyramids of so many levels, and these."""
    sizes = [2 ** (levels + 1 - level) for level in range(levels)]
    feats = [
        {
            'neck': tuple(
                noise(2, channels, size, size, seed=seed + size).float()
                for size in sizes
            )
        }
        for seed, channels in ((0, student_channels), (99, teacher_channels))
    ]
    distiller = MODELS.build(
        dict(type='era_mm.FeatureImitationDistiller', **options)
    )
    pair = dict(student_feats=feats[0], teacher_feats=feats[1])
    distiller.prepare(student=None, teacher=None, **pair)
    return distiller, pair


def test_pkd__is_as_published_by_default():
    """6 per level, summed over the first four, without connectors."""
    distiller, pair = prepared(measure='pearson')
    assert not list(distiller.parameters())
    expected = 0.0
    for level in range(4):
        feats = [pair[f'{role}_feats']['neck'][level] for role in ROLES]
        student, teacher = (
            (f - f.mean((0, 2, 3), True)) / f.std((0, 2, 3), keepdim=True)
            for f in feats
        )
        expected += 6 * (student - teacher).square().mean() / 2
    found = distiller.loss(**pair, data_samples=[])['loss_imitation']
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    # Unlike noise has r = 0: about 6 * 4.
    assert found.item() == pytest.approx(24, rel=0.1)
    assert distiller.loss_weights() == {'loss_imitation': 6}


def test_pkd__has_a_connector_where_channels_differ_alone():
    distiller, pair = prepared(8, 12, measure='pearson')
    assert [
        tuple(connector.weight.shape[:2]) for connector in distiller.connectors
    ] == [(12, 8)] * 4
    distiller.loss(**pair, data_samples=[])['loss_imitation'].backward()
    assert all(p.grad is not None for p in distiller.parameters())
    always, _ = prepared(measure='pearson', connector=True, num_levels=2)
    assert len(list(always.parameters())) == 2 * 2


def test_fitnet__has_all_levels_and_a_connector_at_each():
    distiller, _ = prepared()
    assert len(distiller.connectors) == 5
    assert len(list(distiller.parameters())) == 5 * 2
    assert distiller.loss_weights() == {'loss_imitation': 1}


def test_levels__those_left_out_need_no_areas():
    """Areas come for all levels; the first count."""
    distiller, pair = prepared(num_levels=2, connector=False)
    masks = [
        torch.zeros(2, 1, *feat.shape[2:])
        for feat in pair['student_feats']['neck']
    ]
    masks[0][:, 0, 0] = 1
    found = distiller.loss(**pair, data_samples=[], area_masks=masks)
    student, teacher = (pair[f'{role}_feats']['neck'][0] for role in ROLES)
    expected = (student - teacher)[:, :, 0].square().mean() / 2
    torch.testing.assert_close(found['loss_imitation'], expected)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(measure='l1'), r"'mse', 'pearson'.*got 'l1'"),
        (dict(connector=False), 'needs equal channels'),
        (dict(num_levels=0), 'at least 1, but got 0'),
        (dict(num_levels=3), 'is 3, but there are 2 levels'),
        (
            dict(source=dict(student='neck', teacher='backbone.layer3')),
            'same levels',
        ),
    ],
)
def test_distiller__refuses(teacher_file, options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(
            distillation_config(
                dict(type='era_mm.FeatureImitationDistiller', **options),
                checkpoint=teacher_file,
            )
        )
