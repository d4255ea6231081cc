"""Feature imitation: FitNet and PKD by hand, masks, connectors."""

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.methods.feature_imitation import imitation_loss, standardise
from era_mm.testing import detection_batch, distillation_config


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


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


@pytest.mark.parametrize('measure', ['mse', 'pearson'])
def test_distiller__is_the_mean_over_levels(teacher_file, measure):
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
    torch.testing.assert_close(
        losses['loss_imitation'], 3 * torch.stack(expected).mean()
    )
    losses['loss_imitation'].backward()
    assert model.student.backbone.conv1.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(measure='l1'), r"'mse', 'pearson'.*got 'l1'"),
        (dict(connector=False), 'needs equal channels'),
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
