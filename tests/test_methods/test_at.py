"""AT: by hand, by a loop, on pyramids and on stages."""

import pytest
import torch
from mmengine.registry import MODELS
from torch.nn.functional import adaptive_avg_pool2d

from era_mm.methods.at import ATDistiller, attention, attention_loss
from era_mm.testing import detection_batch, distillation_config, noise

STAGES = [f'backbone.layer{index}' for index in range(1, 5)]


def test_loss__by_hand():
    # Student energies (9, 16) of one channel, so 9 / sqrt(337), ...;
    # teacher (1, 0). A second channel of the teacher changes the norm alone.
    student = torch.tensor([[[[3.0, -4.0]]]])
    teacher = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])
    norm = 337**0.5
    expected = ((9 / norm - 1) ** 2 + (16 / norm) ** 2) / 2
    found = attention_loss(student_feat=student, teacher_feat=teacher)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    # Scale does not matter, nor does the sign.
    moved = attention_loss(student_feat=-7 * student, teacher_feat=teacher)
    torch.testing.assert_close(moved, found)


@pytest.mark.parametrize('power', [1.0, 2.0, 4.0])
def test_loss__against_a_loop(power):
    student, teacher = noise(2, 3, 4, 6), noise(2, 5, 2, 3, seed=1)
    total = 0.0
    pooled = adaptive_avg_pool2d(student, (2, 3))
    for image in range(2):
        maps = []
        for one in (pooled, teacher):
            energy = [
                float((one[image, :, y, x].abs() ** power).sum())
                for y in range(2)
                for x in range(3)
            ]
            norm = sum(value**2 for value in energy) ** 0.5
            maps.append([value / norm for value in energy])
        total += sum((a - b) ** 2 for a, b in zip(*maps, strict=True))
    found = attention_loss(
        student_feat=student, teacher_feat=teacher, power=power
    )
    assert found.item() == pytest.approx(total / 12, rel=1e-9)
    # Whichever is the larger.
    other = attention_loss(
        student_feat=teacher, teacher_feat=student, power=power
    )
    torch.testing.assert_close(other, found)


def test_attention__of_a_dead_map_is_zero_and_has_a_gradient():
    feat = torch.zeros(1, 2, 2, 2, requires_grad=True)
    attention(feat).sum().backward()
    assert feat.grad.isfinite().all()


def test_distiller__adds_the_levels_of_a_pyramid_up(teacher_file):
    model = MODELS.build(
        distillation_config(
            dict(type='era_mm.ATDistiller'), checkpoint=teacher_file
        )
    )
    model.load_teachers()
    data = model.data_preprocessor(detection_batch(2), True)
    losses = model(**data, mode='loss')
    targets = model.teachers['teacher'].extract(data['inputs'])['neck']
    maps = model.student.extract_feat(data['inputs'])
    expected = 1000 * sum(
        attention_loss(student_feat=s, teacher_feat=t)
        for s, t in zip(maps, targets, strict=True)
    )
    torch.testing.assert_close(losses['loss_at'], expected)
    losses['loss_at'].backward()
    assert model.student.backbone.conv1.weight.grad.abs().max() > 0
    assert model.student.bbox_head.retina_cls.weight.grad is None
    assert not list(model.distillers.parameters())


def test_distiller__levels_of_a_pyramid_count_alike(teacher_file):
    """A loop over levels, images and positions."""
    model = MODELS.build(
        distillation_config(
            dict(type='era_mm.ATDistiller', num_positions=256),
            checkpoint=teacher_file,
        )
    )
    model.load_teachers()
    data = model.data_preprocessor(detection_batch(2), True)
    found = model(**data, mode='loss')['loss_at']
    targets = model.teachers['teacher'].extract(data['inputs'])['neck']
    maps = model.student.extract_feat(data['inputs'])
    assert len({m.shape[2:] for m in maps}) > 1
    total = 0.0
    for pair in zip(maps, targets, strict=True):
        for image in range(2):
            one, other = (
                m[image].double().square().sum(dim=0).flatten() for m in pair
            )
            one, other = one / one.norm(), other / other.norm()
            total += float(((one - other) ** 2).sum()) / 2
    assert found.item() == pytest.approx(1000 / 256 * total, rel=1e-5)


def test_distiller__refuses_a_wrong_number_of_positions():
    with pytest.raises(ValueError, match='`num_positions` must be None'):
        ATDistiller(num_positions=0)


def test_distiller__on_the_stages_of_a_classifier(classifiers, image_batch):
    model = classifiers(dict(type='era_mm.ATDistiller', source=STAGES))
    losses = model(**image_batch(), mode='loss')
    losses['loss_at'].backward()
    for index in range(1, 5):
        stage = getattr(model.student.backbone, f'layer{index}')
        assert stage[0].bn2.weight.grad.abs().max() > 0
    assert model.student.head.fc.weight.grad is None


def test_distiller__refuses_vectors_and_other_numbers(classifiers):
    with pytest.raises(ValueError, match='needs feature maps'):
        classifiers(dict(type='era_mm.ATDistiller'))
    with pytest.raises(ValueError, match='pairs of levels'):
        classifiers(
            dict(
                type='era_mm.ATDistiller',
                source=dict(student=STAGES[:3], teacher=STAGES),
            )
        )
