"""CrossKD: losses by hand, the cross-head by its layers, routing."""

import math

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.methods.crosskd import (
    match_statistics,
    quality_focal_loss,
    weighted_giou_loss,
)
from era_mm.testing import (
    detection_batch,
    detector_config,
    distillation_config,
    noise,
    save_teacher,
)


def deep(config, layers):
    """The same with towers of so many layers."""
    return config | dict(
        bbox_head=config['bbox_head'] | dict(stacked_convs=layers)
    )


def build(folder, student=None, teacher=None, **options):
    teacher = teacher or detector_config(width=16, channels=24)
    model = MODELS.build(
        distillation_config(
            dict(type='era_mm.CrossKDDistiller', **options),
            student or detector_config(),
            teacher,
            save_teacher(teacher, folder / 'teacher.pth'),
        )
    )
    model.load_teachers()
    return model


def test_scores__by_hand():
    # z = 0 for q = 1 and q = 1/2: 1/2 * log 2, and 0.
    logits = torch.zeros(1, 2)
    scores = torch.tensor([[1.0, 0.5]])
    pair = dict(student_logits=logits, teacher_scores=scores)
    found = quality_focal_loss(**pair)
    assert found.item() == pytest.approx(0.5 * math.log(2))
    found = quality_focal_loss(**pair, beta=2.0)
    assert found.item() == pytest.approx(0.25 * math.log(2))


def test_boxes__by_hand():
    # Overlap 1 of a union of 7 in a hull of 9: GIoU = 1/7 - 2/9.
    # The second box agrees; the third has no weight.
    one = torch.tensor([[0.0, 0, 2, 2], [0, 0, 4, 4], [0, 0, 1, 1]])
    other = torch.tensor([[1.0, 1, 3, 3], [0, 0, 4, 4], [5, 5, 6, 6]])
    found = weighted_giou_loss(
        student_boxes=one,
        teacher_boxes=other,
        weights=torch.tensor([0.25, 0.5, 0.0]),
    )
    expected = 0.25 * (1 - (1 / 7 - 2 / 9)) / 0.75
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_statistics__by_hand():
    # Mean 2 and variance 1 become mean 10 and variance 9; without eps 7, 13.
    # The second channel has variance 0: of it only the mean remains.
    student = torch.tensor([[[[1.0, 3.0]], [[4.0, 4.0]]]])
    teacher = torch.tensor([[[[13.0, 7.0]], [[0.0, 2.0]]]])
    pair = dict(student_feat=student, teacher_feat=teacher)
    found = match_statistics(**pair, eps=0.0)
    assert found[0, 0].tolist() == [[7, 13]]
    found = match_statistics(**pair, eps=1.0)
    root = 5**0.5
    expected = torch.tensor([[[[10 - root, 10 + root]], [[1.0, 1.0]]]])
    torch.testing.assert_close(found, expected)


def test_statistics__are_of_a_channel_over_batch_and_positions():
    """On channels of all scales, and of maps of unlike numbers."""
    own = noise(3, 4, 5, 2) * torch.tensor([1e2, 1, 1, 3.0])[:, None, None]
    other = 2 * noise(3, 4, 5, 2, seed=1) - 1
    found = match_statistics(student_feat=own, teacher_feat=other)
    for channel in range(4):
        values, wanted, given = (
            feat[:, channel].flatten() for feat in (found, other, own)
        )
        assert values.mean().item() == pytest.approx(wanted.mean().item())
        assert values.std().item() == pytest.approx(
            wanted.std().item(), rel=1e-4
        )
        # A line with a rise: the order of the values stays.
        assert torch.equal(values.argsort(), given.argsort())
    same = match_statistics(student_feat=own, teacher_feat=own)
    torch.testing.assert_close(same, own)


def test_statistics__have_gradients_of_no_mean_and_scale():
    student = noise(2, 3, 4, 4).requires_grad_()
    teacher = noise(2, 3, 4, 4, seed=1).requires_grad_()

    def match(feat):
        return match_statistics(student_feat=feat, teacher_feat=teacher)

    assert torch.autograd.gradcheck(match, student)
    (match(student) * noise(2, 3, 4, 4, seed=2)).sum().backward()
    assert teacher.grad is None
    grad = student.grad
    assert grad.abs().max() > 0.1
    centred = student - student.mean((0, 2, 3), keepdim=True)
    assert grad.sum((0, 2, 3)).abs().max() < 1e-9
    # All but what eps leaves.
    assert (grad * centred).sum((0, 2, 3)).abs().max() < 1e-3


def test_statistics__of_dead_channels_and_lone_values_are_finite():
    for own in (torch.zeros(2, 3, 4, 4), torch.ones(1, 3, 1, 1)):
        own.requires_grad_()
        other = noise(*own.shape).float()
        found = match_statistics(student_feat=own, teacher_feat=other)
        mean = other.mean((0, 2, 3), keepdim=True).expand_as(found)
        torch.testing.assert_close(found, mean)
        found.square().sum().backward()
        assert own.grad.isfinite().all()


def losses_and_maps(model):
    data = model.data_preprocessor(detection_batch(2), True)
    losses = model(**data, mode='loss')
    maps = model.student.extract_feat(data['inputs'])
    theirs = model.teachers['teacher'].model.extract_feat(data['inputs'])
    return losses, maps, theirs


@pytest.mark.parametrize('layer', [None, 1])
def test_distiller__goes_on_in_the_teachers_head(tmp_path, layer):
    """RetinaNet: written out level by level, anchor by anchor."""
    model = build(
        tmp_path,
        deep(detector_config(), 2),
        deep(detector_config(width=16, channels=24), 3),
        layer=layer,
        score_weight=2.0,
        box_weight=0.5,
    )
    distiller = model.distillers['distiller']
    depth = layer or 2
    losses, maps, theirs = losses_and_maps(model)
    own, head = model.student.bbox_head, model.teachers['teacher'].model
    head = head.bbox_head
    sizes = [feat.shape[2:] for feat in maps]
    priors = head.prior_generator.grid_priors(sizes, device='cpu')
    score = box = total = 0.0
    for feat, their, anchors in zip(maps, theirs, priors, strict=True):
        ends = []
        # The mean and variance of the channels of both images.
        dims = dict(dim=(0, 2, 3), keepdim=True)
        for index, (tower, predictor) in enumerate(
            (('cls_convs', 'retina_cls'), ('reg_convs', 'retina_reg'))
        ):
            crossed, told = feat, their
            for conv in getattr(own, tower)[:depth]:
                crossed = conv(crossed)
            crossed = distiller.aligns[index](crossed)
            for conv in getattr(head, tower)[:depth]:
                told = conv(told)
            own_var, their_var = (
                feat.var(**dims, correction=0) + 1e-5
                for feat in (crossed, told)
            )
            crossed = (crossed - crossed.mean(**dims)) / own_var.sqrt()
            crossed = crossed * their_var.sqrt() + told.mean(**dims)
            for conv in getattr(head, tower)[depth:]:
                crossed, told = conv(crossed), conv(told)
            last = getattr(head, predictor)
            ends.append((last(crossed), last(told)))
        (z, t), (b, u) = ends
        for image in range(2):
            q = t[image].permute(1, 2, 0).reshape(-1, 3).sigmoid()
            p = z[image].permute(1, 2, 0).reshape(-1, 3)
            score += quality_focal_loss(student_logits=p, teacher_scores=q)
            boxes = [
                head.bbox_coder.decode(
                    anchors, one[image].permute(1, 2, 0).reshape(-1, 4)
                )
                for one in (b, u)
            ]
            weights = q.amax(1)
            total += weights.sum()
            box += weights.sum() * weighted_giou_loss(
                student_boxes=boxes[0], teacher_boxes=boxes[1], weights=weights
            )
    torch.testing.assert_close(losses['loss_crosskd_score'], 2 * score / total)
    torch.testing.assert_close(losses['loss_crosskd_box'], 0.5 * box / total)


def test_distiller__crosses_after_three_of_four_layers(tmp_path):
    model = build(tmp_path, deep(detector_config(), 4))
    sources = model.distillers['distiller'].student_sources
    assert sources == ('bbox_head.cls_convs.2', 'bbox_head.reg_convs.2')


def test_distiller__compares_distributions_with_their_own_weight(tmp_path):
    """GFL: 4 times the KL of a side, averaged over the four."""
    config = detector_config(head='GFLHead')
    model = build(tmp_path, config, config)
    distiller = model.distillers['distiller']
    assert distiller.loss_weights() == dict(
        loss_crosskd_score=1, loss_crosskd_box=4
    )
    losses, maps, theirs = losses_and_maps(model)
    own, head = model.student.bbox_head, model.teachers['teacher'].model
    head = head.bbox_head
    gap = total = 0.0
    for level, (feat, their) in enumerate(zip(maps, theirs, strict=True)):
        told = head.cls_convs[0](their)
        weights = head.gfl_cls(told).sigmoid().amax(1)
        told = head.reg_convs[0](their)
        crossed = match_statistics(
            student_feat=own.reg_convs[0](feat), teacher_feat=told
        )
        z, t = (
            head.scales[level](head.gfl_reg(f)).unflatten(1, (4, -1))
            for f in (crossed, told)
        )
        p, q = z.softmax(2), t.softmax(2)
        for side in range(4):
            kl = (q * (q / p).log())[:, side].sum(1)
            gap += (weights * kl).sum() / 4
        total += weights.sum()
    torch.testing.assert_close(losses['loss_crosskd_box'], 4 * gap / total)
    given = build(tmp_path, config, config, box_weight=0.5)
    assert given.distillers['distiller'].box_weight == 0.5


def test_distiller__boxes_of_numbers_have_the_weight_of_scores(tmp_path):
    weights = build(tmp_path).distillers['distiller'].loss_weights()
    assert weights == dict(loss_crosskd_score=1, loss_crosskd_box=1)


def test_distiller__does_not_see_the_scale_of_the_students_tower(tmp_path):
    config = detector_config()
    model = build(tmp_path, config, config)
    before, _, _ = losses_and_maps(model)
    for tower in ('cls_convs', 'reg_convs'):
        conv = getattr(model.student.bbox_head, tower)[0].conv
        conv.weight.data.mul_(50)
        conv.bias.data.mul_(50)
    after, _, _ = losses_and_maps(model)
    assert after['loss_cls'] != before['loss_cls']
    for key in ('loss_crosskd_score', 'loss_crosskd_box'):
        assert after[key].item() == pytest.approx(before[key].item(), rel=0.05)


def test_distiller__leaves_the_students_last_layers_to_the_labels(tmp_path):
    model = build(tmp_path, deep(detector_config(), 2), layer=1)
    losses, _, _ = losses_and_maps(model)
    (losses['loss_crosskd_score'] + losses['loss_crosskd_box']).backward()
    head = model.student.bbox_head
    for tower in (head.cls_convs, head.reg_convs):
        assert tower[0].conv.weight.grad.abs().max() > 0
        assert tower[1].conv.weight.grad is None
    assert head.retina_cls.weight.grad is None
    assert model.student.backbone.conv1.weight.grad.abs().max() > 0
    for align in model.distillers['distiller'].aligns:
        assert align.weight.grad.abs().max() > 0
    for parameter in model.teachers['teacher'].model.parameters():
        assert parameter.grad is None


@pytest.mark.parametrize('kind', ['RetinaHead', 'FCOSHead', 'ATSSHead'])
@pytest.mark.parametrize('teacher', ['FCOSHead', 'GFLHead', 'ATSSHead'])
def test_distiller__heads_of_all_kinds_cross(tmp_path, kind, teacher):
    model = build(
        tmp_path,
        detector_config(head=kind),
        detector_config(width=16, channels=24, head=teacher),
    )
    losses, _, _ = losses_and_maps(model)
    for key in ('loss_crosskd_score', 'loss_crosskd_box'):
        assert losses[key].isfinite()
        assert losses[key] > 0


@pytest.mark.parametrize('head', ['RetinaHead', 'FCOSHead', 'GFLHead'])
def test_distiller__is_zero_where_the_towers_agree(tmp_path, head):
    config = detector_config(head=head)
    model = build(tmp_path, config, config)
    teacher = model.teachers['teacher'].model
    if head == 'FCOSHead':
        # Boxes of no size have no overlap, not even with themselves.
        teacher.bbox_head.conv_reg.bias.data.fill_(5)
    model.student.load_state_dict(teacher.state_dict())
    model.eval()
    losses, _, _ = losses_and_maps(model)
    assert not list(model.distillers.parameters())
    assert abs(losses['loss_crosskd_score']) < 1e-6
    assert abs(losses['loss_crosskd_box']) < 1e-5


def test_distiller__boxes_of_fcos_are_decoded_in_pixels(tmp_path):
    config = detector_config(head='FCOSHead')
    model = build(tmp_path, config, config)
    distiller = model.distillers['distiller']
    levels = [torch.full((1, 4, 8, 8), 2.0), torch.full((1, 4, 4, 4), 1.0)]
    boxes = distiller._decode(levels)
    # The first place of stride 8 is at 4, that of stride 16 at 8.
    assert boxes[0].tolist() == [4 - 16, 4 - 16, 4 + 16, 4 + 16]
    assert boxes[64].tolist() == [8 - 16, 8 - 16, 8 + 16, 8 + 16]


def test_distiller__refuses(tmp_path):
    for layer in (-1, 0, 2):
        with pytest.raises(ValueError, match=f'must be 1 to 1,.*got {layer}'):
            build(tmp_path, layer=layer)
    student = detector_config()
    with pytest.raises(ValueError, match='this one learns'):
        MODELS.build(
            dict(
                type='era_mm.MutualDistillation',
                students=dict(first=student, second=student),
                distiller=dict(type='era_mm.CrossKDDistiller'),
            )
        )
    teacher = detector_config(width=16, channels=24)
    teacher['neck'] = teacher['neck'] | dict(num_outs=3)
    with pytest.raises(ValueError, match='pairs of levels'):
        build(tmp_path, teacher=teacher)


def test_distiller__refuses_classifiers(classifiers):
    with pytest.raises(ValueError, match='has no dense head'):
        classifiers(dict(type='era_mm.CrossKDDistiller'))
