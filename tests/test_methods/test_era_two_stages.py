"""ERA on two stages: the teacher's RPN is judged by its own outputs."""

import copy
import math

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from torch import nn

from era_mm.heads import RoITerm
from era_mm.heads.two_stage import TwoStageTWIHead
from era_mm.testing import (
    assert_same_steps,
    detection_batch,
    era_model,
    noise,
    save_teacher,
    train_steps,
    two_stage_config,
)

TERMS = {'loss_era_twi_rpn_logit', 'loss_era_twi_rpn_box'}
LABELS = {'loss_era_twi_rpn_cls', 'loss_era_twi_cls'}


def teacher_file(folder, factor=1.0):
    """A teacher with opinions, its neck's outputs times a factor."""
    file = save_teacher(two_stage_config(16, 24), folder / 'teacher.pth')
    checkpoint = torch.load(file)
    for key, value in checkpoint['state_dict'].items():
        if 'fpn_convs' in key:
            value *= factor
        elif key in (
            'rpn_head.rpn_conv.weight',
            'roi_head.bbox_head.shared_fcs.0.weight',
        ):
            value /= factor
        elif key.endswith('fc_cls.weight'):
            # A fresh head says nearly the same of every region.
            value *= 30
    torch.save(checkpoint, file)
    return file


def pair_of(folder, teacher=None, factor=1.0, **kwargs):
    torch.manual_seed(0)
    model = era_model(
        'random' if teacher else teacher_file(folder, factor),
        two_stage_config(),
        teacher or two_stage_config(16, 24),
        **(dict(mbrnet=dict(num_branches=2)) | kwargs),
    )
    model.init_weights()
    for layer in model.distillers['distiller'].mbrnet.branches.expand:
        # Or every branch gives zero, and all estimates are e_0.
        nn.init.normal_(layer.weight, std=0.1)
    return model


def half_explained(model):
    """Give TWI a say, in a step that does not update its weight."""
    model.distillers['distiller'].explained.fill_(0.5)
    MessageHub.get_current_instance().update_info('iter', 1)


def batch_of(model, seed=0):
    return model.data_preprocessor(detection_batch(3, seed=seed), True)


def maps_of(model, data):
    """The neck's outputs of student and teacher."""
    with model.wiring.recorder as recorder:
        model.student(**data, mode='loss')
    feats = recorder.pop(), model.teachers['teacher'].extract(data['inputs'])
    return [own['neck'] for own in feats]


@pytest.fixture
def said(monkeypatch):
    """What ERA says about the pair."""
    lines = []
    monkeypatch.setattr(
        'era_mm.methods.era.head_user.print_log',
        lambda text, **kwargs: lines.append(text),
    )
    return lines


def at(outs, image, level, anchor, y, x):
    """One anchor's raw score and box."""
    scores, boxes = outs
    return (
        float(scores[level][image, anchor, y, x]),
        [float(boxes[level][image, 4 * anchor + i, y, x]) for i in range(4)],
    )


def entropy(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def log_sigmoid(x):
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def test_rpn__against_a_slow_reference(tmp_path):
    # From the docstring of DetectorTerm, anchor by anchor.
    topk = 40
    model = pair_of(
        tmp_path,
        twi_steps='last',
        logit=dict(weight=3.0, box_weight=0.5, topk=topk),
    )
    era = model.distillers['distiller']
    data = batch_of(model)
    maps, targets = maps_of(model, data)
    half_explained(model)
    losses = model(**data, mode='loss')
    rpn_head = copy.deepcopy(model.teachers['teacher'].model.rpn_head)
    with torch.no_grad():
        theirs = rpn_head(tuple(targets))
        found = rpn_head(tuple(era.mbrnet(maps)))
    rows = []
    for image in range(3):
        places = [
            (image, level, *place)
            for level, scores in enumerate(theirs[0])
            for place in torch.cartesian_prod(
                *map(torch.arange, scores.shape[1:])
            ).tolist()
        ]
        places.sort(key=lambda place: at(theirs, *place)[0], reverse=True)
        rows += places[:topk]
    # More than one level has some of them.
    assert {row[1] for row in rows} == {0, 1}
    q = [math.exp(log_sigmoid(at(theirs, *row)[0])) for row in rows]
    t = [at(theirs, *row)[1] for row in rows]
    z = [at(found, *row)[0] for row in rows]
    b = [at(found, *row)[1] for row in rows]
    number = len(rows)
    assert number == 3 * topk
    mean = sum(q) / number
    unit = entropy(mean) - sum(map(entropy, q)) / number
    unit = max(unit, entropy(mean) / 10)
    gap = sum(
        -entropy(i) - i * log_sigmoid(x) - (1 - i) * log_sigmoid(-x)
        for i, x in zip(q, z, strict=True)
    )
    box = 0.0
    for side in range(4):
        values = [one[side] for one in t]
        first = sum(w * x for w, x in zip(q, values, strict=True)) / sum(q)
        var = sum(w * (x - first) ** 2 for w, x in zip(q, values, strict=True))
        scale = sum(q) / number * math.sqrt(var / sum(q))
        box += sum(
            w * abs(one[side] - x) / scale / 4
            for w, one, x in zip(q, b, values, strict=True)
        )
    # 'last' has the weights of e_0 and e_n, 1 each.
    weight = 2 * 0.5
    for name, value in (
        ('rpn_logit', weight * 3.0 * gap / number / unit),
        ('rpn_box', weight * 0.5 * box / number),
    ):
        assert value > 1e-3, name
        found = losses[f'loss_era_twi_{name}'].item()
        assert found == pytest.approx(value, rel=1e-3), name


def test_rpn__of_the_teachers_feature_costs_nothing(tmp_path):
    model = pair_of(tmp_path)
    era = model.distillers['distiller']
    data = batch_of(model)
    losses = model(**data, mode='loss')
    targets = maps_of(model, data)[1]
    samples = era._proposals.attach(
        {'neck': None, **_rpn_outputs(model, data)}, data['data_samples']
    )
    said = era.logit.target(era.twi_head, targets, samples)
    # Every image counts alike, however few regions it has.
    assert said.number == 3 * 100 > len(said.sure)
    terms = era.logit.of_estimate(era.twi_head, targets, said)
    assert set(terms) == {'logit', 'box', 'rpn_logit', 'rpn_box'}
    for name, value in terms.items():
        assert abs(value) < 1e-5, name
    assert losses['loss_era_logit'] > 1e-3


def _rpn_outputs(model, data):
    with model.wiring.recorder as recorder:
        model.student(**data, mode='loss')
    return recorder.pop()


# Powers of 2 leave the rounding as it is: mmcv's NMS has no float64, in which
# other factors would choose the same regions.
@pytest.mark.parametrize('factor', [0.125, 8.0])
def test_scale__of_the_teacher_changes_nothing(factor, tmp_path):
    def trained_by(factor):
        model = pair_of(tmp_path, factor=factor, twi_steps='all')
        model.distillers['distiller'].explained.fill_(0.5)
        # After iteration 0, whose share would take the place of 0.5.
        batches = [batch_of(model, seed=step) for step in range(3)]
        return train_steps(model, batches, begin=1)

    plain = trained_by(1.0)
    for losses, gradients in plain:
        assert all(losses[name] > 1e-3 for name in TERMS)
        assert any('backbone' in name for name in gradients)
    assert_same_steps(trained_by(factor), plain, rtol=1e-5)


def test_rpn__terms_reach_the_student_but_no_rpn(tmp_path):
    model = pair_of(tmp_path)
    half_explained(model)
    losses = model(**batch_of(model), mode='loss')
    for name in sorted(TERMS):
        model.zero_grad()
        losses[name].backward(retain_graph=True)
        assert model.student.backbone.conv1.weight.grad.any(), name
        for rpn in (model.student, model.teachers['teacher'].model):
            assert all(p.grad is None for p in rpn.rpn_head.parameters())


@pytest.mark.parametrize('targets', ['auto', 'teacher', 'both'])
def test_labels__are_asked_by_name_alone(targets, tmp_path, monkeypatch):
    model = pair_of(tmp_path, twi_targets=targets)
    era = model.distillers['distiller']
    assert era.twi_targets == ('teacher' if targets == 'auto' else targets)
    teacher, asked = model.teachers['teacher'].model, []

    def listen(head, name):
        original = getattr(head, name)

        def spy(*args, **kwargs):
            asked.append((type(head).__name__, name))
            return original(*args, **kwargs)

        monkeypatch.setattr(head, name, spy)

    listen(teacher.rpn_head, 'loss_by_feat')
    listen(teacher.rpn_head, 'get_targets')
    listen(teacher.roi_head, 'loss')
    losses = model(**batch_of(model), mode='loss')
    assert set(losses) >= TERMS
    assert bool(asked) == (targets == 'both')
    assert (set(losses) >= LABELS) == (targets == 'both')


def test_rpn__is_not_compared_where_labels_alone_judge(tmp_path):
    model = pair_of(tmp_path, twi_targets='labels')
    assert model.distillers['distiller'].logit.rpn is None
    losses = model(**batch_of(model), mode='loss')
    assert not TERMS & set(losses)
    assert set(losses) >= LABELS | {'loss_era_logit'}


def test_resampled__maps_are_no_input_of_the_students_roi_head(tmp_path, said):
    levels = dict(levels=[0, 1])
    source = dict(
        student='neck', teacher='neck', resample=dict(student=levels)
    )
    model = pair_of(tmp_path, source=source)
    assert len(said) == 1
    assert 'the outputs of its neck are resampled' in said[0]
    losses = model(**batch_of(model), mode='loss')
    # The teacher's heads judge estimates all the same.
    era_terms = {key for key in losses if key.startswith('loss_era_')}
    assert era_terms - {'loss_era_align', 'loss_era_residual'} == {
        'loss_era_twi_logit',
        'loss_era_twi_box',
        *TERMS,
    }


def test_own_features__are_what_the_teachers_heads_are_asked_about(tmp_path):
    # SoKD refines the targets; the heads know the teacher's own features.
    model = pair_of(tmp_path, twi_steps='all')
    era = model.distillers['distiller']
    half_explained(model)
    data = batch_of(model)
    student_feats = _rpn_outputs(model, data)
    own = model.teachers['teacher'].extract(data['inputs'])
    refined = dict(neck=tuple(1 + 2 * level for level in own['neck']))

    def losses_of(**feats):
        with torch.no_grad():
            return era.loss(
                student_feats=student_feats,
                data_samples=data['data_samples'],
                **feats,
            )

    plain = losses_of(teacher_feats=own)
    found = losses_of(teacher_feats=refined, own_feats=own)
    assert found['loss_era_align'] != plain['loss_era_align']
    for name in ('logit', 'box', 'twi_logit', 'twi_box'):
        key = f'loss_era_{name}'
        assert found[key] == plain[key], key
    assert all(found[key] == plain[key] for key in TERMS)
    wrong = losses_of(teacher_feats=refined)
    assert wrong['loss_era_logit'] != plain['loss_era_logit']
    assert all(wrong[key] != plain[key] for key in TERMS)


def softmax_rpn():
    config = two_stage_config(16, 24)
    config['rpn_head']['loss_cls'] = dict(type='CrossEntropyLoss')
    return config


BOTH = 'RPNHead and StandardRoIHead judge estimates by the'


@pytest.mark.parametrize(
    ('options', 'softmax', 'expected'),
    [
        (dict(), False, f"{BOTH} teacher's own outputs"),
        (dict(logit=None), False, f'{BOTH} labels'),
        (dict(), True, f"{BOTH} labels and the teacher's own outputs"),
        (
            dict(twi_targets='teacher'),
            True,
            "StandardRoIHead judges estimates by the teacher's own outputs",
        ),
    ],
)
def test_uses__names_the_heads_that_judge(
    options, softmax, expected, tmp_path
):
    teacher = softmax_rpn() if softmax else None
    era = pair_of(tmp_path, teacher, **options).distillers['distiller']
    twi, own = era.uses()
    assert twi == f"TWI: the teacher's {expected}"
    # The student's RPN has no terms.
    if era.logit is not None:
        assert own.endswith(': loss_era_logit, loss_era_box')


def test_fallback__is_the_labels_as_well_and_said(tmp_path, said):
    model = pair_of(tmp_path, softmax_rpn())
    era = model.distillers['distiller']
    assert era.twi_targets == 'both'
    assert era.logit.rpn is None
    assert len(said) == 1
    assert 'by the labels as well' in said[0]
    assert "the teacher's RPNHead has no sigmoid scores" in said[0]
    losses = model(**batch_of(model), mode='loss')
    assert not TERMS & set(losses)
    assert set(losses) >= LABELS | {'loss_era_twi_logit'}
    # By name they stay out, and that is said as well.
    model = pair_of(tmp_path, softmax_rpn(), twi_targets='teacher')
    assert model.distillers['distiller'].twi_targets == 'teacher'
    assert 'by its own outputs without the rest' in said[1]
    losses = model(**batch_of(model), mode='loss')
    assert {key for key in losses if 'twi' in key} == {
        'loss_era_twi_logit',
        'loss_era_twi_box',
    }


GUIDED = dict(
    type='GARPNHead',
    in_channels=24,
    feat_channels=24,
    approx_anchor_generator=dict(
        type='AnchorGenerator',
        octave_base_scale=4,
        scales_per_octave=1,
        ratios=[1.0],
        strides=[8, 16],
    ),
    square_anchor_generator=dict(
        type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[8, 16]
    ),
)
LEARNT = dict(
    type='EmbeddingRPNHead', num_proposals=4, proposal_feature_channel=24
)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (GUIDED, 'predicts more than scores and boxes'),
        (LEARNT, 'has no sigmoid scores'),
    ],
)
def test_rpn__of_other_kinds_is_not_compared(config, message):
    teacher = MODELS.build(ConfigDict(two_stage_config(16, 24))).eval()
    head = TwoStageTWIHead(
        MODELS.build(ConfigDict(config)).eval(), teacher.roi_head
    )
    term = RoITerm()
    feats = [torch.randn(1, 24, size, size) for size in (8, 4)]
    assert message in term.add_rpn(head, feats)
    assert term.rpn is None


def test_rpn__boxes_are_compared_where_the_roi_heads_are_not(tmp_path):
    # The coders of the RoI heads differ, the RPN is the same on both sides.
    teacher = two_stage_config(16, 24)
    teacher['roi_head']['bbox_head']['reg_class_agnostic'] = True
    model = pair_of(tmp_path, teacher)
    losses = model(**batch_of(model), mode='loss')
    assert 'loss_era_twi_box' not in losses
    assert set(losses) >= TERMS


def test_units__are_those_of_a_resumed_run(tmp_path):
    first, second = (pair_of(tmp_path, twi_steps='all') for _ in range(2))
    eras = [model.distillers['distiller'] for model in (first, second)]
    half_explained(first)
    for seed in range(2):
        losses = first(**batch_of(first, seed), mode='loss')
        first.parse_losses(losses)[0].backward()
    unit = eras[0].logit.rpn.score_unit.value
    assert unit not in (0, 1)
    second.student.load_state_dict(first.student.state_dict())
    eras[1].load_state_dict(eras[0].state_dict())
    assert eras[1].logit.rpn.score_unit.value == unit
    assert int(eras[1].logit.rpn.first_batches.seen) == 2
    found = []
    for model in (first, second):
        torch.manual_seed(0)
        losses = model(**batch_of(model, 3), mode='loss')
        found.append({name: losses[name].item() for name in TERMS})
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert int(eras[1].logit.rpn.first_batches.seen) == 3


def test_units__that_an_older_file_lacks_are_named(tmp_path):
    model = pair_of(tmp_path)
    state = model.state_dict()
    extras = state._metadata['']['era_mm']['distiller']['state_dict']
    for key in [key for key in extras if key.startswith('logit.rpn.')]:
        del extras[key]
    with pytest.raises(
        ValueError, match=r'missing.*logit\.rpn.*the file is of an older'
    ):
        model.load_state_dict(state)


def test_rpn__terms_of_half_precision_are_close(tmp_path):
    # Only the RPN: mmcv's RoIAlign has no bfloat16.
    model = pair_of(tmp_path)
    era = model.distillers['distiller']
    head, term = era.twi_head.rpn, era.logit.rpn
    targets = maps_of(model, batch_of(model))[1]
    feats = [level + noise(*level.shape).float() for level in targets]
    said = term.target(head, targets, [])
    term.measure(said)
    whole = term.of_estimate(head, feats, said)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        half = term.of_estimate(head, feats, said)
        other = term.target(head, targets, [])
    assert other.scores.dtype == other.boxes.dtype == torch.float32
    for name, value in half.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(whole[name].item(), rel=0.1)


@pytest.mark.parametrize(
    ('options', 'passes'),
    [
        # Three for the branches; the RPN on an estimate, forward and
        # backward, and on the teacher's feature.
        (dict(), 3 + 2 + 1),
        (dict(twi_steps='all'), 3 + 4 + 1),
        (dict(logit=None), 3 + 2),
        (dict(twi_steps='none'), 3),
    ],
)
def test_flops__count_the_passes_of_the_rpn(options, passes, tmp_path):
    model = pair_of(tmp_path, **options)
    data = batch_of(model)
    found = model.distillers['distiller'].extra_flops(
        lambda run: 1,
        student_feats=_rpn_outputs(model, data),
        teacher_feats=model.teachers['teacher'].extract(data['inputs']),
    )
    assert found == passes
