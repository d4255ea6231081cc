"""SoKD's parts: the dossier's numbers, slow references, what may not learn."""

import functools
import math

import pytest
import torch
from mmdet.models.utils import gaussian_radius
from torch import nn

from era_mm.methods.sokd import (
    DAFA,
    DAM,
    FEATURE_OPS,
    AreaDecoder,
    DAMHead,
    FeatureOp,
    Prediction,
    agreement_loss,
    area_loss,
    attention_targets,
    box_targets,
    consistency_loss,
    straight_through,
    unrolled_gradients,
)
from era_mm.methods.sokd.areas import Targets, find_peaks, spatial_attention
from era_mm.methods.sokd.ops import build_op
from era_mm.testing import noise as double_noise

OPS = [
    'ChannelMask',
    'SpatialMask',
    'BlockMask',
    'GaussianNoise',
    'ChannelScale',
    'SpatialSmooth',
    'SampleMix',
]


@FEATURE_OPS.register_module()
class ToZero(FeatureOp):
    """F' = 0."""

    def apply(self, feat, magnitude, generator):
        return feat * 0


noise = functools.partial(double_noise, dtype=torch.float32)


def run_op(name, feat, magnitude, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return build_op(name)(feat, torch.as_tensor(magnitude), generator)


# -- operations ------------------------------------------------------------


def test_operation__without_apply_is_refused_when_built():
    class Hollow(FeatureOp):
        """Forgets it."""

    with pytest.raises(TypeError, match='apply'):
        Hollow()


@pytest.mark.parametrize('name', ['Identity', *OPS])
def test_op__keeps_shape_and_does_nothing_at_magnitude_0(name):
    for shape in ((2, 8, 5, 4), (1, 3, 1, 1)):
        feat = noise(*shape)
        assert torch.equal(run_op(name, feat, 0.0), feat)
        other = run_op(name, feat, 0.5)
        assert other.shape == feat.shape
        assert other.isfinite().all()
    feat = noise(4, 8, 5, 4)
    if name != 'Identity':
        assert not torch.equal(run_op(name, feat, 0.5), feat)
    first, again = (run_op(name, feat, 0.5, seed=1) for _ in range(2))
    assert torch.equal(first, again)


def test_channel_mask__drops_the_share_and_scales_the_rest():
    # m = .3 of 10 channels: 3 dropped, the others times 10 / 7.
    out = run_op('ChannelMask', torch.ones(6, 10, 2, 3), 0.3)
    dropped = (out == 0).flatten(2).all(dim=2)
    assert dropped.sum(1).tolist() == [3] * 6
    assert out.unique().tolist() == pytest.approx([0, 10 / 7])
    assert len({tuple(row) for row in dropped.tolist()}) > 1


def test_spatial_mask__drops_the_share_of_positions_for_all_channels():
    # m = .25 of 4 * 5 positions: 5.
    out = run_op('SpatialMask', torch.ones(6, 3, 4, 5), 0.25)
    dropped = out == 0
    assert dropped.sum((2, 3)).tolist() == [[5] * 3] * 6
    assert torch.equal(dropped[:, 0], dropped[:, 2])
    assert out.max() == 1


def test_block_mask__is_one_rectangle_inside_the_map():
    # sqrt(.25) = .5 of 6 rows and 4 columns: 3 x 2.
    places = set()
    for seed in range(20):
        out = run_op('BlockMask', torch.ones(2, 3, 6, 4), 0.25, seed=seed)
        for sample in out[:, 0]:
            rows, columns = (sample == 0).nonzero(as_tuple=True)
            assert len(rows) == 6
            assert rows.max() - rows.min() == 2
            assert columns.max() - columns.min() == 1
            places.add((rows.min().item(), columns.min().item()))
    # Every one of the (6 - 3 + 1) * (4 - 2 + 1) places.
    assert len(places) == 12


def test_gaussian_noise__is_of_the_samples_own_size():
    feat = torch.cat([noise(1, 16, 20, 20), 10 * noise(1, 16, 20, 20, seed=1)])
    added = run_op('GaussianNoise', feat, 0.4) - feat
    ratio = added.std((1, 2, 3)) / feat.std((1, 2, 3))
    assert ratio.tolist() == pytest.approx([0.4, 0.4], rel=0.03)


def test_channel_scale__is_one_factor_per_channel_within_the_range():
    factors = run_op('ChannelScale', torch.ones(8, 50, 2, 2), 0.5)
    assert torch.equal(factors[:, :, 0, 0], factors[:, :, 1, 1])
    assert 0.5 <= factors.min() < 0.55
    assert 1.45 < factors.max() <= 1.5


def test_spatial_smooth__by_hand():
    # 3x3 means of a 2x2 map are all the mean of its four numbers, 3.
    # m = .5: halfway from each number to 3.
    feat = torch.tensor([[[[0.0, 2.0], [4.0, 6.0]]]])
    assert run_op('SpatialSmooth', feat, 0.5).tolist() == [
        [[[1.5, 2.5], [3.5, 4.5]]]
    ]


def test_sample_mix__blends_with_a_permutation():
    feat = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(3, generator=generator)
    assert not torch.equal(order, torch.arange(3))
    out = run_op('SampleMix', feat, 0.25)
    torch.testing.assert_close(out, 0.75 * feat + 0.25 * feat[order])


def test_straight_through__value_of_the_op_and_gradient_1_per_number():
    # y = op(x), L = sum(y) of 12 numbers: dL/dm = 12; dL/dx as of op alone.
    feat = noise(1, 3, 2, 2).requires_grad_()
    magnitude = torch.tensor(0.3, requires_grad=True)
    value = feat * 2
    out = straight_through(value, magnitude)
    assert torch.equal(out, value)
    out.sum().backward()
    assert magnitude.grad.item() == 12
    assert torch.equal(feat.grad, torch.full_like(feat, 2))


@pytest.mark.parametrize('name', ['ChannelMask', 'SpatialMask', 'BlockMask'])
def test_mask__has_the_straight_through_gradient(name):
    magnitude = torch.tensor(0.5, requires_grad=True)
    feat = noise(2, 4, 4, 4)
    out = build_op(name)(feat, magnitude, torch.Generator().manual_seed(0))
    assert torch.equal(out.detach(), run_op(name, feat, 0.5))
    (3 * out).sum().backward()
    assert magnitude.grad.item() == 3 * feat.numel()


@pytest.mark.parametrize(
    'name', ['GaussianNoise', 'ChannelScale', 'SpatialSmooth', 'SampleMix']
)
def test_op__has_its_own_gradient(name):
    feat = noise(2, 4, 3, 3).double()
    magnitude = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def energy(value):
        generator = torch.Generator().manual_seed(0)
        return build_op(name)(feat, value, generator).square().sum()

    assert torch.autograd.gradcheck(energy, magnitude)


def test_op__unknown_is_refused():
    with pytest.raises(ValueError, match=r"'Masking'.*'BlockMask'"):
        DAFA(ops=['Identity', 'Masking'])


# -- DAFA ------------------------------------------------------------------


def test_mixture__the_dossiers_numbers():
    """softmax([0, ln 3]) = [.25, .75] of F and of 0.

    F_t = [4, 8]: .25 * F_t = [1, 2]. F_s = [1, 1]: the error is [0, 1],
    L_aug = .5 as a sum, .25 as a mean. dL/dw = <error, s(F)> = [8, 0];
    dw_0/dalpha_0 = .25 * .75 = .1875, so dL/dalpha = [1.5, -1.5].
    """
    policy = DAFA(
        ops=['Identity', 'ToZero'],
        ops_per_policy=1,
        mixture='softmax',
        init=(0.0, 1.0, 0.5),
    )
    assert policy.names == ['Identity', 'ToZero']
    with torch.no_grad():
        policy.alpha.copy_(torch.tensor([0.0, math.log(3)]))
    (out,) = policy([torch.tensor([[4.0, 8.0]])], seed=0)
    assert out[0].tolist() == pytest.approx([1, 2])
    student = torch.ones(1, 2)
    mean = consistency_loss(student_feat=student, refined_feat=out)
    total = consistency_loss(
        student_feat=student, refined_feat=out, reduction='sum'
    )
    assert mean.item() == pytest.approx(0.25)
    assert total.item() == pytest.approx(0.5)
    (gradient,) = torch.autograd.grad(total, policy.alpha)
    assert gradient.tolist() == pytest.approx([1.5, -1.5])


@pytest.mark.parametrize('mixture', ['sample', 'softmax'])
@pytest.mark.parametrize('grad', [True, False])
def test_dafa__without_application_or_other_ops_is_exact(mixture, grad):
    feats = [noise(3, 8, 5, 4), noise(3, 8).to(torch.bfloat16)]
    for options in (dict(init=(0.0, 0.0, 0.5)), dict(ops=['Identity'])):
        policy = DAFA(mixture=mixture, **options)
        with torch.set_grad_enabled(grad):
            for seed in range(5):
                out = policy(feats, seed)
                assert all(map(torch.equal, out, feats))
                assert out[1].dtype == torch.bfloat16
    assert policy.is_identity
    assert not DAFA().is_identity


def test_sample__weights_are_one_hot_and_have_a_gradient():
    policy = DAFA()
    with torch.no_grad():
        policy.alpha.copy_(noise(len(policy.alpha)))
    draw = policy.draw(7)
    assert draw.weights.sum() == 1
    assert draw.weights.max() == 1
    assert draw.weights[draw.chosen] == 1
    assert set(draw.gates.flatten().tolist()) == {0.0, 1.0}
    again = policy.draw(7)
    assert torch.equal(again.weights, draw.weights)
    assert torch.equal(again.gates, draw.gates)
    assert len({policy.draw(seed).chosen for seed in range(30)}) > 5
    target = noise(len(policy.alpha), seed=1)
    gradient = torch.autograd.grad(draw.weights @ target, policy.alpha)[0]
    # That of the relaxed choice: w * (c - <w, c>) / temperature.
    noise_of = torch.rand(
        len(policy.alpha), 3, generator=torch.Generator().manual_seed(7)
    )[:, 0]
    gumbel = -(-noise_of.log()).log()
    soft = ((policy.alpha.detach() + gumbel) / 0.5).softmax(0)
    expected = soft * (target - soft @ target) / 0.5
    torch.testing.assert_close(gradient, expected)
    relaxed = DAFA(hard=False).draw(7)
    assert relaxed.chosen is None
    assert 0 < relaxed.weights.max() < 1


def test_sample__frequencies_are_the_policys():
    policy = DAFA(ops=['Identity', 'ToZero', 'SampleMix'], ops_per_policy=1)
    with torch.no_grad():
        policy.alpha.copy_(torch.tensor([0.1, 0.6, 0.3]).log())
        policy.beta.copy_(torch.tensor([[0.2], [0.9], [0.5]]))
    draws = [policy.draw(seed) for seed in range(4000)]
    chosen = torch.tensor([draw.chosen for draw in draws])
    # Of 4000 draws the deviation is at most .008.
    for index, share in enumerate((0.1, 0.6, 0.3)):
        found = (chosen == index).float().mean().item()
        assert found == pytest.approx(share, abs=0.03)
    gates = torch.stack([draw.gates for draw in draws]).mean(0)
    assert gates[:, 0].tolist() == pytest.approx([0.2, 0.9, 0.5], abs=0.03)


def test_gate__has_a_gradient_in_its_range_and_at_its_ends():
    policy = DAFA(ops=['SampleMix'], ops_per_policy=1)
    for value in (0.0, 0.5, 1.0):
        with torch.no_grad():
            policy.beta.fill_(value)
        (gradient,) = torch.autograd.grad(
            policy.draw(3).gates.sum(), policy.beta
        )
        assert gradient.item() > 0


def test_gate__is_relaxed_bernoulli_by_hand():
    """b = sigmoid((logit(beta) + logit(u)) / T), T = .5, beta = .3.

    Forward 1 where u > 1 - beta, else 0; db/dbeta = b (1 - b) / T / (beta
    (1 - beta)).
    """
    policy = DAFA(
        ops=['SampleMix', 'ToZero'],
        ops_per_policy=1,
        mixture='softmax',
        init=(0.0, 0.3, 0.5),
    )
    drawn = torch.rand(2, 2, generator=torch.Generator().manual_seed(4))
    u = drawn[:, 1:].double()
    soft = ((math.log(0.3 / 0.7) + u.logit()) / 0.5).sigmoid()
    draw = policy.draw(4)
    assert torch.equal(draw.gates, (u > 0.7).float())
    (slope,) = torch.autograd.grad(draw.gates.sum(), policy.beta)
    expected = soft * (1 - soft) / 0.5 / (0.3 * 0.7)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=1e-6)
    relaxed = DAFA(
        ops=['SampleMix', 'ToZero'],
        ops_per_policy=1,
        hard=False,
        init=(0.0, 0.3, 0.5),
    ).draw(4)
    torch.testing.assert_close(
        relaxed.gates.double(), soft, rtol=1e-4, atol=1e-6
    )


def test_gate__is_between_the_operation_and_nothing():
    """out = b * 0 + (1 - b) * F: d sum(out) / db = -sum(F) = -12."""
    policy = DAFA(ops=['ToZero'], ops_per_policy=1)
    for seed in range(4):
        (out,) = policy([torch.tensor([[4.0, 8.0]])], seed)
        (found,) = torch.autograd.grad(out.sum(), policy.beta)
        (slope,) = torch.autograd.grad(policy.draw(seed).gates, policy.beta)
        assert found.item() == pytest.approx(-12 * slope.item())


def test_sub_policies__are_all_pairs_and_the_identity():
    policy = DAFA()
    # 8 operations: 28 pairs, and the identity alone.
    assert len(policy.names) == 29
    assert len(set(policy.names)) == 29
    assert policy.names[0] == 'Identity'
    assert policy.alpha.shape == (29,)
    assert policy.beta.shape == policy.magnitude.shape == (29, 2)
    assert len(DAFA(ops=['SampleMix', 'ChannelMask']).names) == 1
    values = {p[0].item() for p in (policy.beta.view(-1),)}
    assert values == {0.5}
    assert policy.alpha[0].item() == pytest.approx(1e-3)


def test_chain__applies_operations_in_their_order():
    policy = DAFA(ops=['SpatialSmooth', 'ToZero'], init=(0.0, 1.0, 0.5))
    feat = noise(1, 2, 4, 4)
    (out,) = policy([feat], 0)
    assert out.abs().max() == 0
    with torch.no_grad():
        policy.beta[0, 1] = 0
        (out,) = policy([feat], 0)
    torch.testing.assert_close(out, run_op('SpatialSmooth', feat, 0.5))


def test_sample__computes_the_same_with_and_without_gradient():
    policy = DAFA(ops=['Identity', 'SpatialSmooth', 'ToZero'])
    feats = [noise(2, 4, 5, 5), noise(2, 4, 3, 3)]
    for seed in range(8):
        with torch.no_grad():
            alone = policy(feats, seed)
        for a, b in zip(alone, policy(feats, seed), strict=True):
            torch.testing.assert_close(a, b)


def test_levels__share_the_choice_and_not_the_noise():
    policy = DAFA(ops=['GaussianNoise'], ops_per_policy=1, init=(0, 1.0, 0.5))
    feat = noise(2, 4, 5, 5)
    first, second = policy([feat, feat], 0)
    assert not torch.equal(first, second)
    policy = DAFA(ops=['Identity', 'ToZero'], ops_per_policy=1)
    for seed in range(10):
        first, second = policy([feat, feat], seed)
        assert torch.equal(first, second)


def test_operations__draw_numbers_of_their_own():
    """Neither those of the choice nor those of the next step's levels."""
    policy = DAFA(ops=['ChannelMask'], ops_per_policy=1, init=(0, 1.0, 0.5))
    feat = torch.ones(4, 32, 2, 2)
    for seed in range(3):
        first, second = policy([feat, feat], seed)
        # From the generator that choice and gates are drawn from.
        assert not torch.equal(first, run_op('ChannelMask', feat, 0.5, seed))
        assert not torch.equal(second, policy([feat], seed + 1)[0])
        assert torch.equal(first, policy([feat], seed)[0])


def test_project__keeps_the_ranges():
    policy = DAFA(max_magnitude=0.8)
    with torch.no_grad():
        policy.beta.fill_(1.2)
        policy.magnitude.fill_(-0.1)
        policy.magnitude[0] = 2
    policy.project()
    assert policy.beta.unique().tolist() == [1]
    assert policy.magnitude.unique().tolist() == pytest.approx([0, 0.8])


def test_usage__by_hand():
    # Sub-policies I, I+S, I+M, S+M with the probabilities .1, .2, .3, .4.
    policy = DAFA(ops=['Identity', 'SpatialSmooth', 'SampleMix'])
    assert policy.names == [
        'Identity',
        'SpatialSmooth',
        'SampleMix',
        'SpatialSmooth+SampleMix',
    ]
    with torch.no_grad():
        policy.alpha.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
        policy.beta.copy_(
            torch.tensor([[1.0, 1], [1, 0.5], [1, 1], [0.25, 0]])
        )
        policy.magnitude.copy_(
            torch.tensor([[0.0, 0], [0, 0.6], [0, 0.2], [0.3, 0.9]])
        )
    usage = policy.usage()
    # S: .2 * .5 + .4 * .25 = .2, m = (.1 * .6 + .1 * .3) / .2 = .45
    # M: .3 * 1 + 0 = .3, m = .2
    assert usage['SpatialSmooth'] == pytest.approx((0.2, 0.45))
    assert usage['SampleMix'] == pytest.approx((0.3, 0.2))
    summary = policy.summary()
    # Without identities: weights .2, .3, .4, .4 of beta .5, 1, .25, 0.
    assert summary['gate'].item() == pytest.approx(0.5 / 1.3)
    assert summary['magnitude'].item() == pytest.approx(0.66 / 1.3)
    entropy = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4))
    assert summary['entropy'].item() == pytest.approx(entropy)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(mixture='hard'), r"'sample', 'softmax'.*got 'hard'"),
        (dict(temperature=0), 'above 0'),
        (dict(init=(0, 2, 0.5)), '0 <= beta <= 1'),
        (dict(max_magnitude=1.0), 'max_magnitude < 1'),
        (dict(ops=['SampleMix']), 'too few for sub-policies of 2'),
    ],
)
def test_dafa__refuses(options, message):
    with pytest.raises(ValueError, match=message):
        DAFA(**options)


def test_unrolled__closed_form():
    """theta one number, lower = k/2 (theta - c)^2, upper = 1/2 (theta - t)^2.

    theta' = theta - lr k (theta - c); d upper / dc = (theta' - t) lr k.
    theta = 3, c = 1, k = 2, lr = .1, t = .5: theta' = 2.6, 2.1 * .2 = .42.
    With c^2 added to upper: 2 more.
    """
    c = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    loss, (gradient,) = unrolled_gradients(
        upper=lambda w: (w['t'] - 0.5).square() / 2 + c.square(),
        lower=lambda w: (w['t'] - c).square(),
        weights={'t': torch.tensor(3.0, dtype=torch.float64)},
        policy=[c],
        lr=0.1,
    )
    assert loss.item() == pytest.approx(2.1**2 / 2 + 1)
    assert gradient.item() == pytest.approx(2.42)


def test_unrolled__without_a_way_through_the_weights_is_first_order():
    c = torch.tensor(1.0, requires_grad=True)
    _, (gradient,) = unrolled_gradients(
        upper=lambda w: c.square() + 0 * w['t'],
        lower=lambda w: (w['t'] - 1).square(),
        weights={'t': torch.tensor(3.0)},
        policy=[c],
        lr=0.1,
    )
    assert gradient.item() == 2


# -- heads and losses ------------------------------------------------------


def test_head__is_shared_and_starts_with_few_centres():
    head = DAMHead(6, 8)
    names = [name for name, _ in head.named_parameters()]
    assert len(names) == len(set(names)) == 12
    feat = noise(2, 6, 5, 4)
    found = head(feat)
    assert [tuple(v.shape) for v in found] == [
        (2, 1, 5, 4),
        (2, 2, 5, 4),
        (2, 2, 5, 4),
    ]
    assert agreement_loss(student=found, teacher=head(feat.clone())) == 0
    # sigmoid(-ln 9) = 1 / 10
    assert head.heatmap[-1].bias.sigmoid().item() == pytest.approx(0.1)
    dam = DAM([6, 6, 6])
    assert len(dam.predictors) == 1
    assert len(DAM([6, 8]).predictors) == 2


def test_agreement__by_hand():
    # Heat map: 2^2 = 4. Size: mean of 1 and 9 = 5. Offset: mean of 0 and 1.
    def of(heat, size, offset):
        shape = (1, -1, 1, 1)
        return Prediction(
            *(torch.tensor(v).view(shape) for v in (heat, size, offset))
        )

    loss = agreement_loss(
        student=of([1.0], [0.0, 4.0], [1.0, 0.0]),
        teacher=of([3.0], [1.0, 1.0], [1.0, 1.0]),
    )
    assert loss.item() == 4 + 5 + 0.5


S = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
T = torch.tensor([[[[0.0, 2.0], [5.0, 1.0]]]])


def test_area_loss__the_dossiers_numbers():
    # Bottom row: (3 - 5)^2 + (4 - 1)^2 = 13. All: 1 + 0 + 4 + 9 = 14.
    bottom = torch.tensor([[[[0.0, 0.0], [1.0, 1.0]]]])
    whole = torch.ones(1, 1, 2, 2)
    for masks, total, mean in (
        (bottom, 13, 6.5),
        (whole, 14, 3.5),
        # What two areas cover counts twice.
        (torch.cat([bottom, whole], 1), 27, 27 / 6),
    ):
        for reduction, expected in (('sum', total), ('mean', mean)):
            loss = area_loss(
                student_feat=S,
                teacher_feat=T,
                masks=masks,
                reduction=reduction,
            )
            assert loss.item() == pytest.approx(expected)


def test_area_loss__of_a_batch_and_of_no_area():
    masks = torch.zeros(2, 3, 2, 2)
    masks[0, 1] = 1
    feats = dict(
        student_feat=torch.cat([S, 5 * S]), teacher_feat=torch.cat([T, S])
    )
    # The second sample has no area: 14 over 2 samples; 14 over 4 cells.
    for reduction, expected in (('sum', 7.0), ('mean', 3.5)):
        loss = area_loss(**feats, masks=masks, reduction=reduction)
        assert loss.item() == expected
        student = S.clone().requires_grad_()
        loss = area_loss(
            student_feat=student,
            teacher_feat=T,
            masks=torch.zeros(1, 3, 2, 2),
            reduction=reduction,
        )
        loss.backward()
        assert loss == 0
        assert torch.equal(student.grad, torch.zeros_like(S))


# -- areas -----------------------------------------------------------------


def predicted(height, width, peaks, size=(0.0, 0.0), offset=(0.0, 0.0)):
    """Logits of -20, and of ``peaks`` {(y, x): logit}."""
    heat = torch.full((1, 1, height, width), -20.0)
    for (y, x), logit in peaks.items():
        heat[0, 0, y, x] = logit

    def everywhere(pair):
        return (
            torch.tensor(pair)
            .view(1, 2, 1, 1)
            .repeat(1, 1, height, width)
            .requires_grad_()
        )

    return Prediction(
        heat.requires_grad_(), everywhere(size), everywhere(offset)
    )


def cells(mask):
    return sorted(map(tuple, mask.nonzero().tolist()))


def test_decoder__one_peak_covers_its_half_open_box():
    """Centre (x, y) = (3, 2), size (2, 2): [2, 4) x [1, 3).

    Cells whose middle (x + .5, y + .5) is inside: columns 2 and 3, rows 1
    and 2.
    """
    found = predicted(6, 6, {(2, 3): 5.0}, size=(2.0, 2.0))
    areas = AreaDecoder(topk=1)(student=found, teacher=found)
    assert areas.boxes[0, 0].tolist() == [2, 1, 4, 3]
    assert areas.scores.item() == pytest.approx(1 / (1 + math.exp(-5)) ** 2)
    assert cells(areas.masks[0, 0]) == [(1, 2), (1, 3), (2, 2), (2, 3)]


def test_decoder__offset_size_and_sides():
    # Centre (3.5, 2.5), size (3, 1): [2, 5) x [2, 3).
    found = predicted(6, 6, {(2, 3): 5.0}, (3.0, 1.0), (0.5, 0.5))
    areas = AreaDecoder(topk=1)(student=found, teacher=found)
    assert areas.boxes[0, 0].tolist() == [2, 2, 5, 3]
    assert cells(areas.masks[0, 0]) == [(2, 2), (2, 3), (2, 4)]
    # An area is one cell at least.
    found = predicted(6, 6, {(2, 3): 5.0}, (-4.0, 0.0), (0.5, 0.5))
    areas = AreaDecoder(topk=1)(student=found, teacher=found)
    assert cells(areas.masks[0, 0]) == [(2, 3)]
    # The mean of both sides' sizes; either side alone on demand.
    other = predicted(6, 6, {(2, 3): 5.0}, (3.0, 3.0), (0.5, 0.5))
    for combine, count in (('product', 4), ('teacher', 9), ('student', 1)):
        areas = AreaDecoder(topk=1, combine=combine)(
            student=found, teacher=other
        )
        assert len(cells(areas.masks[0, 0])) == {4: 1}.get(count, count)


def test_decoder__finds_the_highest_peaks_that_both_see():
    student = predicted(8, 8, {(1, 1): 3.0, (6, 6): 1.0, (1, 6): 2.0})
    teacher = predicted(8, 8, {(1, 1): 0.0, (6, 6): 3.0, (1, 6): -20.0})

    def found(combine, topk=2):
        scores, index = (lambda a: (a.scores[0].tolist(), a.boxes[0]))(
            AreaDecoder(topk=topk, combine=combine)(
                student=student, teacher=teacher
            )
        )
        return scores, [tuple(b[:2].tolist()) for b in index]

    # sigmoid(1) * sigmoid(3) = .70, sigmoid(3) * sigmoid(0) = .48
    scores, corners = found('product')
    assert scores == pytest.approx([0.6964, 0.4763], abs=1e-4)
    assert corners == [(5.5, 5.5), (0.5, 0.5)]
    assert found('student')[1] == [(0.5, 0.5), (5.5, 0.5)]
    assert found('teacher')[1] == [(5.5, 5.5), (0.5, 0.5)]


def test_peaks__neighbours_do_not_count_and_never_more_than_asked():
    heat = torch.zeros(1, 1, 5, 5)
    heat[0, 0, 2, 2], heat[0, 0, 2, 3], heat[0, 0, 0, 4] = 1.0, 0.9, 0.5
    scores, index = find_peaks(heat, 3)
    assert scores[0].tolist() == [1.0, 0.5, 0.0]
    assert index[0, :2].tolist() == [12, 4]
    assert find_peaks(heat, 100)[0].shape == (1, 25)
    # No score at all, but boxes that would cover the map.
    flat = Prediction(
        torch.full((1, 1, 3, 3), -200.0),
        torch.full((1, 2, 3, 3), 3.0),
        torch.zeros(1, 2, 3, 3),
    )
    areas = AreaDecoder(topk=3)(student=flat, teacher=flat)
    assert areas.masks.shape == (1, 3, 3, 3)
    assert areas.masks.sum() == 0


def test_masks__end_at_the_border_and_are_constants():
    found = predicted(4, 5, {(0, 4): 5.0}, size=(6.0, 4.0))
    areas = AreaDecoder(topk=1)(student=found, teacher=found)
    # [1, 7) x [-2, 2) on a map of 5 x 4 cells.
    assert cells(areas.masks[0, 0]) == [
        (y, x) for y in (0, 1) for x in (1, 2, 3, 4)
    ]
    assert not areas.masks.requires_grad
    assert not areas.boxes.requires_grad


def test_soft_masks__have_a_gradient_and_become_hard():
    found = predicted(6, 6, {(2, 3): 5.0}, size=(2.0, 2.0))
    soft = AreaDecoder(topk=1, soft=True)(student=found, teacher=found)
    # Middle of cell (2, 3): .5 from the right side, 1.5 from the left.
    side = [1 / (1 + math.exp(-4 * d)) for d in (0.5, 1.5)]
    assert soft.masks[0, 0, 2, 3].item() == pytest.approx(
        (side[0] * side[1]) ** 2, rel=1e-4
    )
    soft.masks.sum().backward()
    assert found.size.grad[0, :, 2, 3].min() > 0
    sharp = AreaDecoder(topk=1, soft=True, sharpness=100.0)
    hard = AreaDecoder(topk=1)
    torch.testing.assert_close(
        sharp(student=found, teacher=found).masks,
        hard(student=found, teacher=found).masks,
    )


def test_attention__is_energy_from_0_to_1():
    # Energies per position: (9 + 1) / 2 = 5, (0 + 4) / 2 = 2, 0, (1 + 1) / 2.
    feat = torch.tensor([[[[3.0, 0.0, 0.0, 1.0]], [[1.0, 2.0, 0.0, -1.0]]]])
    found = spatial_attention(feat)
    assert found[0, 0, 0].tolist() == pytest.approx([1, 0.4, 0, 0.2])
    assert spatial_attention(torch.ones(1, 2, 3, 3)).abs().max() == 0


def test_attention_targets__by_hand():
    """A ridge in row 1; its highest cell is column 2.

    Row 1: 0 .6 1 .55 .2: at least half are columns 1 to 3, width 3.
    Column 2: 0 1 .4 0: height 1. The second peak is (3, 4) with .3: its row
    has nothing else of .15, its column ends at (2, 4) with 0.
    """
    energy = torch.zeros(4, 5)
    energy[1] = torch.tensor([0, 0.6, 1, 0.55, 0.2])
    energy[2, 2] = 0.4
    energy[3, 4] = 0.3
    targets = attention_targets(energy.sqrt()[None, None], topk=2)
    torch.testing.assert_close(targets.heatmap[0, 0], energy)
    assert cells(targets.weight[0, 0]) == [(1, 2), (3, 4)]
    assert targets.size[0, :, 1, 2].tolist() == [3, 1]
    assert targets.size[0, :, 3, 4].tolist() == [1, 1]
    assert targets.size.sum() == 6
    assert targets.offset.unique().tolist() == [0.5]


def test_box_targets__by_hand():
    """An image of 64 x 64 with maps of 8 x 8 and 4 x 4, strides 8 and 16.

    Box (8, 16)-(40, 32): 32 x 16 pixels, side 22.6: 2.8 cells of the first
    level, so there; centre (24, 24), that is (3, 3) in cells, size (4, 2).
    Box (0, 0)-(64, 64): side 64, 4 cells of the second level, so there;
    centre (2, 2), size (4, 4). Box (16, 16)-(64, 64): side 48, 6 cells of the
    first level and 3 of the second, so of the first; centre (5, 5), size
    (6, 6).
    The last has no width.
    """
    boxes = [
        torch.tensor(
            [
                [8.0, 16, 40, 32],
                [0, 0, 64, 64],
                [16, 16, 64, 64],
                [5, 5, 5, 9],
            ]
        )
    ]
    first, second = box_targets(boxes, (64, 64), [(8, 8), (4, 4)])
    assert cells(first.weight[0, 0]) == [(3, 3), (5, 5)]
    assert first.size[0, :, 5, 5].tolist() == [6, 6]
    assert first.size[0, :, 3, 3].tolist() == [4, 2]
    assert first.offset[0, :, 3, 3].tolist() == [0, 0]
    assert first.heatmap[0, 0, 3, 3] == 1
    assert cells(second.weight[0, 0]) == [(2, 2)]
    assert second.size[0, :, 2, 2].tolist() == [4, 4]
    # mmdet's Gaussian of a 16 x 16 box: sigma = (2 r + 1) / 6.
    (only,) = box_targets(
        [torch.tensor([[0.0, 0, 64, 64]])], (64, 64), [(16, 16)]
    )
    radius = int(gaussian_radius([16, 16], min_overlap=0.3))
    assert radius > 0
    for steps in range(radius + 2):
        value = math.exp(-(steps**2) / (2 * ((2 * radius + 1) / 6) ** 2))
        assert only.heatmap[0, 0, 8, 8 - steps].item() == pytest.approx(
            value if steps <= radius else 0
        )
    # x and y are not exchanged, and the fraction is the offset.
    (only,) = box_targets(
        [torch.tensor([[30.0, 2, 46, 10]])], (32, 64), [(4, 8)]
    )
    # Centre (38, 6): (4.75, .75) in cells; size (2, 1).
    assert cells(only.weight[0, 0]) == [(0, 4)]
    assert only.offset[0, :, 0, 4].tolist() == [0.75, 0.75]
    assert only.size[0, :, 0, 4].tolist() == [2, 1]


def test_anchor__slow_reference():
    dam = DAM([4], anchor_weight=2.0)
    found = Prediction(
        noise(2, 1, 3, 4), noise(2, 2, 3, 4, seed=1), noise(2, 2, 3, 4, seed=2)
    )
    heat = torch.rand(2, 1, 3, 4) * 0.9
    heat[0, 0, 1, 2] = heat[1, 0, 0, 0] = 1
    weight = (heat == 1).float()
    target = Targets(heat, torch.full((2, 2, 3, 4), 3.0), 0 * heat, weight)
    target = target._replace(offset=torch.full((2, 2, 3, 4), 0.5))
    total = 0.0
    for n in range(2):
        for y in range(3):
            for x in range(4):
                p = found.heatmap[n, 0, y, x].sigmoid().item()
                t = heat[n, 0, y, x].item()
                if t == 1:
                    total -= (1 - p) ** 2 * math.log(p)
                    w, h = found.size[n, :, y, x].tolist()
                    total += 0.1 * (abs(w - 3) + abs(h - 3)) / 2
                    u, v = found.offset[n, :, y, x].tolist()
                    total += (abs(u - 0.5) + abs(v - 0.5)) / 2
                else:
                    total -= (1 - t) ** 4 * p**2 * math.log(1 - p)
    loss = dam.anchor_loss([found], [target])
    assert loss.item() == pytest.approx(2 * total / 2, rel=1e-5)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(anchor='gt'), r"'attention', 'boxes', None.*got 'gt'"),
        (dict(area_reduction='max'), "'mean' or 'sum'"),
        (dict(agree_weight=-1), '0 or more'),
        (dict(agree_weight=0, area_weight=0), 'Set dam=False'),
        (dict(agree_weight=0, anchor=None), 'nothing trains the heads'),
        (dict(decoder=dict(topk=0)), 'set area_weight=0'),
        (dict(decoder=dict(combine='sum')), "got 'sum'"),
    ],
)
def test_dam__refuses(options, message):
    with pytest.raises(ValueError, match=message):
        DAM([4], **options)


def test_dam__is_a_module_of_heads_alone():
    assert {name.split('.')[0] for name, _ in DAM([4]).named_parameters()} == {
        'predictors'
    }
    assert isinstance(DAM([4], anchor=None).predictors, nn.ModuleList)
