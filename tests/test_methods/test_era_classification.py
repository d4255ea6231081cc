"""Classification: the released script's arithmetic, number for number."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from torch.nn.functional import cross_entropy, log_softmax, relu, softmax

from era_mm.testing import (
    classifier_config,
    detector_config,
    distillation_config,
)

CLASSES = 3


@pytest.fixture
def build(classifiers):
    def make(width=16, student_head=None, teacher_head=None, **kwargs):
        teacher = classifier_config(width=width, num_classes=CLASSES)
        teacher['head'] |= teacher_head or {}
        student = classifier_config(num_classes=CLASSES)
        student['head'] |= student_head or {}
        era = dict(type='era_mm.ERADistiller', **kwargs)
        return classifiers(era, teacher, student).double()

    return make


def batch(num=6):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(
        num, 3, 32, 32, generator=generator, dtype=torch.float64
    )
    labels = torch.arange(num) % CLASSES
    return inputs, labels, [DataSample().set_gt_label(y) for y in labels]


def branch_by_hand(branch, x):
    """[Linear - BN - ReLU] - Linear - BN (- Linear), train mode."""
    for index, layer in enumerate(branch.layers):
        x = x @ layer.weight.T + layer.bias
        mean, var = x.mean(0), x.var(0, unbiased=False)
        norm = branch.norms[index][0]
        x = (x - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
        if index == 0:
            x = relu(x)
    if isinstance(branch.projection, torch.nn.Linear):
        x = x @ branch.projection.weight.T + branch.projection.bias
    return x


def released_terms(model, inputs, labels, halved=False):
    """era.md 1.5, written out: profile official."""
    era = model.distillers['distiller']
    teacher = model.teachers['teacher'].model
    head = teacher.head.fc
    with torch.no_grad():
        f_t = teacher.extract_feat(inputs)[-1]
        z_t = f_t @ head.weight.T + head.bias
    f_s = model.student.extract_feat(inputs)[-1]
    z_s = model.student.head.fc(f_s)
    align = era.mbrnet.aligns[0]
    u = f_s @ align.weight.T + align.bias

    def h_t(x):
        return x @ head.weight.T + head.bias

    def kd(z):
        p = softmax(z_t, 1)
        return 2 * (p * (p.log() - log_softmax(z, 1))).sum() / len(z)

    def twi(e):
        ce = cross_entropy(h_t(e), labels)
        return (ce + kd(h_t(e))) / 2 if halved else ce

    terms = {
        'loss': cross_entropy(z_s, labels),
        'loss_era_logit': kd(z_s),
        'loss_era_align': 5 * ((u - f_t) ** 2).mean(),
    }
    scales = (1, 0.5, 0.25, 0.125)
    residual, twi_total = 0, twi(u)
    remainder, estimate = f_t - u, u
    for scale, branch in zip(scales, era.mbrnet.levels[0], strict=True):
        d = branch_by_hand(branch, f_s)
        residual = (
            residual + scale / 4 * ((d - remainder.detach()) ** 2).mean()
        )
        estimate = estimate + d
        twi_total = twi_total + scale / 4 * twi(estimate)
        remainder = remainder - d
    return terms | {'loss_era_residual': residual, 'twi': twi_total}


def gradients(model, loss):
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def relative(a, b):
    scale = max(b.abs().max().item(), 1e-30)
    return (a - b).abs().max().item() / scale


@pytest.mark.parametrize('width', [8, 16])  # equal and other channels
@pytest.mark.parametrize(
    ('options', 'halved'),
    [
        (dict(logit={}, twi_targets='labels'), False),
        (dict(logit={}, twi_targets='both'), True),
        # A classifier gets it by default.
        (dict(), False),
        (dict(form='released'), False),
        (dict(twi_targets='both'), True),
    ],
    ids=['labels', 'both', 'default', 'released', 'default-both'],
)
def test_official__every_term_and_gradient_is_the_released_scripts(
    build, width, options, halved
):
    model = build(width=width, **options)
    inputs, labels, samples = batch()
    found = model(inputs, samples, mode='loss')
    found = {k: v for k, v in found.items() if 'loss' in k}
    found['twi'] = sum(found.pop(k) for k in list(found) if 'twi' in k)
    expected = released_terms(model, inputs, labels, halved)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert relative(found[name], value) < 1e-10, name
        ours = gradients(model, found[name])
        theirs = gradients(model, value)
        assert set(ours) == set(theirs), name
        for key, gradient in theirs.items():
            # Biases before a norm have gradient 0 but for rounding.
            if gradient.abs().max() > 1e-12:
                assert relative(ours[key], gradient) < 1e-10, (name, key)
    total, expected_total = sum(found.values()), sum(expected.values())
    assert relative(total, expected_total) < 1e-10


def test_twi__judges_by_the_students_own_loss(build):
    """Its smoothing and its weight, as released; not the teacher's.

    Smoothing .1 of 3 classes: targets .9 + .1 / 3 and .1 / 3.
    """
    model = build(
        student_head=dict(
            loss=dict(
                type='mmpretrain.LabelSmoothLoss',
                label_smooth_val=0.1,
                mode='original',
                loss_weight=0.9,
            )
        ),
        teacher_head=dict(
            loss=dict(type='mmpretrain.CrossEntropyLoss', loss_weight=3.0)
        ),
        loss=dict(scales=(1, 1, 1, 1)),
    ).eval()
    inputs, labels, samples = batch()
    found = model(inputs, samples, mode='loss')
    era = model.distillers['distiller']
    own = model.student.extract_feat(inputs)
    steps = [step[0] for step in era.mbrnet.estimates(own)]
    head = model.teachers['teacher'].model.head
    truth = torch.nn.functional.one_hot(labels, CLASSES)
    smooth = 0.9 * truth + 0.1 / CLASSES

    def judged(logits):
        return -0.9 * (smooth * logits.log_softmax(1)).sum() / len(logits)

    torch.testing.assert_close(
        found['loss'], judged(model.student.head(own)), rtol=1e-6, atol=0
    )
    expected = judged(head((steps[0],))) + sum(
        judged(head((step,))) / 4 for step in steps[1:]
    )
    torch.testing.assert_close(
        found['loss_era_twi_cls'], expected, rtol=1e-6, atol=0
    )
    # The teacher's head itself is as it was, and shares its weights.
    assert type(head.loss_module).__name__ == 'CrossEntropyLoss'
    assert era.twi_head.head.fc is head.fc


def test_twi__of_heads_of_other_kinds_judges_by_the_teachers(build):
    """A head of several labels takes other targets."""
    model = build(
        teacher_head=dict(
            type='mmpretrain.MultiLabelLinearClsHead',
            loss=dict(type='mmpretrain.CrossEntropyLoss', use_sigmoid=True),
        ),
        logit=None,
    )
    head = model.distillers['distiller'].twi_head.head
    assert head is model.teachers['teacher'].model.head


def test_inference__blend_is_on_raw_logits(build):
    # era.md 1.6: z(a) = (1 - a) z_s + a H_t(e_n).
    model = build(alpha=0.3)
    model.eval()
    inputs, _, samples = batch()
    model.active_modes = ('T', 'ST')
    with torch.no_grad():
        own = model(inputs, samples, mode='predict')
        feats = model.student.extract_feat(inputs)
        z_s = model.student.head(feats)
        era = model.distillers['distiller']
        z_t = model.teachers['teacher'].model.head(era.mbrnet(feats))
    blend = (0.7 * z_s + 0.3 * z_t).softmax(1)
    for index, sample in enumerate(own):
        found = model.mode_predictions['ST'][index].pred_score
        torch.testing.assert_close(found, blend[index])
        found = model.mode_predictions['T'][index].pred_score
        torch.testing.assert_close(found, z_t.softmax(1)[index])
        torch.testing.assert_close(sample.pred_score, z_s.softmax(1)[index])


def test_logit__of_a_detector_is_refused():
    init_default_scope('mmdet')
    config = distillation_config(
        dict(type='era_mm.ERADistiller', logit=dict(kind='kl'))
    )
    with pytest.raises(ValueError, match=r"kind 'kl' does not fit .* a Ret"):
        MODELS.build(config | dict(student=detector_config()))
    # Of its own kind it has another source.
    config['distiller']['logit'] = dict(source='bbox_head.retina_cls')
    with pytest.raises(TypeError, match="no config key 'source'"):
        MODELS.build(config | dict(student=detector_config()))


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(logit=dict(kind='mse')), ValueError, 'kind'),
        (dict(logit=dict(topk=0)), TypeError, "no config key 'topk'"),
        (dict(logit=dict(temperature=0.0)), ValueError, 'above 0'),
        (dict(logit=dict(weight=-1.0)), ValueError, 'at least 0'),
        (
            dict(logit=dict(kind='binary')),
            ValueError,
            "kind 'dense' does not fit .* a LinearClsHead",
        ),
        (
            dict(logit=dict(kind='roi')),
            ValueError,
            "kind 'roi' does not fit .* a LinearClsHead",
        ),
        (dict(logit=dict(wieght=1.0)), TypeError, "'weight'"),
        (dict(logit=None, twi_targets='both'), ValueError, 'which is None'),
        (dict(logit=None, twi_targets='teacher'), ValueError, 'which is None'),
        (dict(twi_targets='some'), ValueError, 'twi_targets'),
    ],
)
def test_logit__refuses(build, kwargs, error, message):
    with pytest.raises(error, match=message):
        build(**kwargs)


def test_targets__of_the_teacher_are_its_logits_alone(build):
    model = build(mbrnet=dict(num_branches=1), twi_targets='teacher')
    inputs, _, samples = batch()
    found = model(inputs, samples, mode='loss')
    assert {key for key in found if 'twi' in key} == {'loss_era_twi_logit'}
    era = model.distillers['distiller']
    teacher = model.teachers['teacher'].model
    f_s = model.student.extract_feat(inputs)[-1]
    z_t = teacher.head(teacher.extract_feat(inputs))
    u = era.mbrnet.aligns[0](f_s)
    d = branch_by_hand(era.mbrnet.levels[0][0], f_s)

    def kd(e):
        p, z = softmax(z_t, 1), teacher.head((e,))
        return 2 * (p * (p.log() - log_softmax(z, 1))).sum() / len(z)

    # w_0 = 1 and s_1 / n = 1.
    expected = kd(u) + kd(u + d)
    assert relative(found['loss_era_twi_logit'], expected) < 1e-10
    # Labels have no say in it.
    model.parse_losses(found)[0].backward()
    for sample in samples:
        sample.set_gt_label((sample.gt_label + 1) % CLASSES)
    again = model(inputs, samples, mode='loss')
    assert again['loss'] != found['loss']
    assert relative(again['loss_era_twi_logit'], expected) < 1e-10


def test_targets__of_the_teacher_need_no_softmax_of_the_student(build):
    # Its own sigmoids are left out; the teacher's logits judge estimates.
    student_head = dict(
        loss=dict(type='mmpretrain.CrossEntropyLoss', use_sigmoid=True)
    )
    assert build(student_head=student_head).distillers['distiller'].logit is (
        None
    )
    model = build(
        student_head=student_head,
        mbrnet=dict(num_branches=1),
        loss=dict(scales=[0.0]),
        twi_targets='teacher',
    )
    inputs, labels, samples = batch()
    for sample, label in zip(samples, labels, strict=True):
        # Sigmoids are trained by a score for each class.
        sample.set_gt_score(torch.eye(CLASSES)[label])
    found = model(inputs, samples, mode='loss')
    assert {k for k in found if 'logit' in k} == {'loss_era_twi_logit'}
    era = model.distillers['distiller']
    teacher = model.teachers['teacher'].model
    u = era.mbrnet.aligns[0](model.student.extract_feat(inputs)[-1])
    p = softmax(teacher.head(teacher.extract_feat(inputs)), 1)
    gap = p * (p.log() - log_softmax(teacher.head((u,)), 1))
    expected = 2 * gap.sum() / len(inputs)
    assert relative(found['loss_era_twi_logit'], expected) < 1e-10
    with pytest.raises(ValueError, match="student's LinearClsHead was train"):
        build(student_head=student_head, logit={}, twi_targets='teacher')
    # The loss that judges by the labels is the student's; scores are not.
    for options in (dict(logit={}), dict(twi_targets='teacher')):
        with pytest.raises(
            ValueError, match="teacher's LinearClsHead was trained"
        ):
            build(teacher_head=student_head, **options)


def test_logit__of_several_labels_is_left_out():
    # A softmax over classes that may hold together would teach nonsense.
    init_default_scope('mmpretrain')
    models = {}
    for name, width in (('student', 8), ('teacher', 16)):
        models[name] = classifier_config(width=width, num_classes=CLASSES)
        models[name]['head'] |= dict(
            type='mmpretrain.MultiLabelLinearClsHead',
            loss=dict(type='mmpretrain.CrossEntropyLoss', use_sigmoid=True),
        )

    def pair(**kwargs):
        return MODELS.build(
            dict(
                type='era_mm.Distillation',
                student=models['student'],
                teacher=dict(config=models['teacher'], checkpoint='random'),
                distiller=dict(type='era_mm.ERADistiller', **kwargs),
            )
        )

    assert pair().distillers['distiller'].logit is None
    with pytest.raises(ValueError, match='may give several classes'):
        pair(logit=dict())
