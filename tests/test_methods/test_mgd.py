"""MGD: by hand, through the model, masks and where they come from."""

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.methods.mgd import MGDDistiller, generation_loss, keep_mask
from era_mm.testing import detection_batch, distillation_config


def build(checkpoint='random', **options):
    model = MODELS.build(
        distillation_config(
            dict(type='era_mm.MGDDistiller', **options), checkpoint=checkpoint
        )
    )
    model.load_teachers()
    return model


def test_loss__by_hand():
    # Differences 1, 0, -2, 3 of one image and 1, 1, 1, 1 of another:
    # (14 + 4) / 2 = 9.
    student = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[1.0, 1.0]] * 2]])
    teacher = torch.tensor([[[[0.0, 2.0], [5.0, 1.0]]], [[[0.0, 0.0]] * 2]])
    found = generation_loss(student_feat=student, teacher_feat=teacher)
    assert found.item() == 9


def test_mask__is_of_places_and_of_the_asked_share():
    generator = torch.Generator().manual_seed(0)
    feat = torch.zeros(4, 8, 50, 50)
    mask = keep_mask(feat, 0.65, generator)
    assert mask.shape == (4, 1, 50, 50)
    assert set(mask.unique().tolist()) == {0, 1}
    assert mask.mean().item() == pytest.approx(0.35, abs=0.01)
    assert keep_mask(feat, 0.0, generator).all()
    # Each image has its own.
    assert not torch.equal(mask[0], mask[1])


def test_mask__of_channels_hides_whole_channels_of_an_image():
    feat = torch.zeros(2, 400, 3, 5)
    mask = keep_mask(
        feat, 0.15, torch.Generator().manual_seed(0), mask='channels'
    )
    drawn = torch.rand(2, 400, generator=torch.Generator().manual_seed(0))
    assert mask.shape == (2, 400, 1, 1)
    assert torch.equal(mask[..., 0, 0] == 1, drawn >= 0.15)
    assert mask.mean().item() == pytest.approx(0.85, abs=0.03)
    assert not torch.equal(mask[0], mask[1])


def test_distiller__of_channels_by_hand():
    """Of 2 aligned channels the first is masked: only the second counts."""
    distiller = MGDDistiller(mask='channels', mask_ratio=0.5, loss_weight=3.0)
    feats = dict(
        student_feats={'neck': (torch.tensor([[[[1.0]], [[2.0]]]]),)},
        teacher_feats={'neck': (torch.tensor([[[[0.0]], [[-4.0]]]]),)},
    )
    distiller.prepare(student=None, teacher=None, **feats)
    first, _, second = distiller.generators[0]
    with torch.no_grad():
        for layer in (first, second):
            layer.bias.zero_()
            layer.weight.zero_()
            # Both outputs are the sum of both channels.
            layer.weight[:, :, 1, 1] = 1
    # Steps whose draws keep both, one and none.
    found = {}
    for step in range(40):
        drawn = torch.rand(2, generator=torch.Generator().manual_seed(step))
        distiller.begin_step(step)
        loss = distiller.loss(**feats, data_samples=[])['loss_mgd'].item()
        found[tuple((drawn >= 0.5).tolist())] = loss
    # The first layer gives s = 3, 1, 2 or 0 twice, the second 2 s twice:
    # 3 * ((2 s)^2 + (2 s + 4)^2).
    assert found == {
        (True, True): 3 * (36 + 100),
        (True, False): 3 * (4 + 36),
        (False, True): 3 * (16 + 64),
        (False, False): 3 * 16,
    }


def test_distiller__against_its_layers_by_hand(teacher_file):
    model = build(teacher_file, mask_ratio=0.0)
    distiller = model.distillers['distiller']
    data = model.data_preprocessor(detection_batch(2), True)
    losses = model(**data, mode='loss')
    targets = model.teachers['teacher'].extract(data['inputs'])['neck']
    maps = model.student.extract_feat(data['inputs'])
    expected = 0.0
    for level, (feat, target) in enumerate(zip(maps, targets, strict=True)):
        align = distiller.aligns[level]
        feat = torch.nn.functional.conv2d(feat, align.weight, align.bias)
        first, _, second = distiller.generators[level]
        for index, layer in enumerate((first, second)):
            feat = torch.nn.functional.conv2d(
                feat, layer.weight, layer.bias, padding=1
            )
            feat = feat.clamp(min=0) if index == 0 else feat
        expected += 2e-5 * (feat - target).square().sum() / 2
    torch.testing.assert_close(losses['loss_mgd'], expected)
    losses['loss_mgd'].backward()
    assert model.student.backbone.conv1.weight.grad.abs().max() > 0
    assert model.student.bbox_head.retina_cls.weight.grad is None
    for parameter in distiller.parameters():
        assert parameter.grad.abs().max() > 0


def test_distiller__masked_places_get_their_gradient_from_the_others():
    model = build(mask_ratio=0.65)
    distiller = model.distillers['distiller']
    assert isinstance(distiller, MGDDistiller)
    feats = [torch.randn(1, 16, 8, 8, requires_grad=True) for _ in range(2)]
    targets = [torch.randn(1, 24, 8, 8) for _ in range(2)]
    distiller.loss(
        student_feats={'neck': tuple(feats)},
        teacher_feats={'neck': tuple(targets)},
        data_samples=[],
    )['loss_mgd'].backward()
    generator = torch.Generator().manual_seed(0)
    for feat in feats:
        kept = keep_mask(feat, 0.65, generator)[:, 0].bool()
        reached = feat.grad.abs().sum(1) > 0
        assert torch.equal(kept, reached)


def test_distiller__masks_follow_the_iteration_and_draw_nothing_else():
    model = build()
    distiller = model.distillers['distiller']
    feats = dict(
        student_feats={'neck': tuple(torch.randn(1, 16, 8, 8) for _ in 'ab')},
        teacher_feats={'neck': tuple(torch.randn(1, 24, 8, 8) for _ in 'ab')},
        data_samples=[],
    )
    before = torch.get_rng_state()
    values = []
    for step in (5, 6, 5):
        distiller.begin_step(step)
        values.append(distiller.loss(**feats)['loss_mgd'].item())
    assert torch.equal(before, torch.get_rng_state())
    assert values[0] == values[2] != values[1]


def test_distiller__on_the_last_map_of_a_classifier(classifiers, image_batch):
    model = classifiers(
        dict(
            type='era_mm.MGDDistiller',
            source='backbone',
            mask='channels',
            mask_ratio=0.15,
            loss_weight=7e-5,
        )
    )
    losses = model(**image_batch(), mode='loss')
    assert losses['loss_mgd'] > 0
    losses['loss_mgd'].backward()
    assert model.student.head.fc.weight.grad is None
    assert model.student.backbone.conv1.weight.grad.abs().max() > 0


@pytest.mark.parametrize('ratio', [-0.1, 1.0])
def test_distiller__refuses_ratios(ratio):
    with pytest.raises(ValueError, match='less than 1'):
        build(mask_ratio=ratio)


def test_distiller__refuses_other_masks():
    with pytest.raises(ValueError, match=r"'channels'.*got 'pixels'"):
        build(mask='pixels')
