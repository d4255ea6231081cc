"""LogitDistiller: each kind by its formula, routing, what it refuses."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from era_mm.core.utils import evaluating
from era_mm.layers import dist_loss, dkd_loss, kl_loss, standardise_logits
from era_mm.methods.logit import LogitDistiller
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
    save_teacher,
    two_stage_config,
)


def logits_of(model, batch):
    """Both models' logits, by the hosts' own forward."""
    teacher = model.teachers['teacher'].model
    with torch.no_grad():
        told = teacher(batch['inputs'], mode='tensor')
    return dict(
        student_logits=model.student(batch['inputs'], mode='tensor'),
        teacher_logits=told,
    )


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        (None, lambda s, t, y: 0.9 * kl_loss(**s | t, temperature=4.0)),
        (
            dict(kind='kl', temperature=1.0, weight=5.0),
            lambda s, t, y: 5 * kl_loss(**s | t),
        ),
        (
            dict(kind='dist'),
            lambda s, t, y: 2 * dist_loss(**s | t, temperature=4.0),
        ),
        (dict(kind='dkd'), lambda s, t, y: dkd_loss(**s | t, labels=y)),
        (
            dict(kind='dkd', alpha=0.5, beta=2.0, temperature=1.0),
            lambda s, t, y: dkd_loss(
                **s | t, labels=y, alpha=0.5, beta=2.0, temperature=1.0
            ),
        ),
        (
            dict(standardise=True),
            lambda s, t, y: (
                9
                * kl_loss(
                    student_logits=standardise_logits(s['student_logits']),
                    teacher_logits=standardise_logits(t['teacher_logits']),
                    temperature=2.0,
                )
            ),
        ),
    ],
)
def test_classifiers__each_kind(classifiers, image_batch, settings, expected):
    model = classifiers(dict(type='era_mm.LogitDistiller', logit=settings))
    batch = image_batch()
    losses = model(**batch, mode='loss')
    pair = logits_of(model, batch)
    student = dict(student_logits=pair['student_logits'])
    teacher = dict(teacher_logits=pair['teacher_logits'])
    value = expected(student, teacher, torch.arange(6) % 3)
    assert losses.keys() == {'loss', 'loss_logit_score'}
    torch.testing.assert_close(losses['loss_logit_score'], value)
    assert value > 0
    # It reaches all of the student, and nothing of the teacher.
    losses['loss_logit_score'].backward()
    for name, parameter in model.student.named_parameters():
        assert parameter.grad is not None, name
    for parameter in model.teachers['teacher'].model.parameters():
        assert parameter.grad is None


def test_classifiers__labels_can_be_weighed(classifiers, image_batch):
    torch.manual_seed(0)
    full = classifiers(dict(type='era_mm.LogitDistiller'))
    torch.manual_seed(0)
    tenth = classifiers(dict(type='era_mm.LogitDistiller', label_weight=0.1))
    batch = image_batch()
    losses, others = full(**batch, mode='loss'), tenth(**batch, mode='loss')
    torch.testing.assert_close(others['loss'], 0.1 * losses['loss'])
    assert others['loss_logit_score'] == losses['loss_logit_score']
    # A smoothed loss keeps its settings and its own weight.
    student = classifier_config()
    student['head']['loss'] = dict(
        type='mmpretrain.LabelSmoothLoss',
        label_smooth_val=0.1,
        loss_weight=2.0,
    )
    model = classifiers(
        dict(type='era_mm.LogitDistiller', label_weight=0.5), student=student
    )
    assert model.student_config.head.loss == dict(
        type='mmpretrain.LabelSmoothLoss',
        label_smooth_val=0.1,
        loss_weight=1.0,
    )
    assert student['head']['loss']['loss_weight'] == 2.0


def both(folder, student, teacher, terms):
    """ERA and LogitDistiller side by side on one pair."""
    file = save_teacher(teacher, folder / 'teacher.pth')
    config = distillation_config(
        dict(
            era=dict(
                type='era_mm.ERADistiller',
                twi_steps='none',
                mbrnet=dict(num_branches=1),
                logit=terms,
            ),
            logit=dict(type='era_mm.LogitDistiller', logit=terms),
        ),
        student,
        teacher,
        file,
    )
    return MODELS.build(config)


@pytest.mark.parametrize(
    'kind', ['RetinaHead', 'FCOSHead', 'GFLHead', 'two_stage']
)
def test_detectors__are_compared_as_beside_era(tmp_path, kind):
    """Whose terms have slow references of their own."""
    if kind == 'two_stage':
        models = [two_stage_config(8, 16), two_stage_config(16, 24)]
    else:
        models = [
            detector_config(head=kind),
            detector_config(width=16, channels=24, head=kind),
        ]
    model = both(tmp_path, *models, dict(weight=2.0, box_weight=0.5))
    model.train()
    data = model.data_preprocessor(detection_batch(3), True)
    losses = model(**data, mode='loss')
    for own, theirs in (('score', 'logit'), ('box', 'box')):
        value = losses[f'logit.loss_logit_{own}']
        torch.testing.assert_close(value, losses[f'era.loss_era_{theirs}'])
        assert value > 0
    distiller = model.distillers['logit']
    assert isinstance(distiller, LogitDistiller)
    assert distiller.loss_weights() == {
        'loss_logit_score': 2.0,
        'loss_logit_box': 0.5,
    }
    losses['logit.loss_logit_score'].backward()
    assert model.student.backbone.conv1.weight.grad.abs().max() > 0


def test_detectors__that_say_the_same_have_no_loss(tmp_path):
    config = detector_config()
    file = save_teacher(config, tmp_path / 'teacher.pth')
    model = MODELS.build(
        distillation_config(
            dict(type='era_mm.LogitDistiller'),
            teacher=config,
            checkpoint=file,
        )
    )
    model.load_teachers()
    teacher = model.teachers['teacher'].model
    model.student.load_state_dict(teacher.state_dict())
    model.eval()
    data = model.data_preprocessor(detection_batch(2), True)
    losses = model(**data, mode='loss')
    assert abs(losses['loss_logit_score']) < 1e-6
    assert losses['loss_logit_box'] == 0


def test_peers__hear_each_other_in_eval_mode():
    """DML: the peer's norms and flags stay as its own turns leave them."""
    student = detector_config(head='FCOSHead')
    model = MODELS.build(
        dict(
            type='era_mm.MutualDistillation',
            students=dict(first=student, second=student),
            distiller=dict(type='era_mm.LogitDistiller'),
        )
    )
    model.init_weights()
    model.train()
    half, peer = model.students['first'], model.students['second']
    before = {k: v.clone() for k, v in peer.student.state_dict().items()}
    data = half.data_preprocessor(detection_batch(2), True)
    losses = half(**data, mode='loss')
    assert losses['loss_logit_score'] > 0
    for key, value in peer.student.state_dict().items():
        assert torch.equal(before[key], value), key
    assert all(module.training for module in peer.student.bbox_head.modules())


def test_peers__are_compared_without_units():
    """What a peer says at the start is no measure of its later outputs."""
    student = detector_config()
    model = MODELS.build(
        dict(
            type='era_mm.MutualDistillation',
            students=dict(first=student, second=student),
            distiller=dict(type='era_mm.LogitDistiller', logit=dict(topk=5)),
        )
    )
    model.init_weights()
    model.train()
    half, peer = model.students['first'], model.students['second'].student
    term = half.distillers['distiller'].term
    data = half.data_preprocessor(detection_batch(2), True)
    for _ in range(2):
        losses = half(**data, mode='loss')
    assert int(term.first_batches.seen) == 0
    with torch.no_grad(), evaluating(peer):
        told = peer(data['inputs'], mode='tensor')
        own = half.student(data['inputs'], mode='tensor')

    def rows(outs, width):
        return torch.cat(
            [
                level.permute(0, 2, 3, 1).reshape(2, -1, width)
                for level in outs
            ],
            dim=1,
        )

    q = rows(told[0], 3).sigmoid()
    sure, index = q.max(dim=2)[0].topk(5, dim=1)
    pick = index[..., None].expand(-1, -1, 3)
    q, p = q.gather(1, pick), rows(own[0], 3).sigmoid().gather(1, pick)
    gap = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    torch.testing.assert_close(
        losses['loss_logit_score'], gap.sum(dim=2).mean(), rtol=1e-3, atol=1e-6
    )
    pick = index[..., None].expand(-1, -1, 4)
    apart = (rows(told[1], 4) - rows(own[1], 4)).gather(1, pick).abs()
    torch.testing.assert_close(
        losses['loss_logit_box'], (sure * apart.mean(dim=2)).mean()
    )


def test_dml__each_student_hears_the_other_as_it_is_now(image_batch):
    """L_1 = CE + KL(p_2 || p_1), then the same the other way round."""
    init_default_scope('mmpretrain')
    student = classifier_config()
    model = MODELS.build(
        dict(
            type='era_mm.MutualDistillation',
            students=dict(first=student, second=student),
            distiller=dict(
                type='era_mm.LogitDistiller',
                logit=dict(weight=1.0, temperature=1.0),
            ),
        )
    )
    model.init_weights()
    batch = image_batch()
    for name, other in (('first', 'second'), ('second', 'first')):
        half, peer = model.students[name], model.students[other].student
        losses = half.eval()(**batch, mode='loss')
        with torch.no_grad():
            told = peer.eval()(batch['inputs'], mode='tensor')
        own = half.student(batch['inputs'], mode='tensor')
        labels = torch.arange(6) % 3
        torch.testing.assert_close(
            losses['loss'], torch.nn.functional.cross_entropy(own, labels)
        )
        expected = kl_loss(student_logits=own, teacher_logits=told)
        torch.testing.assert_close(losses['loss_logit_score'], expected)
        losses['loss_logit_score'].backward()
        assert half.student.head.fc.weight.grad.abs().max() > 0
        assert peer.head.fc.weight.grad is None
        half.zero_grad()


@pytest.mark.parametrize(
    ('distiller', 'teacher', 'message'),
    [
        (dict(label_weight=0.5), None, 'is for the head of a classifier'),
        (dict(label_weight=-1), None, 'must not be negative'),
        (dict(logit=dict(kind='kl')), None, "set kind='dense'"),
        (dict(), detector_config(head='FCOSHead'), 'anchors'),
    ],
)
def test_detectors__refused(distiller, teacher, message):
    if teacher is not None:
        # Another number of anchors by place.
        student = detector_config()
        generator = student['bbox_head']['anchor_generator']
        generator = generator | dict(ratios=[0.5, 2.0])
        student['bbox_head'] = student['bbox_head'] | dict(
            anchor_generator=generator
        )
    else:
        student = None
    with pytest.raises(ValueError, match=message):
        MODELS.build(
            distillation_config(
                dict(type='era_mm.LogitDistiller', **distiller),
                student,
                teacher,
            )
        )


def test_classifiers__refused(classifiers, image_batch):
    with pytest.raises(ValueError, match='teacher has 3 classes'):
        classifiers(
            dict(type='era_mm.LogitDistiller'),
            student=classifier_config(num_classes=4),
        )
    with pytest.raises(ValueError, match=r'beta. is for kind'):
        classifiers(dict(type='era_mm.LogitDistiller', logit=dict(beta=1.0)))
    model = classifiers(
        dict(type='era_mm.LogitDistiller', logit=dict(kind='dkd'))
    )
    batch = image_batch()
    for sample in batch['data_samples']:
        del sample.gt_label
        sample.set_gt_score(torch.tensor([0.5, 0.5, 0.0]))
    with pytest.raises(ValueError, match='a single true class'):
        model(**batch, mode='loss')
