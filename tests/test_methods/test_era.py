"""ERA: values by hand, a slow reference, gradient routing, heads, modes."""

import copy
import math
import re

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from torch.nn.functional import conv2d

from era_mm.core import Distillation
from era_mm.heads import DenseTerm, RoITerm
from era_mm.heads.twi_heads import DenseTWIHead
from era_mm.methods.era import (
    ERADistiller,
    ERALoss,
    MBRNet,
    estimates_of,
    residual_targets,
)
from era_mm.methods.era.mbrnet import ResidualBranch
from era_mm.testing import (
    detection_batch,
    detector_config,
    distillation_config,
    era_model,
    give_opinions,
    noise,
    save_teacher,
    two_stage_config,
)

# -- decomposition ------------------------------------------------------------


def test_decomposition__by_hand():
    # u = 1, d = (2, -0.5), f_t = 4:
    # e = 1, 3, 2.5;  r_1 = 4 - 1 = 3,  r_2 = r_1 - d_1 = 1
    aligned = torch.tensor([[1.0]])
    residuals = [torch.tensor([[2.0]]), torch.tensor([[-0.5]])]
    estimates = estimates_of(aligned=aligned, residuals=residuals)
    targets = residual_targets(
        estimates=estimates, teacher_feat=torch.tensor([[4.0]])
    )
    assert [e.item() for e in estimates] == [1.0, 3.0, 2.5]
    assert [r.item() for r in targets] == [3.0, 1.0]


@pytest.mark.parametrize('shape', [(4, 3), (4, 3, 5), (4, 3, 5, 2)])
def test_decomposition__branch_error_is_estimate_error(shape):
    # d_i - r_i = e_i - f_t, on vectors, sequences and maps.
    aligned, teacher = noise(*shape), noise(*shape, seed=1)
    residuals = [noise(*shape, seed=seed) for seed in (2, 3, 4)]
    estimates = estimates_of(aligned=aligned, residuals=residuals)
    targets = residual_targets(estimates=estimates, teacher_feat=teacher)
    for d, r, e in zip(residuals, targets, estimates[1:], strict=True):
        torch.testing.assert_close(d - r, e - teacher, rtol=1e-12, atol=1e-12)
    # Independent recursion: r_1 = f_t - u, r_i = r_(i-1) - d_(i-1).
    remainder = teacher - aligned
    for d, r in zip(residuals, targets, strict=True):
        torch.testing.assert_close(r, remainder, rtol=1e-12, atol=1e-12)
        remainder = remainder - d


def test_decomposition__last_estimate_is_the_neck_output():
    net = MBRNet(3, 5, num_levels=2, num_branches=3).eval()
    net.init_weights()
    feats = [torch.randn(2, 3, 6, 6), torch.randn(2, 3, 3, 3)]
    aligned, residuals = net.align(feats), net.residuals(feats)
    out = net(feats)
    for level in range(2):
        expected = estimates_of(
            aligned=aligned[level], residuals=[d[level] for d in residuals]
        )[-1]
        assert torch.equal(out[level], expected)
        assert out[level].shape == (2, 5, *feats[level].shape[2:])


# -- losses -------------------------------------------------------------------


def test_loss__by_hand():
    # One level, one value. u = 1, d = (2, -0.5), f_t = 4, s = (1, 0.5), n = 2.
    # align:    5 * (1 - 4)^2 = 45
    # residual: (1/2) * [1 * (2 - 3)^2 + 0.5 * (-0.5 - 1)^2]
    #         = (1/2) * [1 + 1.125] = 1.0625
    one = torch.ones(1, 1)
    losses = ERALoss()(
        aligned=[1 * one],
        residuals=[[2 * one], [-0.5 * one]],
        targets=[[3 * one], [1 * one]],
        teacher_feats=[4 * one],
    )
    assert losses['loss_era_align'].item() == 45.0
    assert losses['loss_era_residual'].item() == 1.0625
    # Distances of e_0, e_1, e_2 to 4: 9, 1, 2.25.
    assert [losses[f'era_mse_e{i}'].item() for i in range(3)] == [9, 1, 2.25]


def test_loss__default_weights_are_the_official_ones():
    loss = ERALoss()
    # s_i / n with s = (1, .5, .25, .125) and n = 4, not divided by sum(s).
    assert loss.branch_weights(4) == [0.25, 0.125, 0.0625, 0.03125]
    assert ERALoss(scales=2.0).branch_weights(4) == [0.5] * 4
    assert loss.step_weights(4) == [1.0, 0.25, 0.125, 0.0625, 0.03125]
    assert (loss.align_weight, loss.residual_weight, loss.twi_weight) == (
        5.0,
        1.0,
        1.0,
    )


def test_loss__sums_over_levels():
    loss = ERALoss()
    a, b = torch.full((2, 3), 2.0), torch.full((2, 3, 4), 3.0)
    zero = [torch.zeros_like(a), torch.zeros_like(b)]
    # MSE 4 and 9 whatever the number of elements; 5 * (4 + 9).
    losses = loss(
        aligned=[a, b], residuals=[zero], targets=[zero], teacher_feats=zero
    )
    assert losses['loss_era_align'].item() == 65.0


def test_loss__half_precision_is_computed_in_float32():
    big = torch.full((1, 1), 300.0, dtype=torch.float16)
    losses = ERALoss()(
        aligned=[big],
        residuals=[[big]],
        targets=[[0 * big]],
        teacher_feats=[0 * big],
    )
    # 300^2 = 90000 does not fit float16 (65504).
    assert losses['loss_era_align'].item() == 450000.0


def test_loss__scales_must_fit_the_branches():
    with pytest.raises(ValueError, match='one value or one per branch'):
        MODELS.build(
            distillation_config(
                dict(type='era_mm.ERADistiller', loss=dict(scales=[1.0, 0.5]))
            )
        )


def test_loss__gradients_are_right():
    def total(u, d1, d2, t):
        estimates = estimates_of(aligned=u, residuals=[d1, d2])
        targets = residual_targets(estimates=estimates, teacher_feat=t)
        losses = ERALoss()(
            aligned=[u],
            residuals=[[d1], [d2]],
            targets=[[targets[0]], [targets[1]]],
            teacher_feats=[t],
        )
        return losses['loss_era_align'] + losses['loss_era_residual']

    u, d1, d2 = (noise(2, 3, seed=s).requires_grad_() for s in (0, 1, 2))
    t = noise(2, 3, seed=3)
    total(u, d1, d2, t).backward()
    # d/du: 5 * 2 (u - t) / 6 and nothing from the branches (targets are
    # constants); d/dd_i: s_i / n * 2 (d_i - r_i) / 6 with n = 2.
    r1, r2 = t - u, t - u - d1
    kwargs = dict(rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(u.grad, 10 * (u - t) / 6, **kwargs)
    torch.testing.assert_close(d1.grad, 0.5 * (d1 - r1) / 3, **kwargs)
    torch.testing.assert_close(d2.grad, 0.25 * (d2 - r2) / 3, **kwargs)


# -- MBRNet -------------------------------------------------------------------


@pytest.mark.parametrize(
    ('student', 'teacher', 'branches', 'projections', 'align'),
    [
        # era.md 1.4: R34->R18, R50->R18, R50->MobileNetV1, in thousands.
        (512, 512, 2109, 0, 263),
        (512, 2048, 2109, 4202, 1051),
        (1024, 2048, 8413, 8397, 2099),
    ],
)
def test_mbrnet__parameter_counts_of_the_released_structure(
    student, teacher, branches, projections, align
):
    net = MBRNet(student, teacher, spatial_dims=0)

    def count(*names):
        return round(
            sum(
                p.numel()
                for name, p in net.named_parameters()
                if any(part in name for part in names)
            )
            / 1000
        )

    assert count('layers.', 'norms.') == branches
    assert count('projection') == projections
    assert count('aligns') == align


@pytest.mark.parametrize('share', [False, True])
def test_mbrnet__conv_counts_and_norms_per_level(share):
    # era.md 3.3: n=4, m=2, 256 channels: 4.72 M shared, 23.6 M for 5 levels.
    net = MBRNet(256, 256, num_levels=5, share_levels=share)
    convs = sum(p.numel() for n, p in net.named_parameters() if 'layers.' in n)
    assert round(convs / 1e4) == (472 if share else 2359)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 5 * 4 * 2
    assert all(norm.momentum == 0.01 for norm in norms)


def test_mbrnet__branch_against_a_plain_chain():
    branch = ResidualBranch(
        3,
        5,
        spatial_dims=2,
        num_blocks=2,
        num_norms=1,
        norm_cfg=dict(type='BN', momentum=0.01),
        act_cfg=dict(type='ReLU'),
    )
    branch.init_weights()
    x = torch.randn(4, 3, 6, 6)
    out = branch(x)
    # [conv 3x3 - BN - ReLU] - conv 3x3 - BN - conv 1x1, written out.
    y = x
    for index in range(2):
        y = conv2d(y, branch.layers[index].weight, padding=1)
        mean = y.mean((0, 2, 3), keepdim=True)
        var = y.var((0, 2, 3), unbiased=False, keepdim=True)
        y = (y - mean) / (var + 1e-5).sqrt()
        if index == 0:
            y = y.clamp(min=0)
    y = conv2d(y, branch.projection.weight, branch.projection.bias)
    torch.testing.assert_close(out, y, rtol=1e-4, atol=1e-5)


def test_mbrnet__first_residuals_have_unit_variance():
    # The closing norm, not a zero initialisation (equal channels).
    net = MBRNet(16, 16, num_branches=1)
    net.init_weights()
    residual = net.residuals([torch.randn(8, 16, 8, 8)])[0][0]
    assert residual.var((0, 2, 3)).mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(num_branches=0), 'at least 1'),
        (dict(num_levels=2, in_channels=[4, 4, 4]), 'one number or 2'),
        (
            dict(num_levels=2, in_channels=[4, 8], share_levels=True),
            'share_levels',
        ),
        (dict(spatial_dims=3), 'spatial_dims'),
    ],
)
def test_mbrnet__refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MBRNet(**(dict(in_channels=4, out_channels=4) | kwargs))


def test_mbrnet__is_an_ordinary_neck_of_a_host():
    config = detector_config()
    config['neck'] = [
        config['neck'],
        dict(
            type='era_mm.MBRNet', in_channels=16, out_channels=24, num_levels=2
        ),
    ]
    config['bbox_head'] |= dict(in_channels=24)
    model = MODELS.build(_config_dict(config))
    data = model.data_preprocessor(detection_batch(), True)
    losses = model(**data, mode='loss')
    assert set(losses) == {'loss_cls', 'loss_bbox'}


def _config_dict(config):
    return ConfigDict(copy.deepcopy(config))


# -- the distiller ------------------------------------------------------------


def build(checkpoint='random', student=None, teacher=None, **kwargs):
    model = era_model(checkpoint, student, teacher, **kwargs)
    assert isinstance(model, Distillation)
    return model


def released(*args, **kwargs):
    """The released arithmetic on a detector, without a logit term."""
    return build(*args, **(dict(form='released', logit=None) | kwargs))


@pytest.fixture
def said(monkeypatch):
    """What the distiller and its terms say."""
    messages = []
    for module in ('methods.era.head_user', 'heads.detector_term'):
        monkeypatch.setattr(
            f'era_mm.{module}.print_log',
            lambda message, **kwargs: messages.append(message),
        )
    return messages


def losses_of(model, seed=0):
    data = model.data_preprocessor(detection_batch(4, seed=seed), True)
    return model(**data, mode='loss')


def test_distiller__total_against_a_written_out_reference(teacher_file):
    model = released(teacher_file)
    era = model.distillers['distiller']
    model.load_teachers()
    data = model.data_preprocessor(detection_batch(4), True)
    inputs, samples = data['inputs'], data['data_samples']
    # Norm statistics change with every training forward, so copy first.
    reference = copy.deepcopy(model.student)
    net = copy.deepcopy(era.mbrnet)
    losses = model(inputs, samples, mode='loss')

    teacher = model.teachers['teacher'].model
    head = copy.deepcopy(teacher.bbox_head).train()
    with torch.no_grad():
        maps = reference.extract_feat(inputs)
        targets = teacher.extract_feat(inputs)
        n, s = 4, (1, 0.5, 0.25, 0.125)
        estimate = [net.aligns[i](maps[i]) for i in range(2)]
        align = sum(((estimate[i] - targets[i]) ** 2).mean() for i in range(2))
        residual = 0.0
        twi = head.loss(tuple(estimate), samples)
        cls, bbox = sum(twi['loss_cls']), sum(twi['loss_bbox'])
        for k in range(n):
            d = [net.levels[i][k](maps[i]) for i in range(2)]
            for i in range(2):
                r = targets[i] - estimate[i]
                residual += s[k] / n * ((d[i] - r) ** 2).mean()
            estimate = [e + x for e, x in zip(estimate, d, strict=True)]
            twi = head.loss(tuple(estimate), samples)
            cls = cls + s[k] / n * sum(twi['loss_cls'])
            bbox = bbox + s[k] / n * sum(twi['loss_bbox'])
    expected = {
        'loss_era_align': 5 * align,
        'loss_era_residual': residual,
        'loss_era_twi_cls': cls,
        'loss_era_twi_bbox': bbox,
    }
    assert {key for key in losses if 'loss_era' in key} == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(
            losses[key].detach(), value, rtol=1e-5, atol=1e-6, msg=key
        )


def reached(loss, model):
    """Which parts of the model a loss sends a gradient to."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    era = model.distillers['distiller']
    parts = {
        'backbone': model.student.backbone,
        'head': model.student.bbox_head,
        'align': era.mbrnet.aligns,
    }
    branches = era.mbrnet.levels[0]
    parts |= {f'branch{i}': branch for i, branch in enumerate(branches)}
    return {
        name
        for name, part in parts.items()
        if any(
            p.grad is not None and p.grad.abs().max() > 0
            for p in part.parameters()
        )
    }


def test_distiller__gradient_routing():
    # era.md 1.5, with n = 2.
    model = released(mbrnet=dict(num_branches=2))
    losses = losses_of(model)
    branches = {'branch0', 'branch1'}
    assert reached(losses['loss_bbox'][0], model) == {'backbone', 'head'}
    assert reached(losses['loss_era_align'], model) == {'backbone', 'align'}
    assert reached(losses['loss_era_residual'], model) == (
        {'backbone'} | branches
    )
    assert reached(losses['loss_era_twi_cls'], model) == (
        {'backbone', 'align'} | branches
    )


@pytest.mark.parametrize('branch', [0, 1, 2])
def test_distiller__residual_of_a_branch_reaches_it_alone(branch):
    scales = [0.0, 0.0, 0.0]
    scales[branch] = 1.0
    model = released(
        mbrnet=dict(num_branches=3), loss=dict(scales=scales), twi_steps='none'
    )
    losses = losses_of(model)
    assert reached(losses['loss_era_residual'], model) == {
        'backbone',
        f'branch{branch}',
    }


def test_distiller__detach_keeps_branch_losses_from_the_student():
    model = released(detach=True, mbrnet=dict(num_branches=2))
    era = model.distillers['distiller']
    losses = losses_of(model)
    branches = {'branch0', 'branch1'}
    assert reached(losses['loss_era_residual'], model) == branches
    # e_0 still trains the student and the align layer.
    assert {'backbone', 'align'} <= reached(losses['loss_era_twi_cls'], model)
    # The student's gradients are those of L_S alone: with every branch loss
    # off they are the same.
    data = model.data_preprocessor(detection_batch(4), True)

    def gradient(loss):
        model.zero_grad()
        model.student.eval()
        model.parse_losses(model(**data, mode='loss'))[0].backward()
        return model.student.neck.lateral_convs[0].conv.weight.grad.clone()

    with_branches = gradient(None)
    era.loss_terms.scales = (0.0, 0.0)
    torch.testing.assert_close(
        gradient(None), with_branches, rtol=1e-5, atol=1e-7
    )


def test_distiller__twi_head_gets_no_gradient_and_passes_it_on():
    model = released()
    head = model.distillers['distiller'].twi_head.head
    before = {k: v.clone() for k, v in head.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.parse_losses(losses_of(model))[0].backward()
    optimizer.step()
    assert all(p.grad is None for p in head.parameters())
    for key, value in head.state_dict().items():
        assert torch.equal(value, before[key])
    assert model.distillers['distiller'].mbrnet.aligns[0].weight.grad.any()


def test_distiller__sampled_steps_have_the_expectation_of_all(monkeypatch):
    model = released(mbrnet=dict(num_branches=2))
    era = model.distillers['distiller']
    model.load_teachers()
    model.eval()
    everything = losses_of(model)['loss_era_twi_cls'].item()
    # Weights 1, 1/2, 1/4: each step is drawn in proportion and given 1.75.
    weights = torch.tensor([1.0, 0.5, 0.25])
    era.twi_steps = 'sampled'
    drawn = []
    mean = 0.0
    for index in range(3):

        def draw(probabilities, num, generator, index=index):
            drawn.append(probabilities)
            return torch.tensor([index])

        monkeypatch.setattr(torch, 'multinomial', draw)
        share = weights[index] / weights.sum()
        mean += share * losses_of(model)['loss_era_twi_cls'].item()
    assert torch.equal(drawn[0], weights)
    assert mean.item() == pytest.approx(everything, rel=1e-5)


def test_distiller__last_step_alone_has_the_sum_of_the_weights():
    model = released(mbrnet=dict(num_branches=2), twi_steps='last')
    era = model.distillers['distiller']
    model.load_teachers()
    model.eval()
    found = losses_of(model)['loss_era_twi_cls']
    data = model.data_preprocessor(detection_batch(4), True)
    maps = model.student.extract_feat(data['inputs'])
    expected = era.twi_head.loss(era.mbrnet(maps), data['data_samples'])
    torch.testing.assert_close(found, 1.75 * expected['loss_cls'])


def test_distiller__other_class_count_turns_twi_off_with_a_message(said):
    teacher = detector_config(width=16, channels=24)
    teacher['bbox_head'] |= dict(num_classes=7)
    model = build(teacher=teacher)
    assert len(said) == 1
    assert 'ERA without TWI' in said[0]
    assert 'teacher has 7 classes and the student 3' in said[0]
    losses = losses_of(model)
    assert {key for key in losses if 'loss_era' in key} == {
        'loss_era_align',
        'loss_era_residual',
    }
    assert model.distillers['distiller'].inference_modes() == ()


@pytest.mark.parametrize('steps', ['all', 'last', 'sampled'])
def test_distiller__other_class_count_is_refused_where_twi_is_set(steps):
    teacher = detector_config(width=16, channels=24)
    teacher['bbox_head'] |= dict(num_classes=7)
    with pytest.raises(ValueError) as error:
        build(teacher=teacher, twi_steps=steps)
    message = str(error.value)
    assert f"`twi_steps='{steps}'` needs the teacher's head" in message
    assert 'teacher has 7 classes and the student 3' in message
    model = build(teacher=teacher, twi_steps='none', logit=None)
    assert model.distillers['distiller'].twi_steps == 'none'


def test_distiller__levels_must_agree():
    teacher = detector_config(width=16, channels=24)
    teacher['neck'] |= dict(num_outs=3)
    with pytest.raises(ValueError, match='all but the channels must agree'):
        build(teacher=teacher)


def test_distiller__strides_must_agree():
    teacher = detector_config(width=16, channels=24)
    teacher['backbone'] |= dict(strides=(1, 1, 2))
    with pytest.raises(ValueError, match='of the same levels and strides'):
        build(teacher=teacher)


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(twi_steps='some'), ValueError, 'twi_steps'),
        (dict(form='new'), ValueError, r"`form` .*'released'.*'new'"),
        (dict(alpha=2.0), ValueError, 'alpha'),
        (dict(num_branches=4), TypeError, 'Did you mean|Known keys'),
        (dict(mbrnt=dict()), TypeError, "Did you mean 'mbrnet'"),
        (dict(mbrnet=dict(num_branchs=2)), TypeError, "'num_branches'"),
        (dict(loss=dict(align_wieght=1.0)), TypeError, "'align_weight'"),
        (dict(source=['neck', 'backbone']), ValueError, 'one source'),
        (
            dict(mbrnet=dict(in_channels=32)),
            ValueError,
            r'in_channels` is \[32, 32\].*has \[16, 16\]',
        ),
        (dict(mbrnet=dict(num_levels=3)), ValueError, 'num_levels` is 3'),
    ],
)
def test_distiller__refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        build(**kwargs)


# -- the scores and boxes of dense heads --------------------------------------


HEADS = ['RetinaHead', 'FCOSHead', 'ATSSHead', 'GFLHead']


def dense_config(head, **kwargs):
    """A detector of one head, an anchor-based one with two anchors."""
    config = detector_config(head=head, **kwargs)
    if head == 'RetinaHead':
        config['bbox_head']['anchor_generator'] = dict(
            config['bbox_head']['anchor_generator'], ratios=[0.5, 2.0]
        )
    return config


def dense_pair(head, folder, **kwargs):
    """A pair in double precision, whose teacher is of some opinion."""
    config = dense_config(head, width=16, channels=24)
    model = build(
        save_teacher(config, folder / 'teacher.pth'),
        student=dense_config(head),
        teacher=config,
        twi_steps='none',
        **kwargs,
    )
    model.init_weights()
    give_opinions(model.teachers['teacher'].model.bbox_head)
    return model.double()


def kl_of(target, prediction):
    return sum(
        t * math.log(t / p)
        for t, p in zip(target, prediction, strict=True)
        if t > 0
    )


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def softmax(values):
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def rows_by_hand(outs, image, num_classes, box_width):
    """Scores and boxes of an image, anchor by anchor of each place."""
    return [
        (
            scores[
                image, a * num_classes : (a + 1) * num_classes, y, x
            ].tolist(),
            boxes[image, a * box_width : (a + 1) * box_width, y, x].tolist(),
        )
        for scores, boxes in zip(outs[0], outs[1], strict=True)
        for y in range(scores.shape[2])
        for x in range(scores.shape[3])
        for a in range(scores.shape[1] // num_classes)
    ]


def yes_and_no(score):
    return (score, 1 - score)


class SlowUnits:
    """The units of all batches so far, row by row."""

    def __init__(self, bins):
        self.bins = bins
        #: Scores, boxes and sureness of every row so far.
        self.rows = []

    def sides(self, box):
        """The four distributions of a row."""
        size = self.bins
        return [softmax(box[size * i : size * (i + 1)]) for i in range(4)]

    def score(self):
        # mean_r KL(q_r || mean_r q_r)
        number = len(self.rows)
        scores = [scores for scores, _, _ in self.rows]
        mean = [sum(column) / number for column in zip(*scores, strict=True)]
        return (
            sum(
                kl_of(yes_and_no(q), yes_and_no(m))
                for row in scores
                for q, m in zip(row, mean, strict=True)
            )
            / number
        )

    def boxes(self):
        # mean_r w_r times the spread around what the sure rows have.
        sure = [w for _, _, w in self.rows]
        share = sum(sure) / len(sure)

        def mean(values):
            pairs = zip(sure, values, strict=True)
            return sum(w * v for w, v in pairs) / sum(sure)

        coded = [box for _, box, _ in self.rows]
        if self.bins == 1:
            columns = list(zip(*coded, strict=True))
            return [
                share
                * math.sqrt(mean([(v - mean(column)) ** 2 for v in column]))
                for column in columns
            ]
        sides = [self.sides(box) for box in coded]
        total = 0.0
        for side in range(4):
            own = [row[side] for row in sides]
            guess = [mean(bin_) for bin_ in zip(*own, strict=True)]
            total += mean([kl_of(row, guess) for row in own]) / 4
        return share * total


def slow_terms(pairs, units):
    """Both terms, of the scores and boxes of both sides at every row."""
    unit, box_unit = units.score(), units.boxes()
    scores = boxes = 0.0
    for (p, b), (q, t) in pairs:
        scores += sum(
            kl_of(yes_and_no(sigmoid(x)), yes_and_no(sigmoid(y)))
            for x, y in zip(q, p, strict=True)
        )
        if units.bins == 1:
            distance = [
                abs(x - y) / one
                for x, y, one in zip(b, t, box_unit, strict=True)
            ]
        else:
            distance = [
                kl_of(x, y) / box_unit
                for x, y in zip(units.sides(t), units.sides(b), strict=True)
            ]
        boxes += sigmoid(max(q)) * sum(distance) / 4
    return scores / unit / len(pairs), boxes / len(pairs)


@pytest.mark.parametrize('head', ['RetinaHead', 'FCOSHead', 'GFLHead'])
def test_dense__against_a_slow_reference(head, tmp_path):
    # From the docstring of DetectorTerm, in plain loops.
    options = dict(weight=3.0, box_weight=0.5, topk=7)
    model = dense_pair(head, tmp_path, logit=options)
    teacher = copy.deepcopy(model.teachers['teacher'].model)
    # FCOS gives pixels at test: training form alone is compared.
    teacher.bbox_head.training = True
    bins = 9 if head == 'GFLHead' else 1
    units = SlowUnits(bins)
    for seed in (0, 1):
        data = model.data_preprocessor(detection_batch(4, seed=seed), True)
        data['inputs'] = data['inputs'].double()
        student = copy.deepcopy(model.student)
        found = model(**data, mode='loss')
        # Extras that no gradient reached would be asked for in the next step.
        model.parse_losses(found)[0].backward()
        with torch.no_grad():
            outs = [
                one.bbox_head(one.extract_feat(data['inputs']))
                for one in (student, teacher)
            ]
        pairs = []
        for image in range(4):
            own, theirs = (
                rows_by_hand(out, image, 3, 4 * bins) for out in outs
            )
            best = sorted(
                range(len(theirs)), key=lambda row: -max(theirs[row][0])
            )
            pairs += [(own[row], theirs[row]) for row in best[:7]]
        assert len(pairs) == 28
        units.rows += [
            (
                [sigmoid(z) for z in scores],
                box,
                sigmoid(max(scores)),
            )
            for _, (scores, box) in pairs
        ]
        scores, boxes = slow_terms(pairs, units)
        expected = {
            'loss_era_logit': 3.0 * scores,
            'loss_era_box': 0.5 * boxes,
        }
        for key, value in expected.items():
            assert value > 1e-2, key
            assert found[key].item() == pytest.approx(value, rel=1e-6), key


def test_dense__of_what_the_teacher_says_alike_has_the_least_unit():
    # A teacher that scores every anchor the same: no information to divide
    # by, so a tenth of the entropy; boxes have the unit 1.
    model = build(twi_steps='none')
    model.init_weights()
    with torch.no_grad():
        head = model.teachers['teacher'].model.bbox_head
        head.retina_cls.weight.zero_()
        head.retina_reg.weight.zero_()
    losses = losses_of(model)
    term = model.distillers['distiller'].logit
    bias = head.retina_cls.bias[0].double()
    p = bias.sigmoid().item()
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    expected = entropy * head.num_classes / 10
    assert term.score_unit.value.item() == pytest.approx(expected, rel=1e-5)
    assert (term.box_unit.value == 1).all()
    assert losses['loss_era_logit'].isfinite()
    assert losses['loss_era_box'].isfinite()


def test_dense__units_are_those_of_the_first_batches():
    model = build(twi_steps='none')
    model.init_weights()
    give_opinions(model.teachers['teacher'].model.bbox_head)
    term = model.distillers['distiller'].logit
    batches = term.first_batches
    assert batches.number == 20
    batches.number = 2

    def units():
        return [term.score_unit.value.clone(), term.box_unit.value.clone()]

    # Validation's losses and those of a model in eval mode measure nothing.
    with torch.no_grad():
        losses_of(model)
    model.eval()
    losses_of(model)
    assert int(batches.seen) == 0
    model.train()
    seen = []
    for seed in range(4):
        model.parse_losses(losses_of(model, seed=seed))[0].backward()
        seen.append(units())
    assert int(batches.seen) == 2
    assert not torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[1][1])
    for later in seen[2:]:
        for one, other in zip(seen[1], later, strict=True):
            assert torch.equal(one, other)
    # And saved: a resumed run goes on with them.
    again = build(twi_steps='none')
    again.load_state_dict(model.state_dict())
    term = again.distillers['distiller'].logit
    term.first_batches.number = 2
    for one, other in zip(seen[1], units(), strict=True):
        assert torch.equal(one, other)
    losses_of(again, seed=5)
    assert torch.equal(units()[0], seen[1][0])


def test_dense__terms_reach_the_students_own_head():
    model = released(logit=dict())
    losses = losses_of(model)
    head = model.student.bbox_head
    # Each its own last layer, and not the other's.
    for term, hears, rests in (
        ('logit', head.retina_cls, head.retina_reg),
        ('box', head.retina_reg, head.retina_cls),
    ):
        loss = losses[f'loss_era_{term}']
        assert reached(loss, model) == {'backbone', 'head'}
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert hears.weight.grad.any()
        assert rests.weight.grad is None
    teacher = model.teachers['teacher'].model
    assert all(p.grad is None for p in teacher.parameters())


def test_dense__of_estimates_is_half_of_both_targets():
    # One estimate alone (no branch weighs): half of the head's own losses.
    options = dict(
        mbrnet=dict(num_branches=1),
        loss=dict(scales=[0.0]),
        logit=dict(weight=3.0, topk=7),
    )
    torch.manual_seed(0)
    labels = losses_of(released(**options))
    torch.manual_seed(0)
    both = released(twi_targets='both', **options)
    era = both.distillers['distiller']
    net = copy.deepcopy(era.mbrnet)
    student = copy.deepcopy(both.student)
    losses = losses_of(both)
    assert set(losses) - set(labels) == {
        'loss_era_twi_logit',
        'loss_era_twi_box',
    }
    for name in ('cls', 'bbox'):
        torch.testing.assert_close(
            losses[f'loss_era_twi_{name}'],
            labels[f'loss_era_twi_{name}'] / 2,
        )
    data = both.data_preprocessor(detection_batch(4), True)
    maps = student.extract_feat(data['inputs'])
    teacher = both.teachers['teacher'].model
    feats = teacher.extract_feat(data['inputs'])
    said = era.logit.target(era.twi_head, feats, data['data_samples'])
    expected = era.logit.of_outputs(
        teacher.bbox_head(tuple(net.align(maps))), said
    )
    for name, value in expected.items():
        found = losses[f'loss_era_twi_{name}']
        assert found > 0
        torch.testing.assert_close(found, value / 2)
        assert reached(found, both) == {'backbone', 'align'}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(
                anchor_generator=dict(
                    type='AnchorGenerator',
                    ratios=[0.5, 1.0],
                    octave_base_scale=2,
                    scales_per_octave=1,
                    strides=[8, 16],
                )
            ),
            'anchors and classes must agree',
        ),
        (
            dict(
                anchor_generator=dict(
                    type='AnchorGenerator',
                    ratios=[1.0],
                    octave_base_scale=4,
                    scales_per_octave=1,
                    strides=[8, 16],
                )
            ),
            'anchors of the two have different sizes',
        ),
        (dict(num_classes=7), 'teacher has 7 classes and the student 3'),
        (
            dict(loss_cls=dict(type='CrossEntropyLoss')),
            "teacher's RetinaHead has no sigmoid scores",
        ),
    ],
)
def test_logit__dense_heads_that_differ_are_refused(change, message, said):
    teacher = detector_config(width=16, channels=24)
    teacher['bbox_head'] |= change
    with pytest.raises(ValueError, match=message) as error:
        build(teacher=teacher, logit=dict(kind='dense'), twi_steps='none')
    assert 'Remove `logit`' in str(error.value)
    assert said == []
    # By default it is left out with the same words.
    model = build(teacher=teacher)
    assert re.search(message, said[0])
    # Of the teacher's own outputs, only where these are the reason.
    further = "TWI: the teacher's RetinaHead judges estimates by the labels"
    assert [line.startswith(further) for line in said[1:]] == [True] * (
        'loss_cls' in change
    )
    losses = losses_of(model)
    assert not {'loss_era_logit', 'loss_era_box'} & set(losses)
    era = model.distillers['distiller']
    assert era.student_sources == ('neck',)
    if 'num_classes' in change:
        assert era.twi_steps == 'none'
    elif 'loss_cls' in change:
        # The ground truth remains.
        assert era.twi_targets == 'labels'
        assert losses['loss_era_twi_bbox'].isfinite()
        for targets in ('teacher', 'both'):
            with pytest.raises(
                ValueError, match=f"{message}.*twi_targets='labels'"
            ):
                build(teacher=teacher, twi_targets=targets)
    else:
        # The teacher's head can be compared with itself.
        assert era.twi_targets == 'teacher'
        assert {key for key in losses if 'twi' in key} == {
            'loss_era_twi_logit',
            'loss_era_twi_box',
        }


@pytest.mark.parametrize(
    ('heads', 'change', 'message'),
    [
        (
            ('RetinaHead', 'ATSSHead'),
            dict(),
            'RetinaHead and ATSSHead encode them differently',
        ),
        (
            ('RetinaHead', 'RetinaHead'),
            dict(
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]
                )
            ),
            'two RetinaHeads encode them with different settings',
        ),
        (
            ('FCOSHead', 'FCOSHead'),
            dict(norm_on_bbox=False),
            'two FCOSHeads encode them with different settings',
        ),
        (
            ('GFLHead', 'GFLHead'),
            dict(reg_max=4),
            'two GFLHeads encode them with different settings',
        ),
        (
            ('RetinaHead', 'RetinaHead'),
            dict(reg_decoded_bbox=True, loss_bbox=dict(type='GIoULoss')),
            'two RetinaHeads encode them with different settings',
        ),
    ],
)
def test_dense__boxes_of_another_code_are_left_out(
    heads, change, message, said
):
    teacher = detector_config(width=16, channels=24, head=heads[1])
    teacher['bbox_head'] |= change
    model = build(
        student=detector_config(head=heads[0]),
        teacher=teacher,
        twi_steps='none',
    )
    assert len(said) == 1
    assert 'Boxes are not distilled' in said[0]
    assert message in said[0]
    losses = losses_of(model)
    assert losses['loss_era_logit'] > 0
    assert 'loss_era_box' not in losses
    weights = model.distillers['distiller'].loss_weights()
    assert weights['loss_era_logit'] == 1
    assert 'loss_era_box' not in weights


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(), None),
        # TOOD's are probabilities.
        (dict(activated=True), "student's Head has no sigmoid scores"),
        (dict(use_sigmoid=False), "student's Head has no sigmoid scores"),
        # YOLOX's and YOLOv3's background is told by the objectness alone.
        (dict(loss_obj=1), "student's Head predicts objectness"),
        (dict(loss_conf=1), "student's Head predicts objectness"),
    ],
)
def test_logit__knows_heads_by_what_their_scores_are(change, message):
    maps = [torch.zeros(1, 3, 4, 4)]

    class Head(torch.nn.Module):
        cls_out_channels = 3

        def __init__(self, **kwargs):
            super().__init__()
            self.loss_cls = torch.nn.Module()
            self.loss_cls.use_sigmoid = kwargs.pop('use_sigmoid', True)
            self.loss_cls.activated = kwargs.pop('activated', False)
            vars(self).update(kwargs)

        def forward(self, feats):
            return maps, [torch.zeros(1, 4, 4, 4)]

    for swapped in (False, True):
        heads = [Head(**change), Head()]
        if swapped:
            heads.reverse()
        student = torch.nn.Module()
        student.bbox_head = heads[0]
        found = DenseTerm().prepare(
            head=DenseTWIHead(heads[1]),
            student=student,
            student_feats={'bbox_head': (*maps, torch.zeros(1, 4, 4, 4))},
            teacher_feats=maps,
        )
        expected = message and (
            message.replace('student', 'teacher') if swapped else message
        )
        assert found is expected is None or expected in found
    # Without a student the head is the teacher's.
    alone = DenseTerm().prepare(
        head=DenseTWIHead(Head(**change)),
        student=None,
        student_feats={},
        teacher_feats=maps,
    )
    expected = message and message.replace('student', 'teacher')
    assert alone is expected is None or expected in alone


@pytest.mark.parametrize(
    ('term', 'kwargs'),
    [
        (term, kwargs)
        for term in (DenseTerm, RoITerm)
        for kwargs in (dict(weight=-1.0), dict(box_weight=-1.0), dict(topk=0))
    ],
)
def test_logit__of_a_detector_has_weights_and_rows(term, kwargs):
    with pytest.raises(ValueError, match='at least'):
        term(**kwargs)


def test_logit__binary_is_dense_now(said):
    model = build(logit=dict(kind='binary', weight=3.0, temperature=2.0))
    assert len(said) == 1
    assert "now kind='dense'" in said[0]
    assert 'version 0.3' in said[0]
    term = model.distillers['distiller'].logit
    assert type(term) is DenseTerm
    assert (term.weight, term.box_weight, term.topk) == (3.0, 1.0, 100)


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('kl', "kind 'kl' does not fit .*RetinaHead.*kind='dense'"),
        ('dist', "kind 'dist' does not fit .*RetinaHead.*kind='dense'"),
        ('roi', "kind 'roi' does not fit .*RetinaHead.*kind='dense'"),
        ('mse', "one of .*'dense', 'dist', 'dkd', 'kl', 'roi'.*'mse'"),
    ],
)
def test_logit__kind_is_the_heads(kind, message):
    with pytest.raises(ValueError, match=message):
        build(logit=dict(kind=kind))


def test_logit__sees_the_teachers_scores_in_training_form():
    # Guided anchors mask their maps at test, for a batch of one alone.
    model = build(logit=dict(kind='dense'))
    head = model.teachers['teacher'].model.bbox_head
    seen = []
    head.register_forward_pre_hook(lambda *_: seen.append(head.training))
    losses_of(model)
    assert seen
    assert all(seen)
    assert not head.training


def test_logit__modes_alone_run_no_head_of_the_student(teacher_file):
    model = build(teacher_file, logit=dict(kind='dense')).eval()
    model.load_state_dict(model.state_dict())
    calls = []
    model.student.bbox_head.register_forward_hook(
        lambda *args: calls.append(args)
    )
    data = model.data_preprocessor(detection_batch(2), False)
    for mode, times in (('T', 0), ('E0', 0), ('ST', 1), (None, 1)):
        calls.clear()
        model.inference_mode = mode
        with torch.no_grad():
            model(**data, mode='predict')
        assert len(calls) == times, mode


# -- a student of another head ------------------------------------------------


@pytest.fixture
def unlike_pair(tmp_path):
    """RetinaNet with two anchors to GFL, the teacher of some opinion."""
    config = dense_config('RetinaHead', width=16, channels=24)
    file = save_teacher(config, tmp_path / 'teacher.pth')

    def make(**kwargs):
        student = dense_config('GFLHead')
        model = build(file, student=student, teacher=config, **kwargs)
        model.init_weights()
        give_opinions(model.teachers['teacher'].model.bbox_head)
        return model

    return make


@pytest.mark.parametrize('twi_targets', ['teacher', 'both'])
def test_unlike__twi_compares_the_teachers_head_with_itself(
    twi_targets, unlike_pair, said
):
    """One estimate, e_0 of the released form, row by row."""
    model = unlike_pair(
        form='released',
        mbrnet=dict(num_branches=1),
        loss=dict(scales=[0.0]),
        twi_targets=twi_targets,
    ).double()
    # The released form has no such terms on detectors, so none is missed.
    assert said == []
    era = model.distillers['distiller']
    teacher = model.teachers['teacher'].model
    units = SlowUnits(1)
    for seed in (0, 1):
        data = model.data_preprocessor(detection_batch(2, seed=seed), True)
        data['inputs'] = data['inputs'].double()
        with torch.no_grad():
            net = copy.deepcopy(era.mbrnet)
            maps = copy.deepcopy(model.student).extract_feat(data['inputs'])
            outs = [
                teacher.bbox_head(tuple(feats))
                for feats in (
                    net.align(maps),
                    teacher.extract_feat(data['inputs']),
                )
            ]
        found = model(**data, mode='loss')
        pairs = []
        for image in range(2):
            own, theirs = (rows_by_hand(out, image, 3, 4) for out in outs)
            best = sorted(
                range(len(theirs)), key=lambda row: -max(theirs[row][0])
            )
            pairs += [(own[row], theirs[row]) for row in best[:100]]
        assert len(pairs) == 200
        units.rows += [
            ([sigmoid(z) for z in scores], box, sigmoid(max(scores)))
            for _, (scores, box) in pairs
        ]
        halved = 2 if twi_targets == 'both' else 1
        for name, value in zip(
            ('logit', 'box'), slow_terms(pairs, units), strict=True
        ):
            assert value > 1e-2, name
            assert found[f'loss_era_twi_{name}'].item() == pytest.approx(
                value / halved, rel=1e-6
            ), name
            assert reached(found[f'loss_era_twi_{name}'], model) == {
                'backbone',
                'align',
            }
        assert not {'loss_era_logit', 'loss_era_box'} & set(found)
        assert ('loss_era_twi_cls' in found) == (twi_targets == 'both')
        # Extras that no gradient reached would be asked for in the next step.
        model.parse_losses(found)[0].backward()


def test_unlike__an_estimate_that_equals_the_feature_costs_nothing(
    unlike_pair, said
):
    model = unlike_pair(twi_steps='all')
    assert len(said) == 1
    assert said[0].startswith("ERA without a term on the student's own logits")
    assert said[0].endswith('anchors and classes must agree.')
    era = model.distillers['distiller']
    assert era.twi_targets == 'teacher'
    # The student's head runs for its own losses alone.
    assert era.student_sources == era.predict_sources == ('neck',)
    losses = losses_of(model)
    assert {key for key in losses if 'loss_era' in key} == {
        'loss_era_align',
        'loss_era_residual',
        'loss_era_twi_logit',
        'loss_era_twi_box',
    }
    assert set(era.loss_weights()) == {
        'loss_era_align',
        'loss_era_residual',
        'loss_era_twi_*',
    }
    data = model.data_preprocessor(detection_batch(2), True)
    with torch.no_grad():
        feats = model.teachers['teacher'].model.extract_feat(data['inputs'])
        said_of = era.logit.target(era.twi_head, feats, data['data_samples'])
        for change, least, most in ((0.0, 0.0, 1e-5), (0.1, 1e-3, 1e3)):
            (found,) = era.twi_head.judge(
                [[feat + change * torch.randn_like(feat) for feat in feats]],
                data['data_samples'],
                by_labels=False,
                term=era.logit,
                said=said_of,
            )
            assert set(found) == {'logit', 'box'}
            for value in found.values():
                assert least <= value.abs() < most


def test_unlike__units_are_measured_where_twi_is_and_resumed(unlike_pair):
    options = dict(twi_interval=2, twi_steps='all')
    model = unlike_pair(**options)
    term = model.distillers['distiller'].logit
    term.first_batches.number = 2
    seen = []
    for step in range(6):
        MessageHub.get_current_instance().update_info('iter', step)
        losses = losses_of(model, seed=step)
        assert ('loss_era_twi_logit' in losses) == (step % 2 == 0)
        model.parse_losses(losses)[0].backward()
        seen.append(int(term.first_batches.seen))
    assert seen == [1, 1, 2, 2, 2, 2]
    assert term.score_unit.value != 1
    assert (term.box_unit.value != 1).all()
    again = unlike_pair(**options)
    again.load_state_dict(model.state_dict())
    MessageHub.get_current_instance().update_info('iter', 0)
    for one, other in zip(
        again.distillers['distiller'].logit.buffers(),
        term.buffers(),
        strict=True,
    ):
        assert torch.equal(one, other)
    first, second = losses_of(model), losses_of(again)
    for key in ('loss_era_twi_logit', 'loss_era_twi_box'):
        torch.testing.assert_close(first[key], second[key])


def test_unlike__flops_are_of_the_passes_of_the_teachers_head(unlike_pair):
    def passes(**options):
        model = unlike_pair(**options)
        era = model.distillers['distiller']
        with torch.no_grad():
            x = model.data_preprocessor(detection_batch(1), False)['inputs']
            feats = [
                dict(neck=one.extract_feat(x))
                for one in (model.student, model.teachers['teacher'].model)
            ]
        calls = []

        def count(run):
            calls.append(run)
            # The branches first, which are free here.
            return float(len(calls) == 2)

        return era.extra_flops(
            count, student_feats=feats[0], teacher_feats=feats[1]
        )

    # Two for an estimate, one for the teacher's own feature.
    assert passes() == 3
    assert passes(twi_interval=2) == 1.5
    assert passes(twi_targets='labels') == 2
    assert passes(twi_steps='none') == 0


@pytest.mark.parametrize(
    'options', [dict(twi_targets='labels'), dict(twi_steps='none')]
)
def test_unlike__no_term_is_kept_that_nothing_uses(options, unlike_pair):
    model = unlike_pair(**options)
    era = model.distillers['distiller']
    assert era.logit is None
    assert era.uses_predictions == (era.twi_steps != 'none')
    assert not any('logit' in key for key in model.state_dict())


@pytest.mark.parametrize('logit', [dict(), dict(kind='dense')])
def test_unlike__terms_on_the_students_own_head_are_refused(
    logit, unlike_pair
):
    with pytest.raises(ValueError, match=r'must agree\. Remove `logit`'):
        unlike_pair(logit=logit, twi_targets='teacher')


def test_unlike__other_classes_leave_twi(unlike_pair, said):
    model = unlike_pair()
    era = model.distillers['distiller']
    said.clear()
    era.leave_predictions('the classes differ')
    assert len(said) == 1
    assert said[0].startswith('ERA without TWI: the classes differ')
    assert not era.uses_predictions
    losses = losses_of(model)
    assert {key for key in losses if 'loss_era' in key} == {
        'loss_era_align',
        'loss_era_residual',
    }


# -- TWI on the heads ---------------------------------------------------------


@pytest.mark.parametrize('head', HEADS)
def test_twi__loss_is_the_heads_training_loss_with_frozen_norms(
    head, tmp_path
):
    config = detector_config(width=16, channels=24, head=head)
    model = build(
        save_teacher(config, tmp_path / 't.pth'),
        student=detector_config(head=head),
        teacher=config,
    )
    model.load_teachers()
    twi = model.distillers['distiller'].twi_head
    data = model.data_preprocessor(detection_batch(4), True)
    feats = model.teachers['teacher'].model.extract_feat(data['inputs'])
    found = twi.loss(feats, data['data_samples'])

    # A copy trained as mmdet trains it, norms and dropout frozen by hand.
    plain = copy.deepcopy(twi.head).train()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    expected = plain.loss(feats, data['data_samples'])
    assert set(found) == set(expected)
    for key, value in expected.items():
        value = sum(value) if isinstance(value, list) else value
        torch.testing.assert_close(found[key], value)
    assert not any(module.training for module in twi.head.modules())
    # Norms of the head have not learnt from the batch.
    for (name, a), b in zip(
        twi.head.named_buffers(), plain.buffers(), strict=True
    ):
        assert torch.equal(a, b), name


def test_twi__fcos_in_eval_mode_would_be_another_loss(tmp_path):
    # Why the head's own flag is set: FCOS multiplies its distances by the
    # stride when it is off.
    config = detector_config(width=16, channels=24, head='FCOSHead')
    model = build(
        save_teacher(config, tmp_path / 't.pth'),
        student=detector_config(head='FCOSHead'),
        teacher=config,
    )
    model.load_teachers()
    twi = model.distillers['distiller'].twi_head
    data = model.data_preprocessor(detection_batch(4), True)
    feats = model.teachers['teacher'].model.extract_feat(data['inputs'])
    wrong = twi.head.loss(feats, data['data_samples'])['loss_bbox']
    right = twi.loss(feats, data['data_samples'])['loss_bbox']
    assert not torch.isclose(wrong, right)


@pytest.mark.parametrize('head', HEADS)
def test_modes__e_n_of_the_teacher_itself_predicts_as_the_teacher(
    head, tmp_path
):
    # Student = teacher, align = identity, branches off: every mode is the
    # teacher.
    config = detector_config(head=head)
    file = save_teacher(config, tmp_path / 't.pth')
    model = released(file, student=config, teacher=config)
    model.load_teachers()
    teacher = model.teachers['teacher'].model
    model.student.load_state_dict(teacher.state_dict())
    net = model.distillers['distiller'].mbrnet
    for align in net.aligns:
        torch.nn.init.dirac_(align.weight)
        torch.nn.init.zeros_(align.bias)
    for module in net.levels.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.zeros_(module.weight)
    model.eval()
    model.active_modes = ('E0', 'E2', 'T', 'ST')
    data = model.data_preprocessor(detection_batch(), False)
    with torch.no_grad():
        samples = model(**data, mode='predict')
    for mode in model.active_modes:
        for a, b in zip(samples, model.mode_predictions[mode], strict=True):
            assert len(a.pred_instances)
            torch.testing.assert_close(
                a.pred_instances.scores, b.pred_instances.scores
            )
            torch.testing.assert_close(
                a.pred_instances.bboxes,
                b.pred_instances.bboxes,
                rtol=1e-4,
                atol=1e-3,
            )


def test_modes__blend_at_the_ends_is_student_and_t(teacher_file):
    for alpha, expected in ((0.0, 'S'), (1.0, 'T')):
        model = build(teacher_file, alpha=alpha)
        model.eval()
        model.active_modes = ('T', 'ST')
        data = model.data_preprocessor(detection_batch(), False)
        with torch.no_grad():
            own = model(**data, mode='predict')
        found = {'S': own, **model.mode_predictions}
        for a, b in zip(found[expected], found['ST'], strict=True):
            torch.testing.assert_close(
                a.pred_instances.scores, b.pred_instances.scores
            )


@pytest.mark.parametrize('alpha', [0.0, 1.0])
@pytest.mark.parametrize('kind', ['alike', 'unlike', 'two stages'])
def test_modes__blend_at_the_ends_keeps_that_sides_test_cfg(
    kind, alpha, tmp_path
):
    """Other thresholds than the teacher's would give other boxes."""
    student = detector_config()
    teacher = detector_config(width=16, channels=24)
    if kind == 'unlike':
        teacher = detector_config(width=16, channels=24, head='FCOSHead')
    if kind == 'two stages':
        student, teacher = two_stage_config(), two_stage_config(16, 24)
    for config, number, threshold in ((student, 9, 0.6), (teacher, 7, 0.2)):
        test_cfg = config['test_cfg']
        test_cfg.get('rcnn', test_cfg).update(
            score_thr=0.0,
            nms=dict(type='nms', iou_threshold=threshold),
            max_per_img=number,
        )
    file = save_teacher(teacher, tmp_path / 't.pth')
    model = build(file, student=student, teacher=teacher, alpha=alpha).eval()
    model.active_modes = ('T', 'ST')
    with torch.no_grad():
        data = model.data_preprocessor(detection_batch(), False)
        own = model(**data, mode='predict')
    end = model.mode_predictions['T'] if alpha else own
    for one, other in zip(end, model.mode_predictions['ST'], strict=True):
        assert len(one.pred_instances) == (7 if alpha else 9)
        for key in ('bboxes', 'scores', 'labels'):
            assert torch.equal(
                one.pred_instances[key], other.pred_instances[key]
            ), key


def test_modes__blend_of_other_heads_merges_boxes(tmp_path):
    teacher = detector_config(width=16, channels=24, head='FCOSHead')
    file = save_teacher(teacher, tmp_path / 't.pth')
    model = build(file, teacher=teacher)
    model.eval()
    model.active_modes = ('T', 'ST')
    data = model.data_preprocessor(detection_batch(), False)
    with torch.no_grad():
        own = model(**data, mode='predict')
    for s, t, st in zip(
        own,
        model.mode_predictions['T'],
        model.mode_predictions['ST'],
        strict=True,
    ):
        both = {
            round(v, 5)
            for sample in (s, t)
            for v in sample.pred_instances.scores.tolist()
        }
        merged = st.pred_instances.scores.tolist()
        assert len(merged) <= 20
        assert {round(v, 5) for v in merged} <= both
        assert max(merged) == pytest.approx(max(both), abs=1e-5)


def test_modes__inference_mode_returns_that_mode(teacher_file):
    config = distillation_config(
        dict(type='era_mm.ERADistiller'), checkpoint=teacher_file
    )
    config['inference_mode'] = 'T'
    model = MODELS.build(config).eval()
    data = model.data_preprocessor(detection_batch(), False)
    with torch.no_grad():
        predictions = model(**data, mode='predict')
    assert predictions is model.mode_predictions['T']
    config['inference_mode'] = 'S'
    model = MODELS.build(config).eval()
    assert model.inference_mode is None
    config['inference_mode'] = 'TS'
    with pytest.raises(ValueError, match=r"'TS' is not offered.*'ST'"):
        MODELS.build(config)


class Headless(torch.nn.Module):
    """A detector without a head."""


def test_twi_head__that_is_not_there_is_named(said):
    distiller = ERADistiller()
    distiller._find_head(Headless(), Headless())
    assert said[0].startswith(
        "ERA without TWI and terms on the student's own logits: TWI cannot "
        'use the head of Headless'
    )
    assert 'bbox_head' in said[0]
    assert distiller.twi_head is None
    assert distiller.twi_steps == 'none'


@pytest.mark.parametrize('steps', ['all', 'last', 'sampled'])
def test_twi_head__asked_for_by_name_must_be_there(steps):
    distiller = ERADistiller(twi_steps=steps)
    with pytest.raises(ValueError, match="twi_steps='none'"):
        distiller._find_head(Headless(), Headless())


# -- details that a mutation once survived ------------------------------------


def test_loss__logged_distances_hold_no_graph():
    u = torch.ones(1, 1, requires_grad=True)
    losses = ERALoss()(
        aligned=[u],
        residuals=[[u]],
        targets=[[torch.zeros(1, 1)]],
        teacher_feats=[torch.zeros(1, 1)],
    )
    assert losses['loss_era_align'].requires_grad
    assert not any(losses[f'era_mse_e{i}'].requires_grad for i in range(2))


def test_mbrnet__shared_levels_use_their_own_norm():
    net = MBRNet(2, 2, num_levels=2, num_branches=1, share_levels=True).train()
    feats = [torch.randn(4, 2, 8, 8), 100 + torch.randn(4, 2, 4, 4)]
    net(feats)
    branch = net.levels[0][0]
    for norm, feat in zip(branch.norms[0], feats, strict=True):
        mean = branch.layers[0](feat).mean((0, 2, 3))
        torch.testing.assert_close(norm.running_mean, 0.01 * mean)


@pytest.mark.parametrize('dims', [0, 2])
def test_mbrnet__init_weights_is_the_released_one(dims):
    net = MBRNet(64, 256, spatial_dims=dims)
    net.init_weights()
    for branch in net.levels[0]:
        layer, projection = branch.layers[0], branch.projection
        if dims == 0:
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)
            assert projection.weight.std().item() == pytest.approx(
                0.01, rel=0.1
            )
            assert not layer.bias.any()
        else:
            assert layer.weight.std().item() == pytest.approx(
                (2 / (64 * 9)) ** 0.5, rel=0.1
            )
            assert projection.weight.std().item() == pytest.approx(
                (2 / 256) ** 0.5, rel=0.1
            )
        assert not projection.bias.any()


@pytest.mark.parametrize('head', ['RetinaHead', 'FCOSHead'])
def test_modes__boxes_are_in_the_original_images_pixels(head, tmp_path):
    teacher = detector_config(width=16, channels=24, head=head)
    model = build(
        save_teacher(teacher, tmp_path / 't.pth'), teacher=teacher
    ).eval()
    model.active_modes = ('T', 'ST')
    found = []
    for factor in (1.0, 2.0):
        batch = detection_batch()
        for sample in batch['data_samples']:
            sample.set_metainfo(dict(scale_factor=(factor, factor)))
        with torch.no_grad():
            own = model(
                **model.data_preprocessor(batch, False), mode='predict'
            )
        found.append({'S': own, **model.mode_predictions})
    for mode in ('S', 'T', 'ST'):
        for a, b in zip(found[0][mode], found[1][mode], strict=True):
            assert len(a.pred_instances)
            torch.testing.assert_close(
                a.pred_instances.bboxes, 2 * b.pred_instances.bboxes
            )


def test_twi__counting_losses_leave_the_teachers_buffers(tmp_path):
    # GHM counts examples per bin in a buffer of the head.
    config = detector_config(width=16, channels=24)
    config['bbox_head'] |= dict(
        loss_cls=dict(type='GHMC', bins=5, momentum=0.75)
    )
    file = save_teacher(config, tmp_path / 't.pth')
    model = released(file, teacher=config)
    model.load_teachers()
    teacher = model.teachers['teacher']
    total, _ = model.parse_losses(losses_of(model))
    total.backward()
    assert teacher.fingerprint() == teacher.loaded_fingerprint


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(loss=dict(scales=[])), 'one value or one per branch'),
        (dict(loss=dict(scales=[1.0, 1.0, 1.0, -1.0])), 'negative'),
    ],
)
def test_pair__that_does_not_fit_is_refused_when_built(change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)


@pytest.mark.parametrize('form', ['auto', 'released'])
@pytest.mark.parametrize(
    ('source', 'message'),
    [
        # The head reads 24 channels, and the backbone gives 32 and 64.
        ('backbone', 'expected input.* to have 24 channels'),
        ('neck.fpn_convs.0', 'priors for 2 levels, but got 1'),
    ],
)
def test_source__that_the_head_cannot_judge_leaves_twi(
    source, message, form, said
):
    model = build(source=source, form=form)
    assert len(said) == 1
    assert re.search(
        "ERA without TWI( and terms on the student's own logits)?: "
        'the teacher.s head .RetinaHead. cannot judge the '
        f"source '{source}': .*{message}",
        said[0],
    )
    losses = losses_of(model)
    assert {key for key in losses if 'loss_era' in key} == {
        'loss_era_align',
        'loss_era_residual',
    }
    assert model.distillers['distiller'].inference_modes() == ()
    # It is a sentence of its own where it was asked for.
    for asked in (dict(twi_steps='all'), dict(logit=dict())):
        with pytest.raises(ValueError, match=message) as error:
            build(source=source, form=form, **asked)
        assert str(error.value).startswith("The teacher's head (RetinaHead)")
        assert "usually 'neck'" in str(error.value)
    assert len(said) == 1


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(scales=[0.5, 0.5]), 'level 0 resized by 0.5'),
        (dict(scales=[2.0, 2.0]), 'level 0 resized by 2'),
        # At a stride of 16 it would have the anchors of 8.
        (dict(levels=[1, 0]), r'outputs \[1, 0\]'),
    ],
    ids=['smaller', 'larger', 'reordered'],
)
def test_source__that_is_resampled_for_the_teacher_leaves_twi(
    changes, message, said
):
    source = dict(
        student='neck',
        teacher='neck',
        resample=dict(student=changes, teacher=changes),
    )
    model = build(source=source)
    assert len(said) == 1
    assert re.search(
        "ERA without TWI and terms on the student's own logits: .*"
        f'as its neck gives them, .*{message}',
        said[0],
    )
    losses = losses_of(model)
    assert {key for key in losses if 'loss_era' in key} == {
        'loss_era_align',
        'loss_era_residual',
    }
    assert model.distillers['distiller'].inference_modes() == ()
    for asked in (dict(twi_steps='all'), dict(logit=dict())):
        with pytest.raises(ValueError, match=message):
            build(source=source, **asked)
    # All levels, as they are.
    source['resample'] = dict(teacher=dict(levels=[0, 1], scales=[1, 1.0]))
    assert (
        'T' in build(source=source).distillers['distiller'].inference_modes()
    )


def test_pair__teacher_without_train_cfg_judges_nothing(said):
    teacher = detector_config(width=16, channels=24, train_cfg=None)
    model = build(teacher=teacher)
    assert len(said) == 1
    assert 'ERA without TWI' in said[0]
    assert 'no `train_cfg`, so it cannot assign targets' in said[0]
    assert not any('twi' in key for key in losses_of(model))
    with pytest.raises(ValueError, match='no `train_cfg`'):
        build(teacher=teacher, twi_steps='all')
    model = build(teacher=teacher, twi_steps='none')
    # It can predict, and score.
    assert 'T' in model.distillers['distiller'].inference_modes()
    assert 'loss_era_logit' in losses_of(model)
    assert len(said) == 1


def test_sampled__draws_by_the_global_step():
    model = released(twi_steps='sampled')
    model.load_teachers()
    model.eval()

    def draw(step):
        MessageHub.get_current_instance().update_info('iter', step)
        return losses_of(model)['loss_era_twi_cls'].item()

    values = [draw(step) for step in range(8)]
    assert len(set(values)) > 1
    assert [draw(step) for step in range(8)] == values
    # Another seed of the run, another sequence.
    MessageHub.get_current_instance().update_info('era_mm_seed', 1)
    assert [draw(step) for step in range(8)] != values
