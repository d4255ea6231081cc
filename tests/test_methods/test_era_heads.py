"""TWI on every head family: mmdet's own configs, shrunk, as pairs."""

import copy
import re

import mmdet
import numpy as np
import pytest
import torch
from mmdet.structures.mask import BitmapMasks
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from mmengine.utils import digit_version
from torch.nn.modules.batchnorm import _BatchNorm

from era_mm.heads.two_stage import StudentProposals
from era_mm.testing import (
    classifier_config,
    detection_batch,
    distillation_config,
    era_model,
    save_teacher,
)
from era_mm.testing.host_families import (
    DENSE,
    DETR_LIKE,
    TWO_STAGE,
    host_config,
)

FAMILIES = [*DENSE, *TWO_STAGE]


#: Every family with all of its head, the dense ones with predictors as well.
each_place = pytest.mark.parametrize(
    ('family', 'place'),
    [(family, 'head') for family in FAMILIES]
    + [(family, 'predictors') for family in DENSE],
)


# -- tiny pairs of the hosts' own configs -------------------------------------


def pair_of(family, tmp_path, student=None, width=12, **kwargs):
    """A Distillation of a family's pair, the teacher's weights loaded.

    By default in the released form, by labels alone.
    """
    teacher = host_config(family, width=width)
    distiller = dict(
        type='era_mm.ERADistiller',
        # One batch is enough to know the space, where there is one.
        mbrnet=dict(num_branches=2, num_batches=1),
        **(dict(form='released', logit=None) | kwargs),
    )
    model = MODELS.build(
        distillation_config(
            distiller,
            student=student or host_config(family),
            teacher=teacher,
            checkpoint=tame(save_teacher(teacher, tmp_path / 'teacher.pth')),
        )
    )
    model.load_teachers()
    return model


def tame(file):
    """YOLOX's boxes are exponentials: random ones have no finite gradient."""
    checkpoint = torch.load(file)
    for key, value in checkpoint['state_dict'].items():
        if 'multi_level_conv_reg' in key:
            value.mul_(1e-3)
    torch.save(checkpoint, file)
    return file


def twin_of(family, tmp_path, **kwargs):
    """A pair whose estimates of the teacher's features are exact.

    The student has the teacher's weights, align is the identity and the
    branches give zero.
    """
    model = pair_of(family, tmp_path, host_config(family, 12), **kwargs)
    teacher = model.teachers['teacher'].model
    model.student.load_state_dict(teacher.state_dict())
    net = model.distillers['distiller'].mbrnet
    # Bottlenecks start at zero, released branches do not.
    net.init_weights()
    for align in net.aligns:
        torch.nn.init.dirac_(align.weight)
        torch.nn.init.zeros_(align.bias)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            torch.nn.init.zeros_(module.weight)
    if net.space is not None:
        settle(model)
    return model


@torch.no_grad()
def settle(model):
    """Measure the space of a twin on a batch, and map into it by align."""
    era = model.distillers['distiller']
    space = era.mbrnet.space
    teacher = model.teachers['teacher']
    space.update(
        era._maps(teacher.extract(**batch_of(model)), era.teacher_sources)
    )
    for level, align in enumerate(era.mbrnet.aligns):
        mean, std = space.statistics(level)
        align.weight /= std.view(-1, 1, 1, 1)
        align.bias -= mean / std
    # As if it had explained everything for long.
    era.explained.fill_(1)


def batch_of(model, training=True, seed=0):
    """A preprocessed batch, with masks where the student predicts some."""
    batch = detection_batch(seed=seed)
    for sample in batch['data_samples'] if model.with_mask else ():
        truth = sample.gt_instances
        drawn = np.zeros((len(truth), 64, 64), np.uint8)
        for mask, box in zip(drawn, truth.bboxes.int().tolist(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = 1
        truth.masks = BitmapMasks(drawn, 64, 64)
    return model.data_preprocessor(batch, training)


def freeze_norms(model):
    """Training mode with norms as in a teacher."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


def era_losses(model, data):
    """The distiller's losses alone, drawn from seed 7."""
    era = model.distillers['distiller']
    with model.wiring.recorder as recorder:
        model.student(**data, mode='loss')
    student_feats = recorder.pop()
    teacher_feats = model.teachers['teacher'].extract(**data)
    torch.manual_seed(7)
    return era.loss(
        student_feats=student_feats,
        teacher_feats=teacher_feats,
        data_samples=data['data_samples'],
    )


def total(losses):
    return sum(v.sum() if torch.is_tensor(v) else sum(v) for v in losses)


def teacher_losses(model, data):
    """The teacher's own losses on the batch, as mmdet trains it."""
    plain = freeze_norms(copy.deepcopy(model.teachers['teacher'].model))
    torch.manual_seed(7)
    with torch.no_grad():
        losses = plain(**data, mode='loss')
    return {
        key: float(total([value]))
        for key, value in losses.items()
        if 'loss' in key
    }


# -- every family -------------------------------------------------------------


def reached(module):
    return any(
        p.grad is not None and p.grad.any() for p in module.parameters()
    )


def branch_is_reached(net, branch):
    """Whether a branch of any level has a gradient."""
    if net.branch == 'released':
        return any(reached(branches[branch]) for branches in net.levels)
    # Branches lie side by side in the channels.
    return any(
        layer.weight.grad.chunk(net.num_branches)[branch].any()
        for layer in net.branches.expand
    )


@pytest.mark.parametrize('form', ['released', 'normalised'])
@each_place
def test_pair__trains_and_predicts_in_every_mode(
    family, place, form, tmp_path
):
    options = {}
    if form == 'normalised':
        options = dict(form='auto', twi_steps='last', logit='auto')
    model = pair_of(family, tmp_path, twi_place=place, **options)
    model.init_weights()
    teacher = model.teachers['teacher']
    era = model.distillers['distiller']
    assert era.form == form
    if form == 'normalised':
        # At first nothing is explained, so nothing is judged.
        era.explained.fill_(1)

    # TWI's gradient reaches the estimates and the student, and the teacher
    # never; the student's own head as far as its towers are approximated.
    losses = era_losses(model, batch_of(model))
    total(v for k, v in losses.items() if 'twi' in k).backward()
    if form == 'normalised':
        era.explained.zero_()
    for branch in range(2):
        assert branch_is_reached(era.mbrnet, branch)
    assert reached(model.distillers['distiller'].mbrnet.aligns)
    assert reached(model.student.backbone)
    own = {
        name
        for name, p in model.student.named_parameters()
        if 'head' in name and p.grad is not None and p.grad.any()
    }
    assert bool(own) == (place == 'predictors')
    assert all('_convs.' in name for name in own), own
    model.zero_grad()

    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
    # The third forward is where an extra without gradient is noticed.
    for step in range(3):
        losses = model(**batch_of(model, seed=step), mode='loss')
        loss, log = model.parse_losses(losses)
        assert all(torch.as_tensor(v).isfinite() for v in log.values()), log
        wrapper.update_params(loss)
    assert teacher.fingerprint() == teacher.loaded_fingerprint
    assert all(p.grad is None for p in teacher.model.parameters())
    assert not any(m.training for m in teacher.model.modules())

    model.eval()
    model.active_modes = ('E0', 'E1', 'T', 'ST')
    with torch.no_grad():
        model(**batch_of(model, training=False), mode='predict')
    for mode in model.active_modes:
        samples = model.mode_predictions[mode]
        assert len(samples) == 2
        for sample in samples:
            assert sample.pred_instances.scores.isfinite().all()


@pytest.mark.parametrize('form', ['released', 'normalised'])
@each_place
def test_twin__has_the_teachers_own_losses_and_predictions(
    family, place, form, tmp_path
):
    # Flags, strides, assigners, samplers, proposals: were one of them not the
    # teacher's, a term would differ.
    model = twin_of(
        family,
        tmp_path,
        form=form,
        twi_steps='all',
        twi_targets='labels',
        twi_place=place,
    )
    freeze_norms(model.student)
    data = batch_of(model)
    found = era_losses(model, data)
    expected = teacher_losses(model, data)
    assert len(expected) > 1
    # w_0 + w_1 + w_2 = 1 + 1/2 + 1/4; those of the other form are its own.
    weight = 1.75
    if form == 'normalised':
        era = model.distillers['distiller']
        weight = era.twi_interval * sum(era.loss_terms.step_weights(2))
    for key, value in expected.items():
        name = key.replace('loss_', '')
        assert found.pop(f'loss_era_twi_{name}').item() == pytest.approx(
            weight * value, rel=1e-4, abs=1e-6
        ), key
    assert not any('twi' in key for key in found)
    # And the features were exact indeed.
    assert found['loss_era_align'] < 1e-8

    model.eval()
    model.active_modes = ('E0', 'E1', 'T', 'ST')
    for module in (model.student, model.teachers['teacher'].model):
        roi_head = getattr(module, 'roi_head', None)
        if roi_head is not None and roi_head.with_mask:
            # The scores of the places, not whether they pass a threshold,
            # which rounding may decide.
            roi_head.test_cfg.mask_thr_binary = -1
    data = batch_of(model, training=False)
    # Boxes and masks go back to the original image's pixels.
    for sample in data['data_samples']:
        sample.set_metainfo(dict(scale_factor=(2.0, 2.0), ori_shape=(32, 32)))
    with torch.no_grad():
        teacher = model.teachers['teacher'].model(
            data['inputs'],
            [sample.new() for sample in data['data_samples']],
            mode='predict',
        )
        model(**data, mode='predict')
    for mode in model.active_modes:
        for a, b in zip(teacher, model.mode_predictions[mode], strict=True):
            one, other = a.pred_instances, b.pred_instances
            assert len(one)
            assert set(one.keys()) == set(other.keys())
            for key, value in one.items():
                atol = 1e-3
                if key == 'masks':
                    assert value.max() > 100
                    # Of 256 levels, cut to the one below.
                    atol = 1
                torch.testing.assert_close(
                    value.double(), other[key].double(), rtol=1e-4, atol=atol
                )


#: Whose logits are compared by default; in the others the labels judge.
COMPARED = [
    family
    for family in FAMILIES
    if family not in ('yolox', 'cascade_rcnn', 'cascade_mask')
]


@pytest.mark.parametrize('family', COMPARED)
def test_twin__says_by_default_what_the_teacher_says(family, tmp_path):
    model = twin_of(
        family, tmp_path, form='auto', twi_steps='all', logit='auto'
    )
    freeze_norms(model.student)
    era = model.distillers['distiller']
    data = batch_of(model)
    found = era_losses(model, data)
    if 'mask' in family:
        # Labels judge beside it, because the term leaves masks out.
        assert era.twi_targets == 'both'
        weight = era.twi_interval * sum(era.loss_terms.step_weights(2)) / 2
        for key, value in teacher_losses(model, data).items():
            name = key.replace('loss_', '')
            assert found.pop(f'loss_era_twi_{name}').item() == pytest.approx(
                weight * value, rel=1e-4, abs=1e-6
            ), key
    else:
        assert era.twi_targets == 'teacher'
    two_stages = family in TWO_STAGE
    # RepPoints predicts no sides of a box.
    names = {'logit'} if family == 'reppoints' else {'logit', 'box'}
    assert {k for k in found if 'loss' in k} == {
        'loss_era_align',
        'loss_era_residual',
        *(f'loss_era_{name}' for name in names),
        *(f'loss_era_twi_{name}' for name in names),
        *(f'loss_era_twi_rpn_{name}' for name in names if two_stages),
    }
    for key, value in found.items():
        if 'loss' not in key:
            continue
        # Random teachers say nearly the same of everything: a tiny unit,
        # by which rounding is divided.
        unit = torch.ones(())
        term = era.logit.rpn if 'rpn' in key else era.logit
        if 'logit' in key:
            unit = term.score_unit.value
        elif 'box' in key:
            unit = term.box_unit.value
        assert value.abs() * unit.min() < 1e-5, key


@pytest.mark.parametrize('steps', ['last', 'sampled', 'none'])
@pytest.mark.parametrize('form', ['auto', 'released'])
@pytest.mark.parametrize('family', ['yolox', 'cascade_rcnn'])
def test_steps__other_than_all_train_every_kind_of_head(
    family, form, steps, tmp_path
):
    model = pair_of(family, tmp_path, twi_steps=steps, form=form)
    losses = model(**batch_of(model), mode='loss')
    assert any('twi' in key for key in losses) == (steps != 'none')
    assert torch.isfinite(model.parse_losses(losses)[0])
    assert 'T' in model.distillers['distiller'].inference_modes()


# -- two-stage ----------------------------------------------------------------


def recorded(model, data):
    """The student's recorded features and what its RPN proposed."""
    proposed = []
    student = model.student
    original = student.rpn_head.loss_and_predict

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        proposed.extend(found.new() for found in result[1])
        return result

    student.rpn_head.loss_and_predict = spy
    with model.wiring.recorder as recorder:
        student(**data, mode='loss')
    del student.rpn_head.loss_and_predict
    return recorder.pop(), proposed


def test_proposals__are_those_of_the_students_own_pass(tmp_path):
    model = pair_of('faster_rcnn', tmp_path)
    data = batch_of(model)
    feats, proposed = recorded(model, data)
    samples = StudentProposals(model.student).attach(
        feats, data['data_samples']
    )
    for sample, original, expected in zip(
        samples, data['data_samples'], proposed, strict=True
    ):
        # As many as training takes, 20, not the 10 of a test.
        assert len(sample.proposals) == len(expected) == 20
        assert torch.equal(sample.proposals.bboxes, expected.bboxes)
        assert not any(v.requires_grad for v in sample.proposals.values())
        assert 'proposals' not in original


def test_roi_head__judges_the_estimate_on_the_students_proposals(tmp_path):
    model = pair_of('cascade_rcnn', tmp_path, twi_steps='last')
    model.eval()
    era = model.distillers['distiller']
    teacher = copy.deepcopy(model.teachers['teacher'].model)
    freeze_norms(model.student)
    data = batch_of(model)
    feats, proposed = recorded(model, data)
    torch.manual_seed(7)
    found = era.loss(
        student_feats=feats,
        teacher_feats=model.teachers['teacher'].extract(**data),
        data_samples=data['data_samples'],
    )
    with torch.no_grad():
        estimate = era.mbrnet(feats['neck'])
        torch.manual_seed(7)
        samples = copy.deepcopy(data['data_samples'])
        for sample in samples:
            sample.gt_instances.labels[:] = 0
        expected = teacher.rpn_head.loss(estimate, samples)
        roi = teacher.roi_head.loss(estimate, proposed, data['data_samples'])
    for key, value in {**expected, **roi}.items():
        if 'loss' in key:
            name = key.replace('loss_', '')
            torch.testing.assert_close(
                found[f'loss_era_twi_{name}'].detach(),
                1.75 * total([value]),
            )


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(form='auto', logit=dict(weight=0.0, box_weight=0.0)),
        dict(form='auto', twi_targets='labels', twi_steps='all'),
    ],
    ids=['released', 'default', 'labels'],
)
def test_random_state__is_the_runs_own_after_twi(options, tmp_path):
    # The teacher's samplers draw: with weights 0 the student must train as if
    # they did not.
    zero = dict(align_weight=0.0, residual_weight=0.0, twi_weight=0.0)
    model = pair_of('faster_rcnn', tmp_path, loss=zero, **options)
    plain = copy.deepcopy(model.student)

    def train(model, data_of):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for step in range(2):
            losses = model(**data_of(step), mode='loss')
            optimizer.zero_grad()
            sum(
                total([v]) for k, v in losses.items() if 'loss' in k
            ).backward()
            optimizer.step()

    train(model.train(), lambda step: batch_of(model, seed=step))
    train(plain.train(), lambda step: batch_of(model, seed=step))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.student.state_dict()[key]), key


def test_masks__of_the_teacher_alone_are_left_out(tmp_path, said):
    # Cascade Mask R-CNN teaches Faster R-CNN, whose data has no masks.
    teacher = host_config('cascade_mask', 12)
    file = save_teacher(teacher, tmp_path / 'teacher.pth')
    model = MODELS.build(
        distillation_config(
            dict(type='era_mm.ERADistiller', mbrnet=dict(num_branches=1)),
            student=host_config('faster_rcnn'),
            teacher=teacher,
            checkpoint=file,
        )
    )
    assert "without the teacher's mask branch" in said[0]
    data = batch_of(model)
    assert 'masks' not in data['data_samples'][0].gt_instances
    losses = model(**data, mode='loss')
    assert 'loss_era_twi_s2.bbox' in losses
    assert not any('mask' in key for key in losses)
    model.parse_losses(losses)[0].backward()
    # The teacher itself keeps its own.
    assert model.teachers['teacher'].model.with_mask

    model.eval()
    model.active_modes = ('T', 'ST')
    with torch.no_grad():
        model(**batch_of(model, training=False), mode='predict')
    for mode in model.active_modes:
        for sample in model.mode_predictions[mode]:
            assert 'masks' not in sample.pred_instances


def test_masks__of_both_are_judged_by_labels(tmp_path, said):
    # There is no term on the teacher's own masks.
    options = dict(form='auto', logit='auto')
    model = pair_of('mask_rcnn', tmp_path, **options)
    assert model.distillers['distiller'].twi_targets == 'both'
    assert len(said) == 1
    assert 'by the labels as well' in said[0]
    assert 'masks are judged by labels alone' in said[0]
    losses = model(**batch_of(model), mode='loss')
    assert {'loss_era_twi_mask', 'loss_era_twi_rpn_logit'} <= set(losses)

    model = pair_of('mask_rcnn', tmp_path, twi_targets='teacher', **options)
    assert model.distillers['distiller'].twi_targets == 'teacher'
    assert 'by its own outputs without the rest' in said[1]
    losses = model(**batch_of(model), mode='loss')
    assert {key for key in losses if 'twi' in key} == {
        'loss_era_twi_logit',
        'loss_era_twi_box',
        'loss_era_twi_rpn_logit',
        'loss_era_twi_rpn_box',
    }

    # The labels judge all of it where they are asked for: nothing to say.
    pair_of('mask_rcnn', tmp_path, twi_targets='both', **options)
    assert len(said) == 2


def test_masks__that_only_the_student_predicts_leave_no_modes(said):
    # An evaluator of masks would stop at the first validation.
    model = build(
        host_config('mask_rcnn'),
        host_config('faster_rcnn', 12),
        twi_targets='labels',
        form='released',
    )
    assert (
        'StandardRoIHead, which is reused of the teacher, does not'
        in (said[0])
    )
    assert model.distillers['distiller'].inference_modes() == ()
    losses = model(**batch_of(model), mode='loss')
    assert losses['loss_era_twi_bbox'] > 0


def test_masks__that_a_dense_head_leaves_to_another_leave_no_modes(said):
    # YOLACT's bbox_head is reused; its masks come from the mask_head.
    model = build(host_config('yolact'), host_config('yolact', 12))
    assert 'YOLACTHead, which is reused of the teacher, does not' in said[0]
    assert model.distillers['distiller'].inference_modes() == ()


@pytest.mark.parametrize('alpha', [0.0, 1.0])
def test_blend__of_two_stages_has_student_and_t_at_its_ends(alpha, tmp_path):
    model = pair_of('mask_rcnn', tmp_path, alpha=alpha).eval()
    model.active_modes = ('T', 'ST')
    with torch.no_grad():
        own = model(**batch_of(model, training=False), mode='predict')
    end = own if alpha == 0 else model.mode_predictions['T']
    for a, b in zip(end, model.mode_predictions['ST'], strict=True):
        assert len(a.pred_instances)
        for key in ('scores', 'bboxes', 'masks'):
            torch.testing.assert_close(
                a.pred_instances[key].float(),
                b.pred_instances[key].float(),
                rtol=1e-4,
                atol=1e-3,
            )


def test_inference__of_t_alone_runs_no_roi_head_of_the_student(tmp_path):
    model = pair_of('faster_rcnn', tmp_path).eval()
    model.inference_mode = 'T'
    calls = []
    model.student.roi_head.bbox_head.register_forward_hook(
        lambda *args: calls.append(args)
    )
    with torch.no_grad():
        found = model(**batch_of(model, training=False), mode='predict')
    assert not calls
    assert all('pred_instances' in sample for sample in found)


# -- what does not fit --------------------------------------------------------


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr(
        'era_mm.methods.era.head_user.print_log',
        lambda message, **kwargs: messages.append(message),
    )
    return messages


def build(student, teacher, **kwargs):
    return era_model(
        student=student,
        teacher=teacher,
        mbrnet=dict(num_branches=1),
        **kwargs,
    )


@pytest.mark.parametrize('source', ['neck', 'encoder'])
@pytest.mark.parametrize('family', DETR_LIKE)
def test_detr__gets_era_without_twi_and_says_so(family, source, said):
    if family == 'dino' and digit_version(mmdet.__version__) < (3, 4):
        pytest.skip('DINO of mmdet 3.3 has position embeddings for 256 alone')
    student, teacher = host_config(family), host_config(family, 12)
    model = build(student, teacher, source=source)
    model.init_weights()
    assert 'without TWI' in said[0]
    assert 'queries of a decoder' in said[0]
    era = model.distillers['distiller']
    assert era.inference_modes() == ()
    # Channels, not tokens: another image size must do.
    align = era.mbrnet.aligns[0]
    assert align.in_channels == student['neck']['out_channels']
    assert align.out_channels == teacher['neck']['out_channels']
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
    for size in (64, 96, 64):
        data = model.data_preprocessor(detection_batch(size=size), True)
        losses = model(**data, mode='loss')
        assert not any('twi' in key for key in losses)
        assert losses['loss_era_align'] > 0
        loss, _ = model.parse_losses(losses)
        assert loss.isfinite()
        wrapper.update_params(loss)
    # For the log of a validation.
    shares = model.compare(detection_batch())['distiller']
    assert len(shares) == era.mbrnet.num_branches + 1
    assert (shares > 0).all()


def test_classes__that_differ_in_a_roi_head_turn_twi_off(said):
    model = build(
        host_config('mask_rcnn'), host_config('cascade_mask', num_classes=7)
    )
    assert 'teacher has 7 classes and the student 3' in said[0]
    assert model.distillers['distiller'].inference_modes() == ()
    losses = model(**batch_of(model), mode='loss')
    assert not any('twi' in key for key in losses)


@pytest.mark.parametrize(
    ('student', 'teacher', 'kwargs', 'message'),
    [
        (
            'retinanet',
            'faster_rcnn',
            dict(twi_steps='all'),
            "needs the student's proposals, but RetinaNet has no RPN",
        ),
        (
            'deformable_detr',
            'deformable_detr',
            dict(twi_steps='sampled'),
            "`twi_steps='sampled'` needs the teacher's head to judge .*, but "
            r"the teacher's head \(DeformableDETR\) reads the queries",
        ),
        (
            'retinanet',
            'faster_rcnn',
            dict(twi_targets='teacher'),
            "needs the teacher's head to judge estimates, but the teacher's "
            "RoI head needs the student's proposals.*Remove `twi_targets`",
        ),
        (
            'faster_rcnn',
            'faster_rcnn',
            dict(twi_place='predictors'),
            'one tower of layers.*FasterRCNN has none: rpn_head is a RPNHead',
        ),
        (
            'retinanet',
            'retinanet',
            dict(twi_place='predictors', source='backbone'),
            'Remove `source`',
        ),
        ('retinanet', 'retinanet', dict(twi_place='tower'), 'twi_place'),
        (
            'faster_rcnn',
            'faster_rcnn',
            dict(source='backbone', twi_steps='all'),
            'its RPN has priors for 5 levels, but got 4',
        ),
        (
            'faster_rcnn',
            'faster_rcnn',
            dict(logit=dict(kind='kl')),
            "kind 'kl' does not fit .* a StandardRoIHead.*kind='roi'",
        ),
        (
            'faster_rcnn',
            'faster_rcnn',
            dict(logit=dict(kind='dense')),
            "kind 'dense' does not fit .* a StandardRoIHead.*kind='roi'",
        ),
        (
            'cascade_rcnn',
            'faster_rcnn',
            dict(logit=dict()),
            "student's CascadeRoIHead has several stages. Remove `logit`",
        ),
        (
            'faster_rcnn',
            'faster_rcnn',
            dict(logit=dict(), source='backbone', twi_steps='none'),
            'its RPN has priors for 5 levels, but got 4',
        ),
    ],
)
def test_pair__that_does_not_fit_is_refused_when_built(
    student, teacher, kwargs, message
):
    with pytest.raises(ValueError, match=message):
        build(host_config(student), host_config(teacher, 12), **kwargs)


@pytest.mark.parametrize(
    ('student', 'teacher', 'message'),
    [
        (
            'retinanet',
            'faster_rcnn',
            "ERA without TWI and terms on the student's own logits: the "
            "teacher's RoI head needs the student's proposals, but RetinaNet "
            'has no RPN',
        ),
        ('faster_rcnn', 'retinanet', "FasterRCNN has no 'bbox_head'"),
        (
            'deformable_detr',
            'retinanet',
            'DeformableDETR predicts from queries',
        ),
        (
            'cascade_rcnn',
            'faster_rcnn',
            "the student's CascadeRoIHead has several stages",
        ),
        (
            'yolox',
            'rtmdet',
            "the student's YOLOXHead predicts objectness",
        ),
    ],
)
def test_heads__of_other_kinds_are_left_out_and_said(
    student, teacher, message, said
):
    # The teacher's neck is the student's, so that the levels agree.
    config = host_config(teacher, 12)
    own = host_config(student, 12)
    config['backbone'], config['neck'] = own['backbone'], own['neck']
    for prior in ('prior_generator', 'anchor_generator'):
        if student == 'deformable_detr' and prior in config['bbox_head']:
            config['bbox_head'][prior]['strides'] = [8, 16, 32, 64]
    model = build(own, config)
    assert len(said) == 1
    assert message in said[0]
    # Embeddings of DETRs are not initialised when they are built.
    model.init_weights()
    losses = model(**batch_of(model), mode='loss')
    era = model.distillers['distiller']
    assert not {'loss_era_logit', 'loss_era_box'} & set(losses)
    # Where the teacher's head can judge, it does so by its own outputs.
    assert any('twi' in key for key in losses) == (era.twi_steps != 'none')
    assert (era.twi_steps == 'none') == ('without TWI' in message)
    assert (era.logit is None) == (era.twi_steps == 'none')
    if era.logit is None:
        assert era.twi_targets == 'labels'
        for line in era.uses():
            assert 'RetinaNet has no RPN' in line
        return
    assert era.twi_targets == 'teacher'
    for term in ('logit', 'box'):
        assert losses[f'loss_era_twi_{term}'].isfinite()
    assert era.logit.score_unit.value != 1


@pytest.mark.parametrize('twi_steps', ['all', 'none'])
def test_detr__has_no_logits_of_features(twi_steps):
    with pytest.raises(ValueError, match='Remove `logit`'):
        build(
            host_config('deformable_detr'),
            host_config('deformable_detr', 12),
            twi_steps=twi_steps,
            logit=dict(kind='dense'),
        )


@pytest.mark.parametrize('part', ['rpn', 'rcnn'])
def test_pair__two_stage_teacher_that_cannot_assign_is_refused(part, said):
    teacher = host_config('faster_rcnn', 12)
    teacher['train_cfg'][part] = None
    reason = r'its losses raise|no `train_cfg`'
    with pytest.raises(ValueError, match=reason):
        build(host_config('faster_rcnn'), teacher, twi_steps='all')
    model = build(host_config('faster_rcnn'), teacher, twi_steps='none')
    assert 'T' in model.distillers['distiller'].inference_modes()
    assert said == []
    # Left out by default, with the same words.
    model = build(host_config('faster_rcnn'), teacher)
    assert len(said) == 1
    assert re.search(f'ERA without TWI and .*: .*({reason})', said[0])
    assert model.distillers['distiller'].twi_steps == 'none'


def test_pair__head_whose_losses_need_more_than_boxes_is_refused(said):
    # HTC's RoI head wants a map of the stuff; the first step would stop.
    teacher = host_config('cascade_mask', 12)
    teacher['roi_head'] |= dict(
        type='HybridTaskCascadeRoIHead',
        interleaved=True,
        mask_info_flow=False,
        semantic_roi_extractor=copy.deepcopy(
            teacher['roi_head']['bbox_roi_extractor']
        ),
        semantic_head=dict(
            type='FusedSemanticHead',
            num_ins=5,
            fusion_level=1,
            in_channels=24,
            conv_out_channels=24,
            num_classes=3,
        ),
    )
    teacher['type'] = 'HybridTaskCascade'
    with pytest.raises(ValueError, match='its losses raise'):
        build(host_config('mask_rcnn'), teacher, twi_steps='all')
    model = build(host_config('mask_rcnn'), teacher)
    assert len(said) == 1
    assert 'ERA without TWI' in said[0]
    assert 'its losses raise' in said[0]
    assert model.distillers['distiller'].twi_steps == 'none'


def test_predictors__of_a_classifier_are_refused():
    with pytest.raises(ValueError, match='head is a LinearClsHead'):
        build(classifier_config(), classifier_config(), twi_place='predictors')


@pytest.mark.parametrize('logit', ['auto', None])
def test_blend__with_a_head_of_queries_is_not_offered(logit, said):
    model = build(
        host_config('deformable_detr'),
        host_config('deformable_detr', 12),
        twi_steps='none',
        logit=logit,
    )
    assert model.distillers['distiller'].inference_modes() == ()
    # What was not asked to be left out is told of, and nothing else.
    assert len(said) == (logit is not None)
    for text in said:
        assert "without terms on the student's own logits" in text
        assert 'TWI' not in text


# -- predictors ---------------------------------------------------------------


def test_predictors__sources_are_the_last_layers_of_the_towers():
    def sources(family):
        model = build(
            host_config(family), host_config(family), twi_place='predictors'
        )
        return model.distillers['distiller'].feature_sources

    assert sources('retinanet') == (
        'bbox_head.cls_convs.1',
        'bbox_head.reg_convs.1',
    )
    assert sources('rtmdet') == (
        *(f'bbox_head.cls_convs.{level}.1' for level in range(3)),
        *(f'bbox_head.reg_convs.{level}.1' for level in range(3)),
    )
    assert sources('yolox') == (
        *(f'bbox_head.multi_level_cls_convs.{i}' for i in range(3)),
        *(f'bbox_head.multi_level_reg_convs.{i}' for i in range(3)),
    )


def test_predictors__judge_by_the_teachers_own_outputs(tmp_path, said):
    model = pair_of(
        'fcos',
        tmp_path,
        twi_place='predictors',
        form='auto',
        logit='auto',
    )
    assert said == []
    assert model.distillers['distiller'].twi_targets == 'teacher'
    losses = model(**batch_of(model), mode='loss')
    assert {key for key in losses if key.startswith('loss_era_')} == {
        'loss_era_align',
        'loss_era_residual',
        'loss_era_logit',
        'loss_era_box',
        'loss_era_twi_logit',
        'loss_era_twi_box',
    }


def test_predictors__share_the_teachers_weights_and_leave_its_head(tmp_path):
    model = pair_of('fcos', tmp_path, twi_place='predictors')
    head = model.teachers['teacher'].model.bbox_head
    twi = model.distillers['distiller'].twi_head.head
    assert twi.conv_cls is head.conv_cls
    assert twi.scales is head.scales
    assert len(head.cls_convs) == len(head.reg_convs) == 2
    # Moves and casts of the teacher are the predictors', too.
    model.double()
    assert twi.conv_reg.weight.dtype == torch.float64


def test_raw_blend__is_of_yolox_and_reppoints_too(tmp_path):
    # z = (1 - a) z_s + a z_t; half-way two equal boxes stay one, and with
    # both sides equal, ST is exact (test_twin); here that nothing is merged.
    for family in ('yolox', 'reppoints'):
        model = pair_of(family, tmp_path).eval()
        model.active_modes = ('ST',)
        data = batch_of(model, training=False)
        with torch.no_grad():
            model(**data, mode='predict')
            maps = model.student.extract_feat(data['inputs'])
            estimate = model.distillers['distiller'].mbrnet(maps)
            head = model.teachers['teacher'].model.bbox_head
            outs = [
                [0.5 * s + 0.5 * t for s, t in zip(*pair, strict=True)]
                for pair in zip(
                    model.student.bbox_head(maps), head(estimate), strict=True
                )
            ]
            expected = head.predict_by_feat(
                *outs,
                batch_img_metas=[s.metainfo for s in data['data_samples']],
                rescale=True,
            )
        for a, b in zip(model.mode_predictions['ST'], expected, strict=True):
            torch.testing.assert_close(a.pred_instances.scores, b.scores)
            torch.testing.assert_close(a.pred_instances.bboxes, b.bboxes)
