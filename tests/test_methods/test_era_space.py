"""ERA's normalised form: space, bottlenecks, gates, the teacher as target."""

import copy
import math

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from mmengine.structures import InstanceData
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from era_mm.heads import DenseTerm, RoITerm
from era_mm.methods.era import ERADistiller, ERALoss, MBRNet, TWIHook
from era_mm.methods.era import distiller as distiller_module
from era_mm.methods.era.losses import estimates_of, residual_targets
from era_mm.methods.era.residuals import (
    FactoredResiduals,
    ListedResiduals,
    factored_errors,
    step_errors,
)
from era_mm.methods.era.space import LEAST_SHARE, FeatureSpace
from era_mm.testing import (
    assert_same_steps,
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
    era_model,
    give_opinions,
    noise,
    save_teacher,
    train_steps,
    two_stage_config,
)

HEADS = ['RetinaHead', 'FCOSHead', 'ATSSHead', 'GFLHead']
CLOSE = dict(rtol=1e-10, atol=1e-12)


def step_to(step):
    """The run's iteration."""
    MessageHub.get_current_instance().update_info('iter', step)


# -- the space ----------------------------------------------------------------


#: Two channels of four samples: mean 2 and deviation 1, mean 2 and 2.
FEAT = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 4.0], [3.0, 4.0]])


@pytest.mark.parametrize('dims', [0, 1, 2])
@pytest.mark.parametrize('batches', [1, 2, 4])
def test_space__statistics_by_hand(dims, batches):
    # All positions count, in whatever batches they come.
    space = FeatureSpace([2], num_batches=batches)
    for part in FEAT.chunk(batches):
        if dims:
            # Positions of one image in place of images.
            part = part.T.reshape(1, 2, -1, *[1] * (dims - 1))
        space.update([part])
    mean, std = space.statistics(0)
    torch.testing.assert_close(mean, torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(std, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(space.share_weights, torch.ones(1))
    normal = space.normalize([FEAT])[0]
    expected = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])
    torch.testing.assert_close(normal, expected)


def test_space__batches_of_other_sizes_count_by_their_positions():
    feats = [noise(n, 3, h, 2, seed=n).float() for n, h in ((1, 5), (3, 2))]
    space = FeatureSpace([3], num_batches=2)
    for feat in feats:
        space.update([1000 + feat])
    values = torch.cat([f.movedim(1, 0).flatten(1) for f in feats], dim=1)
    mean, std = space.statistics(0)
    # The channels lie far from 0: their variance is no small difference.
    torch.testing.assert_close(mean - 1000, values.mean(1), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        std, values.std(1, unbiased=False), rtol=1e-3, atol=0
    )


def test_space__levels_have_statistics_of_their_own():
    space = FeatureSpace([2, 3])
    feats = [noise(4, 2, 5, 5).float(), 10 * noise(4, 3, 2, 2, seed=1).float()]
    space.update(feats)
    for level, feat in enumerate(feats):
        dims = (0, 2, 3)
        mean, std = space.statistics(level)
        torch.testing.assert_close(mean, feat.mean(dims))
        torch.testing.assert_close(std, feat.std(dims, correction=0))
        normal = space.normalize(feats)[level]
        torch.testing.assert_close(
            normal.mean(dims), torch.zeros(len(mean)), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            normal.var(dims, correction=0), torch.ones(len(mean))
        )


def test_space__is_fixed_after_its_batches():
    space = FeatureSpace([2], num_batches=2)
    for _ in range(2):
        space.update([FEAT])
    before = copy.deepcopy(space.state_dict())
    for _ in range(3):
        space.update([100 * FEAT + 7])
    for key, value in space.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_space__is_resumed_where_it_was():
    batches = [noise(4, 3, 2, 2, seed=seed).float() for seed in range(5)]
    whole = FeatureSpace([3], num_batches=3)
    for batch in batches:
        whole.update([batch])
    for until in range(5):
        first = FeatureSpace([3], num_batches=3)
        for batch in batches[:until]:
            first.update([batch])
        second = FeatureSpace([3], num_batches=3)
        # One that has had enough of its own starts anew as well.
        for batch in batches:
            second.update([100 * batch])
        second.load_state_dict(first.state_dict())
        for batch in batches[until:]:
            second.update([batch])
        for key, value in whole.state_dict().items():
            assert torch.equal(second.state_dict()[key], value), (until, key)


def test_space__ranks_add_up(monkeypatch):
    """Two ranks with other images have the statistics of all of them."""
    parts = [noise(2, 3, 4, 4, seed=seed).float() for seed in range(2)]
    whole = FeatureSpace([3])
    whole.update([torch.cat(parts)])
    other = FeatureSpace([3])
    other.update([parts[1]])

    def all_reduce(moments):
        moments += other.moments0

    monkeypatch.setattr('era_mm.methods.era.space.all_reduce', all_reduce)
    rank = FeatureSpace([3])
    rank.update([parts[0]])
    for own, expected in zip(
        rank.statistics(0), whole.statistics(0), strict=True
    ):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize('value', [torch.inf, -torch.inf, torch.nan])
def test_space__a_batch_that_is_not_finite_is_left_out(value):
    batches = [noise(4, 3, 2, 2, seed=seed).float() for seed in range(3)]
    expected = FeatureSpace([3, 3], num_batches=2)
    space = FeatureSpace([3, 3], num_batches=2)
    for index, batch in enumerate(batches[:2]):
        expected.update([batch, batch])
        bad = batches[2].clone()
        bad[1, index] = value
        # Also where it is one of the levels.
        space.update([batches[2], bad])
        assert int(space.first_batches.seen) == index
        space.update([batch, batch])
    for key, buffer in expected.state_dict().items():
        assert torch.equal(space.state_dict()[key], buffer), key


def test_space__a_batch_is_left_out_by_all_ranks(monkeypatch):
    space = FeatureSpace([2])
    before = copy.deepcopy(space.state_dict())

    def with_a_bad_rank(moments):
        moments += torch.inf

    monkeypatch.setattr('era_mm.methods.era.space.all_reduce', with_a_bad_rank)
    space.update([FEAT])
    for key, value in before.items():
        assert torch.equal(space.state_dict()[key], value), key


def test_space__a_dead_channel_is_divided_by_a_share_of_the_others():
    space = FeatureSpace([2])
    dead = FEAT.clone()
    dead[:, 0] = 5
    space.update([dead])
    mean, std = space.statistics(0)
    # Variances 0 and 4: their root mean square is sqrt(2).
    torch.testing.assert_close(mean, torch.tensor([5.0, 2.0]))
    torch.testing.assert_close(
        std, torch.tensor([LEAST_SHARE * math.sqrt(2), 2.0])
    )
    # Half of the channels have no variance to explain.
    torch.testing.assert_close(space.share_weights, torch.tensor([2.0]))
    assert not space.normalize([dead])[0][:, 0].any()
    # Another teacher's may have one. The counter is reset by itself.
    space.reset()
    space.first_batches.reset()
    for key, value in FeatureSpace([2]).state_dict().items():
        assert torch.equal(space.state_dict()[key], value), key


@pytest.mark.parametrize(('value', 'unit'), [(3.0, 3.0), (0.0, 1.0)])
def test_space__a_constant_level_has_its_mean_as_its_unit(value, unit):
    space = FeatureSpace([2, 2])
    constant = torch.full((4, 2), value)
    space.update([constant, FEAT])
    assert torch.equal(space.statistics(0)[1], torch.full((2,), unit))
    assert torch.equal(space.share_weights, torch.ones(2))
    assert not space.normalize([constant, FEAT])[0].any()
    # There is nothing left to explain.
    assert share(space, [space.statistics(0)[0].expand(4, 2)], [constant]) == 0


@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3])
@pytest.mark.parametrize('rounding', [1e-7, 3e-4])
def test_space__a_level_constant_up_to_rounding_is_constant(scale, rounding):
    """Of float32 and of float16; it may live up after the first batches."""
    space = FeatureSpace([2])
    means = scale * torch.tensor([3.0, 4.0])
    space.update([means * (1 + rounding * noise(64, 2).float())])
    # The root of (9 + 16) / 2.
    unit = scale * math.sqrt(12.5)
    torch.testing.assert_close(
        space.statistics(0)[1], torch.full((2,), unit), rtol=1e-3, atol=0
    )
    assert torch.equal(space.share_weights, torch.ones(1))
    # 2 is 2 / sqrt(12.5) of the unit, not 2e7 of the rounding.
    later = [means + 2 * scale]
    assert share(space, [means.expand(1, 2)], later) == pytest.approx(
        4 / 12.5, rel=1e-2
    )


def test_space__a_small_deviation_of_a_large_mean_is_one():
    space = FeatureSpace([2])
    feat = 1000 + noise(64, 2).float()
    space.update([feat])
    torch.testing.assert_close(
        space.statistics(0)[1], feat.std(0, correction=0), rtol=1e-3, atol=0
    )


def share(space, predictions, feats):
    """What a prediction of a feature leaves unexplained, by the loss."""
    normal, wanted = space.normalize(predictions), space.normalize(feats)
    losses = ERALoss(align_weight=1.0, residual_weight=1.0).of_shares(
        errors=[
            step_errors(
                aligned=n, residuals=torch.zeros_like(n)[:, None], target=t
            )
            for n, t in zip(normal, wanted, strict=True)
        ],
        share_weights=space.share_weights[: len(feats)],
    )
    found = losses['era_unexplained_e0']
    assert torch.equal(found, losses['loss_era_align'].detach())
    assert torch.equal(found, losses['era_unexplained_e1'])
    return found.item()


@pytest.mark.parametrize('weak', [1.0, 0.05, 0.0])
def test_unexplained__is_1_for_the_mean_and_0_for_the_feature(weak):
    # Whether or not a channel is so weak that it is not scaled up.
    space = FeatureSpace([2, 3])
    feats = [
        FEAT * torch.tensor([weak, 1.0]),
        7 + noise(5, 3, 4).float() * torch.tensor([1.0, 9.0, weak])[:, None],
    ]
    space.update(feats)
    means = [
        space.statistics(level)[0].view(1, -1, *[1] * (feat.dim() - 2))
        + torch.zeros_like(feat)
        for level, feat in enumerate(feats)
    ]
    assert share(space, means, feats) == pytest.approx(1, rel=1e-5)
    assert share(space, feats, feats) == 0
    # Half-way a quarter is left; overall it is the mean over the levels.
    half = [(m + f) / 2 for m, f in zip(means, feats, strict=True)]
    assert share(space, half, feats) == pytest.approx(0.25, rel=1e-5)
    one = [means[0], feats[1]]
    assert share(space, one, feats) == pytest.approx(0.5, rel=1e-5)
    other = [feats[0], means[1]]
    assert share(space, other, feats) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize('shape', [(4, 3), (4, 3, 5), (4, 3, 5, 2)])
def test_space__restores_what_it_normalises(shape):
    space = FeatureSpace([3]).double()
    feat = 3 + 5 * noise(*shape)
    # Before it has measured anything, it is the identity.
    assert torch.equal(space.normalize([feat])[0], feat)
    assert torch.equal(space.restore([feat])[0], feat)
    space.update([feat])
    assert not torch.allclose(space.normalize([feat])[0], feat)
    torch.testing.assert_close(
        space.restore(space.normalize([feat]))[0], feat, **CLOSE
    )
    torch.testing.assert_close(
        space.normalize(space.restore([feat]))[0], feat, **CLOSE
    )


def test_space__needs_a_batch():
    with pytest.raises(ValueError, match='`num_batches` must be at least 1'):
        FeatureSpace([2], num_batches=0)


# -- the errors of all steps in one -------------------------------------------


@pytest.mark.parametrize('shape', [(4, 3), (4, 3, 5), (2, 3, 5, 2)])
def test_step_errors__are_those_of_the_definition(shape):
    aligned, target = (noise(*shape, seed=s).requires_grad_() for s in (0, 1))
    residuals = noise(shape[0], 4, *shape[1:], seed=2).requires_grad_()
    inputs = [aligned, residuals, target]
    found = step_errors(aligned=aligned, residuals=residuals, target=target)
    d = residuals.unbind(1)
    missing = residual_targets(
        estimates=estimates_of(aligned=aligned, residuals=d),
        teacher_feat=target,
    )
    expected = [
        F.mse_loss(aligned, target),
        *(F.mse_loss(x, r) for x, r in zip(d, missing, strict=True)),
    ]
    assert found.shape == (5,)
    torch.testing.assert_close(found, torch.stack(expected), **CLOSE)
    # Each with a weight of its own, and those that reach nothing.
    for step, error in enumerate(expected):
        ours, theirs = (
            torch.autograd.grad(
                loss, inputs, retain_graph=True, allow_unused=True
            )
            for loss in (3 * found[step], 3 * error)
        )
        for own, want in zip(ours, theirs, strict=True):
            want = torch.zeros_like(own) if want is None else want
            torch.testing.assert_close(own, want, **CLOSE)


def test_step_errors__of_half_precision_are_those_of_float32():
    aligned = torch.full((1, 1), 300.0)
    residuals = torch.full((1, 1, 1), -100.0, dtype=torch.float16)
    residuals.requires_grad_()
    found = step_errors(
        aligned=aligned,
        residuals=residuals,
        target=torch.zeros(1, 1, dtype=torch.float16),
    )
    # 300^2 does not fit float16.
    assert found.dtype == torch.float32
    assert found.tolist() == [90000, 40000]
    found[1].backward()
    assert residuals.grad.dtype == torch.float16
    assert residuals.grad.item() == 400


def factors(*shape, branches=3, width=2, out=5):
    """Hidden features, weights with biases, and the residuals they make."""
    hidden = noise(shape[0], branches * width, *shape[1:], seed=3)
    weight = noise(branches, out, width + 1, seed=4)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    residuals = torch.einsum(
        'bcw,nbw...->nbc...',
        weight[..., :-1],
        hidden.unflatten(1, (branches, width)),
    ) + weight[..., -1].view(1, branches, out, *(1,) * (len(shape) - 1))
    return hidden, weight, residuals


@pytest.mark.parametrize('shape', [(4, 7), (2, 3, 6)])
def test_factored_errors__are_those_of_the_products(shape):
    aligned, target = (
        noise(shape[0], 5, *shape[1:], seed=s).requires_grad_() for s in (0, 1)
    )
    hidden, weight, residuals = factors(*shape)
    inputs = [aligned, hidden, weight, target]
    found = factored_errors(
        aligned=aligned, hidden=hidden, weight=weight, target=target
    )
    expected = step_errors(aligned=aligned, residuals=residuals, target=target)
    torch.testing.assert_close(found, expected, **CLOSE)
    for step in range(4):
        ours, theirs = (
            torch.autograd.grad(3 * errors[step], inputs, retain_graph=True)
            for errors in (found, expected)
        )
        for own, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, want, **CLOSE)


@pytest.mark.parametrize('step', [0, 1, 2, 3])
def test_factored_estimates__are_those_of_the_list(step):
    aligned = noise(2, 5, 3, 6, seed=0).requires_grad_()
    hidden, weight, residuals = factors(2, 3, 6)
    inputs = [aligned, hidden, weight]
    found, expected = (
        parts.estimate(aligned, step)
        for parts in (
            FactoredResiduals(hidden, weight),
            ListedResiduals(residuals.unbind(dim=1)),
        )
    )
    torch.testing.assert_close(found, expected, **CLOSE)
    factor = noise(*found.shape, seed=9)
    ours, theirs = (
        torch.autograd.grad(
            (factor * estimate).sum(),
            inputs,
            retain_graph=True,
            allow_unused=True,
        )
        for estimate in (found, expected)
    )
    for own, want in zip(ours, theirs, strict=True):
        if step == 0 and own is None:
            continue
        torch.testing.assert_close(own, want, **CLOSE)


def test_factored_errors__of_half_precision_are_those_of_float32():
    hidden = torch.full((1, 1, 1), -100.0, dtype=torch.bfloat16)
    hidden.requires_grad_()
    weight = torch.tensor([[[1.0, 0.25]]], requires_grad=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = factored_errors(
            aligned=torch.full((1, 1, 1), 300.0),
            hidden=hidden,
            weight=weight,
            target=torch.zeros(1, 1, 1, dtype=torch.bfloat16),
        )
        # bfloat16 has no 200.25.
        assert found.dtype == torch.float32
        assert found.tolist() == [90000, 200.25**2]
        found[1].backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert hidden.grad.item() == 400
    # Nor 400.5.
    assert weight.grad.tolist() == [[[-40050, 400.5]]]


def test_errors__of_an_aligned_feature_in_half_precision():
    aligned = torch.full((1, 1, 1), 300.0, dtype=torch.bfloat16)
    target = torch.full((1, 1, 1), 0.25)
    for residuals in (
        ListedResiduals([torch.ones(1, 1, 1)]),
        FactoredResiduals(torch.ones(1, 1, 1), torch.tensor([[[1.0, 0.0]]])),
    ):
        u = aligned.clone().requires_grad_()
        found = residuals.errors(aligned=u, target=target)
        # bfloat16 has neither 299.75 nor 300.75.
        assert found.tolist() == [299.75**2, 300.75**2]
        found[0].backward()
        assert u.grad.dtype == torch.bfloat16


@pytest.mark.parametrize('last', ['aligned', 'hidden', 'target', 'all'])
def test_factored_errors__of_channels_last_are_the_same(last):
    aligned, target = (noise(2, 5, 3, 6, seed=s) for s in (0, 1))
    hidden, weight, _ = factors(2, 3, 6)
    maps = dict(aligned=aligned, hidden=hidden, target=target)

    def results(chosen):
        own = {
            name: value.detach()
            .contiguous(
                memory_format=torch.channels_last
                if name in chosen
                else torch.contiguous_format
            )
            .requires_grad_()
            for name, value in maps.items()
        }
        inputs = [*own.values(), weight]
        errors = factored_errors(**own, weight=weight)
        estimate = FactoredResiduals(own['hidden'], weight).estimate(
            own['aligned'], 2
        )
        total = (errors * noise(4, seed=5)).sum() + estimate.square().sum()
        found = torch.autograd.grad(
            total, inputs, allow_unused=True, materialize_grads=True
        )
        return [errors, estimate, *found]

    expected = results(())
    for own, want in zip(
        results(tuple(maps) if last == 'all' else (last,)),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(own, want, **CLOSE)


def test_bottlenecks__keep_no_residual():
    net = MBRNet(
        8,
        64,
        num_branches=4,
        branch='bottleneck',
        branch_width=4,
        normalize=True,
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x
    ):
        (level,) = net.residuals_of_levels([torch.randn(2, 8, 16, 16)])
        level.errors(
            aligned=torch.randn(2, 64, 16, 16),
            target=torch.randn(2, 64, 16, 16),
        )
    # The two maps that are given, and nothing wider than the branches.
    assert sorted(kept)[-3:] == [16 * 512, 64 * 512, 64 * 512]


# -- bottlenecks --------------------------------------------------------------


SHAPES = {0: (6,), 1: (3, 5), 2: (3, 5, 4)}


def feature(dims, channels, seed=0):
    number, *space = SHAPES[dims]
    return noise(number, channels, *space, seed=seed)


def seasoned(*args, **kwargs):
    """A net in double precision, every number of which is of some size."""
    torch.manual_seed(0)
    net = MBRNet(*args, **kwargs).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    for buffer in net.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 2)
    if net.space is not None:
        for level in range(net.num_levels):
            nn.init.normal_(net.space.statistics(level)[0], std=3)
    return net


@pytest.mark.parametrize('dims', [1, 2])
@pytest.mark.parametrize('norm', [None, dict(type='GN', num_groups=6)])
def test_bottleneck__branches_are_separate_chains(dims, norm):
    convolve = {1: F.conv1d, 2: F.conv2d}[dims]
    net = seasoned(
        [4, 6],
        [5, 4],
        num_levels=2,
        spatial_dims=dims,
        num_branches=3,
        branch='bottleneck',
        branch_width=2,
        norm_cfg=norm,
        act_cfg=dict(type='GELU'),
    )
    feats = [feature(dims, 4), feature(dims, 6, seed=1)]
    found = net.residuals(feats)
    assert len(found) == 3

    def layer(block, x, part, padding=0):
        """A branch's own rows of a layer, its norm and its activation."""
        conv = block[0]
        bias = None if conv.bias is None else conv.bias[part]
        y = convolve(x, conv.weight[part], bias, padding=padding)
        if norm is not None:
            # Three branches of two channels, six groups: one each.
            flat = y.flatten(2)
            mean = flat.mean(2, keepdim=True)
            var = flat.var(2, correction=0, keepdim=True)
            flat = (flat - mean) / (var + 1e-5).sqrt()
            weight, bias = block[1].weight[part], block[1].bias[part]
            y = (flat * weight[:, None] + bias[:, None]).view_as(y)
        return F.gelu(y)

    parts = net.branches
    for branch in range(3):
        for level, feat in enumerate(feats):
            inner = slice(2 * branch, 2 * branch + 2)
            out = [5, 4][level]
            outer = slice(out * branch, out * (branch + 1))
            hidden = layer(parts.reduce[level], feat, inner)
            hidden = layer(parts.spatial[level], hidden, inner, padding=1)
            close = parts.expand[level]
            expected = convolve(hidden, close.weight[outer], close.bias[outer])
            assert expected.shape == (*feat.shape[:1], out, *feat.shape[2:])
            torch.testing.assert_close(
                found[branch][level], expected, rtol=1e-9, atol=1e-10
            )
    # The same stacked, and of the first ones alone.
    for level, stacked in enumerate(net.branches(feats)):
        for branch in range(3):
            assert torch.equal(stacked[:, branch], found[branch][level])
    for count in range(4):
        some = net.residuals(feats, count)
        assert len(some) == count
        for own, expected in zip(some, found, strict=False):
            assert all(map(torch.equal, own, expected))


@pytest.mark.parametrize(
    ('channels', 'width'), [(16, 8), (64, 8), (256, 32), (4096, 64)]
)
def test_bottleneck__width_follows_the_widest_level(channels, width):
    with torch.device('meta'):
        net = MBRNet([8, channels], 16, 2, branch='bottleneck')
    assert net.branches.width == width


def test_bottleneck__starts_at_exactly_zero():
    net = MBRNet([4, 6], 5, num_levels=2, branch='bottleneck', normalize=True)
    net.init_weights()
    feats = [feature(2, 4).float(), feature(2, 6).float()]
    assert not any(d.any() for branch in net.residuals(feats) for d in branch)
    first, *others = net.estimates(feats)
    for step in others:
        assert all(map(torch.equal, step, first))
    # What lies before the last layer does not.
    assert all(layer[0].weight.any() for layer in net.branches.reduce)
    assert all(layer[0].weight.any() for layer in net.branches.spatial)


def test_bottleneck__first_layers_have_hes_size():
    net = MBRNet(256, 256, num_branches=2, branch='bottleneck')
    net.init_weights()
    for block, fan in (
        (net.branches.reduce[0], 256),
        (net.branches.spatial[0], 9 * net.branches.width),
    ):
        assert block[0].weight.std().item() == pytest.approx(
            (2 / fan) ** 0.5, rel=0.1
        )
        assert not block[0].bias.any()


# -- folding ------------------------------------------------------------------


NETS = {
    'bottleneck': dict(branch='bottleneck', branch_width=2),
    'bottleneck-norm': dict(
        branch='bottleneck',
        branch_width=2,
        norm_cfg=dict(type='GN', num_groups=6),
    ),
    'bottleneck-mean': dict(
        branch='bottleneck', branch_width=2, reduction='mean'
    ),
    'released': dict(),
    'zero': dict(zero_init=True),
    'mean': dict(reduction='mean'),
    'norm': dict(norm_cfg=dict(type='LN')),
    'projection': dict(share_projection=True),
    'levels': dict(share_levels=True),
    'levels-projection': dict(share_levels=True, share_projection=True),
}


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize(
    ('kind', 'dims', 'out'),
    [
        (kind, dims, out)
        for kind, options in NETS.items()
        for dims in (0, 1, 2)
        for out in (4, [5, 4], 5)
        # Bottlenecks are for maps; levels of other widths share nothing.
        if not (dims == 0 and 'branch' in options)
        and not ('share_levels' in options and isinstance(out, list))
    ],
)
def test_folded__has_the_same_estimates(kind, dims, out, mode):
    options = NETS[kind]
    net = seasoned(
        4,
        out,
        num_levels=2,
        spatial_dims=dims,
        num_branches=3,
        normalize=True,
        **options,
    )
    getattr(net, mode)()
    feats = [feature(dims, 4, seed=level) for level in range(2)]
    before = copy.deepcopy(net.state_dict())
    folded = net.folded()
    assert folded.space is None
    # The original keeps its own, whatever is done to the other.
    assert net.space is not None
    own = {p.data_ptr() for p in net.parameters()}
    assert not own & {p.data_ptr() for p in folded.parameters()}
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    for count in range(4):
        steps = net.estimates(feats, count)
        assert len(steps) == count + 1
        for ours, theirs in zip(
            folded.estimates(feats, count), steps, strict=True
        ):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    # E0 is the align layer alone.
    (first,) = net.estimates(feats, 0)
    for a, b in zip(folded.align(feats), first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    # It was worth the while: the layers are others.
    assert not torch.allclose(folded.aligns[0].weight, net.aligns[0].weight)


def test_bottleneck__neck_of_a_host_loads_a_file_with_former_names():
    """An export of mode T."""

    def neck():
        net = MBRNet(4, 6, num_levels=2, branch='bottleneck')
        return nn.Sequential(nn.Identity(), net)

    model, other, another = neck(), neck(), neck()
    for value in model.parameters():
        nn.init.normal_(value)
    state = {
        key.replace('1.branches.', '1.bottlenecks.'): value
        for key, value in model.state_dict().items()
    }
    assert '1.bottlenecks.expand.0.weight' in state
    other.load_state_dict(dict(state))
    # By mmengine, too.
    load_state_dict(another, dict(state), strict=True)
    for loaded in (other, another):
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key


def test_folded__without_a_space_is_a_copy():
    net = seasoned(4, 5, branch='bottleneck')
    folded = net.folded()
    assert folded is not net
    for key, value in net.state_dict().items():
        assert torch.equal(value, folded.state_dict()[key]), key


# -- the form in a model ------------------------------------------------------


def build(checkpoint='random', student=None, teacher=None, **kwargs):
    model = era_model(checkpoint, student, teacher, **kwargs)
    model.init_weights()
    return model


def batch_of(model, seed=0, num=4):
    data = model.data_preprocessor(detection_batch(num, seed=seed), True)
    data['inputs'] = data['inputs'].to(next(model.student.parameters()).dtype)
    return data


def test_form__leaves_the_released_way_of_choosing_estimates():
    # `twi_on_aligned` weighs all of them, so the form's own choice goes.
    era = build(loss=dict(twi_on_aligned=False)).distillers['distiller']
    assert era.form == 'normalised'
    assert era.loss_terms.step_weights(2) == [0.0, 0.5, 0.5]
    era = build(loss=dict(align_weight=2.0)).distillers['distiller']
    assert era.loss_terms.step_weights(2) == [1.0, 0.0, 1.0]


def test_default__is_the_recipe():
    model = build()
    era = model.distillers['distiller']
    assert era.form == 'normalised'
    assert era.mbrnet.branch == 'bottleneck'
    assert era.mbrnet.space.first_batches.number == 20
    assert (era.twi_steps, era.twi_targets) == ('sampled', 'teacher')
    assert type(era.logit) is DenseTerm
    loss = era.loss_terms
    assert (loss.align_weight, loss.residual_weight) == (1, 4)
    assert loss.branch_weights(2) == [0.5, 0.5]
    # e_0 and e_n are judged alike, the others not at all.
    assert loss.step_weights(4) == [1, 0, 0, 0, 1]
    assert era.explained.tolist() == [0] * 5
    assert era.loss_weights() == {
        'loss_era_align': 1.0,
        'loss_era_residual': 4.0,
        'loss_era_twi_*': 1.0,
        'loss_era_logit': 1.0,
        'loss_era_box': 1.0,
    }


@pytest.mark.parametrize(
    ('kwargs', 'branch', 'zero'),
    [(dict(), 'released', False), (dict(form='normalised'), 'released', True)],
)
def test_default__of_vectors_has_released_branches(kwargs, branch, zero):
    init_default_scope('mmpretrain')
    model = MODELS.build(
        dict(
            type='era_mm.Distillation',
            student=classifier_config(),
            teacher=dict(
                config=classifier_config(width=16), checkpoint='random'
            ),
            distiller=dict(type='era_mm.ERADistiller', **kwargs),
        )
    )
    era = model.distillers['distiller']
    assert era.form == kwargs.get('form', 'released')
    assert era.mbrnet.branch == branch
    assert era.mbrnet.zero_init is zero
    assert (era.mbrnet.space is not None) is zero


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(twi_steps='all', detach=True),
        dict(mbrnet=dict(num_branches=1)),
        dict(mbrnet=dict(norm_cfg=dict(type='GN', num_groups=4))),
        dict(mbrnet=dict(branch='released', zero_init=True)),
        dict(source='backbone'),
    ],
    ids=['default', 'all', 'one', 'norm', 'released', 'backbone'],
)
def test_training__gives_every_parameter_a_gradient(options):
    model = build(**options)
    era = model.distillers['distiller']
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen = []
    for step in range(3):  # The third would say which got none.
        step_to(step)
        loss, log = model.parse_losses(
            model(**batch_of(model, seed=step), mode='loss')
        )
        assert all(torch.as_tensor(v).isfinite() for v in log.values())
        optimizer.zero_grad()
        loss.backward()
        seen.append(
            {
                name
                for name, p in era.named_parameters()
                if p.grad is not None and p.grad.any()
            }
        )
        optimizer.step()
    names = {name for name, _ in era.named_parameters()}
    # At first the branches give nothing, so only their last layers learn.
    assert any('aligns' in name for name in seen[0])
    assert seen[0] < names
    assert seen[1] == seen[2] == names


def parts_with_gradient(model):
    """Parts of a model, branches one by one, that a loss has reached."""
    net = model.distillers['distiller'].mbrnet
    found = {
        name
        for name, part in (
            ('backbone', model.student.backbone),
            ('head', model.student.bbox_head),
            ('align', net.aligns),
        )
        if any(p.grad is not None and p.grad.any() for p in part.parameters())
    }
    number = net.num_branches
    for parameter in net.branches.parameters():
        if parameter.grad is None:
            continue
        # The branches lie side by side in the rows of every layer.
        found |= {
            f'branch{index}'
            for index, rows in enumerate(parameter.grad.chunk(number))
            if rows.any()
        }
    return found


@torch.no_grad()
def open_branches(model, std=0.1):
    """Branches that give something."""
    net = model.distillers['distiller'].mbrnet
    if net.branch == 'bottleneck':
        for layer in net.branches.expand:
            nn.init.normal_(layer.weight, std=std)
        return
    for branches in net.levels:
        for branch in branches:
            nn.init.normal_(branch.norms[-1][0].weight, std=std)


@pytest.mark.parametrize('detach', [False, True])
@pytest.mark.parametrize('branch', [0, 1, 2])
def test_residual__of_a_branch_reaches_it_and_the_student(branch, detach):
    scales = [0.0, 0.0, 0.0]
    scales[branch] = 1.0
    model = build(
        mbrnet=dict(num_branches=3), loss=dict(scales=scales), detach=detach
    )
    open_branches(model)
    losses = model(**batch_of(model), mode='loss')
    losses['loss_era_residual'].backward()
    assert parts_with_gradient(model) == {f'branch{branch}'} | (
        set() if detach else {'backbone'}
    )


@pytest.mark.parametrize(
    ('steps', 'reached'),
    [
        ('all', {'backbone', 'align', 'branch0', 'branch1', 'branch2'}),
        ('last', {'backbone', 'align', 'branch0', 'branch1', 'branch2'}),
    ],
)
def test_twi__reaches_the_estimate_it_judges(steps, reached):
    model = build(mbrnet=dict(num_branches=3), twi_steps=steps)
    open_branches(model)
    era = model.distillers['distiller']
    era.explained.fill_(0.5)
    losses = model(**batch_of(model), mode='loss')
    # Only its own terms reach the student's head.
    (losses['loss_era_twi_logit'] + losses['loss_era_twi_box']).backward(
        retain_graph=True
    )
    assert parts_with_gradient(model) == reached
    model.zero_grad()
    losses['loss_era_align'].backward(retain_graph=True)
    assert parts_with_gradient(model) == {'backbone', 'align'}
    model.zero_grad()
    losses['loss_era_logit'].backward()
    assert parts_with_gradient(model) == {'backbone', 'head'}
    teacher = model.teachers['teacher'].model
    assert all(p.grad is None for p in teacher.parameters())


def test_losses__against_a_written_out_reference(teacher_file):
    model = build(teacher_file, mbrnet=dict(num_branches=2)).double()
    open_branches(model)
    era = model.distillers['distiller']
    data = batch_of(model)
    student, net = copy.deepcopy(model.student), copy.deepcopy(era.mbrnet)
    found = model(**data, mode='loss')
    teacher = model.teachers['teacher'].model
    with torch.no_grad():
        maps = student.extract_feat(data['inputs'])
        targets = teacher.extract_feat(data['inputs'])
        e = [net.aligns[level](maps[level]) for level in range(2)]
        d = net.residuals(maps)
    # Statistics of this one batch, by the feature's own channels.
    left = []
    for branch in range(3):
        shares = []
        for level in range(2):
            t = targets[level]
            mean = t.mean((0, 2, 3), keepdim=True)
            var = ((t - mean) ** 2).mean((0, 2, 3), keepdim=True)
            floor = LEAST_SHARE**2 * var.mean()
            std = var.clamp(min=floor).sqrt()
            # sum of squared errors over sum of squared distances to the mean
            error = ((e[level] * std + mean - t) ** 2 / std**2).sum()
            shares.append(error / ((t - mean) ** 2 / std**2).sum())
        left.append(sum(shares) / 2)
        if branch < 2:
            e = [x + y for x, y in zip(e, d[branch], strict=True)]
    expected = {
        'loss_era_align': left[0],
        # s = (1, 1), n = 2
        'loss_era_residual': 4 * (left[1] + left[2]) / 2,
        'era_unexplained_e0': left[0],
        'era_unexplained_e1': left[1],
        'era_unexplained_e2': left[2],
    }
    for key, value in expected.items():
        # The statistics are those of float32.
        torch.testing.assert_close(
            found[key].detach(), value, rtol=1e-5, atol=0, msg=key
        )


# -- it does not depend on the teacher's scale --------------------------------


def scaled_teacher(folder, factor):
    """The same function with its neck's outputs times a factor.

    Args:
        folder: Where its file is written.
        factor: One number, or one by channel.
    """
    config = detector_config(width=16, channels=24)
    file = folder / 'teacher.pth'
    save_teacher(config, file)
    checkpoint = torch.load(file)
    state = checkpoint['state_dict']
    factor = torch.as_tensor(factor, dtype=torch.float32).expand(24)
    for key, value in state.items():
        if 'fpn_convs' in key:
            value *= factor.view(-1, *[1] * (value.dim() - 1))
        elif key.endswith('s.0.conv.weight') and 'bbox_head' in key:
            value /= factor.view(1, -1, 1, 1)
        elif key.endswith(('_cls.weight', '_reg.weight')):
            # A fresh head scores everything 0.01.
            value *= 30
    torch.save(checkpoint, file)
    return str(file)


def trained_by(file, steps=3, **options):
    """What a few steps of training have: losses and gradients."""
    torch.manual_seed(0)
    model = build(file, **options).double()
    open_branches(model)
    era = model.distillers['distiller']
    # As if half were explained, so that TWI has a say.
    era.explained.fill_(0.5)
    batches = [batch_of(model, seed=step) for step in range(steps)]
    return train_steps(model, batches), era


@pytest.mark.parametrize(
    'factor',
    [10.0, 0.1, torch.linspace(0.6, 1.6, 24)],
    ids=['large', 'small', 'by channel'],
)
@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(twi_steps='all'),
        dict(twi_steps='all', twi_targets='labels'),
        dict(mbrnet=dict(branch='released', zero_init=True)),
    ],
    ids=['default', 'all', 'labels', 'released'],
)
def test_scale__of_the_teacher_changes_nothing(factor, options, tmp_path):
    plain, era = trained_by(scaled_teacher(tmp_path, 1.0), **options)
    # No channel is so weak that scaling one would change the others'.
    assert torch.allclose(
        era.mbrnet.space.share_weights, torch.ones(2).double()
    )
    scaled, other = trained_by(scaled_teacher(tmp_path, factor), **options)
    ratio = other.mbrnet.space.std0 / era.mbrnet.space.std0
    torch.testing.assert_close(
        ratio,
        torch.as_tensor(factor).double().expand(24),
        rtol=1e-4,
        atol=0,
    )
    for losses, _ in plain:
        assert losses['loss_era_align'] > 0.1
        assert any('twi' in key for key in losses)
    # Statistics are float32, all else is not.
    assert_same_steps(scaled, plain, rtol=1e-4)


def test_scale__of_the_teacher_does_change_the_released_form(tmp_path):
    # Or the test above would say nothing.
    options = dict(form='released', mbrnet=dict(num_branches=2))

    def align(factor):
        torch.manual_seed(0)
        model = build(scaled_teacher(tmp_path, factor), **options)
        losses = model(**batch_of(model), mode='loss')
        return losses['loss_era_align'].item()

    assert align(10.0) > 10 * align(1.0)


# -- the gate of TWI ----------------------------------------------------------


def twin(folder, head='RetinaHead', half=False, **kwargs):
    """A student with the teacher's weights, whose estimates are exact.

    Args:
        folder: For the teacher's file.
        head: Of both.
        half: Estimates are half-way between the mean and the feature.
        kwargs: For the distiller.
    """
    config = detector_config(head=head)
    model = build(
        save_teacher(config, folder / 'teacher.pth'),
        student=config,
        teacher=config,
        **(dict(mbrnet=dict(num_branches=2, num_batches=1)) | kwargs),
    ).double()
    teacher = model.teachers['teacher']
    give_opinions(teacher.model.bbox_head)
    model.student.load_state_dict(teacher.model.state_dict())
    for module in model.student.modules():
        # As in the teacher.
        if isinstance(module, _BatchNorm):
            module.eval()
    era = model.distillers['distiller']
    space = era.mbrnet.space
    with torch.no_grad():
        space.update(teacher.extract(batch_of(model)['inputs'])['neck'])
        for level, align in enumerate(era.mbrnet.aligns):
            mean, std = space.statistics(level)
            nn.init.dirac_(align.weight)
            align.weight /= std.view(-1, 1, 1, 1)
            align.bias.copy_(-mean / std)
            if half:
                align.weight /= 2
                align.bias /= 2
    return model


def test_gate__is_the_running_share_that_is_explained(tmp_path):
    model = twin(tmp_path, half=True)
    open_branches(model, std=0.01)
    era = model.distillers['distiller']
    assert era.explained.tolist() == [0, 0, 0]
    rate, every = (
        distiller_module.EXPLAINED_RATE,
        distiller_module.EXPLAINED_EVERY,
    )
    expected = torch.zeros(3).double()
    for step in (0, 1, every, every + 1, 2 * every):
        step_to(step)
        losses = model(**batch_of(model, seed=step), mode='loss')
        model.parse_losses(losses)[0].backward()
        shares = torch.stack(
            [losses[f'era_unexplained_e{k}'] for k in range(3)]
        )
        assert shares.mean() < 0.6
        if step % every == 0:
            expected = (1 - rate) * expected + rate * (1 - shares)
        torch.testing.assert_close(era.explained, expected, **CLOSE)
    assert not era.explained.requires_grad
    assert 0.3 < era.explained.min() < era.explained.max() < 0.9


def test_gate__stays_shut_where_nothing_is_explained():
    # Estimates further off than the mean are no negative weights.
    model = build(mbrnet=dict(num_branches=2))
    era = model.distillers['distiller']
    with torch.no_grad():
        for align in era.mbrnet.aligns:
            align.weight.mul_(10)
    losses = model(**batch_of(model), mode='loss')
    assert losses['era_unexplained_e0'] > 1
    assert era.explained.tolist() == [0, 0, 0]
    assert losses['loss_era_twi_logit'] == losses['loss_era_twi_box'] == 0


@pytest.mark.parametrize('two', [False, True], ids=['dense', 'two stages'])
@pytest.mark.parametrize('whose', ['teacher', 'student'])
def test_measured__is_not_spoilt_by_an_overflow(whose, two, tmp_path):
    """A loss scaler leaves such a step out, and so does what is measured."""
    model = two_stages(tmp_path) if two else twin(tmp_path, half=True)
    era = model.distillers['distiller']
    with torch.no_grad():
        era.explained.fill_(0.25)
    owner = model.student
    if whose == 'teacher':
        model.load_teachers()
        owner = model.teachers['teacher'].model

    def measured():
        return {
            key: value.clone()
            for key, value in era.state_dict().items()
            if key.endswith(('explained', 'seen', 'sums', 'value', 'weights'))
            or 'space.' in key
        }

    def overflow(module, args, output):
        # As of values above 65504 in half precision; all regions read them.
        for level in output:
            level[:, 0] = torch.inf
        return output

    def step(number):
        step_to(number)
        losses = model(**batch_of(model, seed=number), mode='loss')
        model.parse_losses(losses)[0].backward()
        return losses['loss_era_align']

    assert step(0).isfinite()
    before = measured()
    assert all(value.isfinite().all() for value in before.values())
    handle = owner.neck.register_forward_hook(overflow)
    bad = step(10)
    handle.remove()
    assert not bad.isfinite()
    after = measured()
    assert torch.equal(after['explained'], before['explained'])
    for key, value in after.items():
        assert value.isfinite().all(), key
        if whose == 'teacher':
            assert torch.equal(value, before[key]), key
    step(20)
    assert not torch.equal(measured()['explained'], before['explained'])


def test_gate__and_space_are_moved_by_training_alone(tmp_path):
    model = twin(
        tmp_path, half=True, mbrnet=dict(num_branches=2, num_batches=9)
    )
    era = model.distillers['distiller']
    before = copy.deepcopy(era.state_dict())
    with torch.no_grad():
        model(**batch_of(model, seed=1), mode='loss')
    era.eval()
    losses = model(**batch_of(model, seed=1), mode='loss')
    model.parse_losses(losses)[0].backward()
    for key, value in era.state_dict().items():
        assert torch.equal(value, before[key]), key
    era.train()
    model(**batch_of(model, seed=1), mode='loss')
    assert era.explained.all()
    moved = era.state_dict()['mbrnet.space.mean0']
    assert not torch.equal(moved, before['mbrnet.space.mean0'])


def test_gate__weighs_each_estimate_by_its_own_share(tmp_path):
    # twi_weight * interval * w_k * explained_k * what the head says of e_k
    model = twin(
        tmp_path,
        half=True,
        loss=dict(twi_scales=(1.0, 0.5, 0.25), twi_weight=3.0),
        twi_steps='all',
        twi_interval=2,
    )
    open_branches(model)
    era = model.distillers['distiller']
    era.explained.copy_(torch.tensor([0.9, 0.6, 0.3]))
    assert 2 % distiller_module.EXPLAINED_EVERY
    step_to(2)
    data = batch_of(model)
    losses = model(**data, mode='loss')
    torch.testing.assert_close(
        era.explained,
        torch.tensor([0.9, 0.6, 0.3]).double(),
        atol=1e-7,
        rtol=0,
    )
    with torch.no_grad():
        maps = model.student.extract_feat(data['inputs'])
        steps = era.mbrnet.estimates(maps)
        teacher = model.teachers['teacher'].model
        said = era.logit.target(
            era.twi_head,
            teacher.extract_feat(data['inputs']),
            data['data_samples'],
        )
        judged = [
            era.logit.of_outputs(teacher.bbox_head(tuple(step)), said)
            for step in steps
        ]
    for name in ('logit', 'box'):
        terms = [terms[name] for terms in judged]
        assert terms[0] != terms[1] != terms[2]
        expected = sum(
            3 * 2 * w * g * term
            for w, g, term in zip(
                (1.0, 0.5, 0.25), era.explained, terms, strict=True
            )
        )
        torch.testing.assert_close(
            losses[f'loss_era_twi_{name}'].detach(), expected, **CLOSE
        )
    # In the other half of the steps it rests.
    step_to(3)
    model.parse_losses(losses)[0].backward()
    assert not any('twi' in key for key in model(**data, mode='loss'))


# -- the teacher as target ----------------------------------------------------


@pytest.mark.parametrize('head', HEADS)
def test_twin__is_told_nothing(head, tmp_path):
    """The teacher's own feature judged by the teacher, and its own head."""
    model = twin(tmp_path, head, twi_steps='all', twi_targets='teacher')
    era = model.distillers['distiller']
    era.explained.fill_(1)
    losses = model(**batch_of(model), mode='loss')
    found = {k: float(v) for k, v in losses.items() if 'loss_era' in k}
    assert set(found) == {
        'loss_era_align',
        'loss_era_residual',
        'loss_era_logit',
        'loss_era_box',
        'loss_era_twi_logit',
        'loss_era_twi_box',
    }
    for key, value in found.items():
        assert abs(value) < 1e-9, key
    # And something where its estimates are not exact.
    model = twin(tmp_path, head, half=True, twi_steps='all')
    model.distillers['distiller'].explained.fill_(1)
    losses = model(**batch_of(model), mode='loss')
    assert losses['loss_era_twi_logit'] > 0.01
    assert losses['loss_era_twi_box'] > 0.01
    assert abs(losses['loss_era_logit']) < 1e-9


def test_twin__predicts_as_the_teacher_in_every_mode(tmp_path):
    # mmcv's NMS takes no doubles.
    model = twin(tmp_path).eval().float()
    data = batch_of(model)
    model.active_modes = ('E0', 'E1', 'T', 'ST')
    with torch.no_grad():
        own = model(**data, mode='predict')
    for mode in model.active_modes:
        for a, b in zip(own, model.mode_predictions[mode], strict=True):
            assert len(a.pred_instances)
            for key in ('scores', 'bboxes'):
                torch.testing.assert_close(
                    a.pred_instances[key],
                    b.pred_instances[key],
                    rtol=1e-4,
                    atol=1e-3,
                )


# -- two stages ---------------------------------------------------------------


def two_stages(folder, agnostic=False, norm=False, **kwargs):
    teacher = two_stage_config(16, 24, agnostic)
    model = build(
        save_teacher(teacher, folder / 'teacher.pth'),
        student=two_stage_config(agnostic=agnostic, norm=norm),
        teacher=teacher,
        **(dict(mbrnet=dict(num_branches=2)) | kwargs),
    )
    with torch.no_grad():
        # A fresh head says the same of every region.
        head = model.teachers['teacher'].model.roi_head.bbox_head
        head.fc_cls.weight.mul_(100)
        head.fc_reg.weight.mul_(100)
    return model


def recorded(model, data):
    """Features of both as the distiller gets them."""
    with model.wiring.recorder as recorder:
        model.student(**data, mode='loss')
    return dict(
        student_feats=recorder.pop(),
        teacher_feats=model.teachers['teacher'].extract(data['inputs']),
    )


@pytest.mark.parametrize('agnostic', [False, True])
@pytest.mark.parametrize('topk', [7, 100])
def test_roi__against_a_slow_reference(agnostic, topk, tmp_path):
    # From the docstring of DetectorTerm, region by region.
    model = two_stages(
        tmp_path,
        agnostic,
        norm=True,
        logit=dict(weight=3.0, box_weight=0.5, topk=topk),
    )
    era = model.distillers['distiller']
    assert type(era.logit) is RoITerm
    data = batch_of(model)
    feats = recorded(model, data)
    losses = era.loss(**feats, data_samples=data['data_samples'])
    samples = era._proposals.attach(
        feats['student_feats'], data['data_samples']
    )
    hosts = [
        copy.deepcopy(one).eval().roi_head
        for one in (model.student, model.teachers['teacher'].model)
    ]
    maps = [feats[f'{who}_feats']['neck'] for who in ('student', 'teacher')]
    rows = []
    for image, sample in enumerate(samples):
        # Not the 10 proposals of a test, but at most the 20 of training.
        assert 10 < len(sample.proposals) <= 20
        for box in sample.proposals.bboxes[:topk]:
            row = []
            for roi_head, own in zip(hosts, maps, strict=True):
                roi = torch.cat([box.new_zeros(1), box])[None]
                with torch.no_grad():
                    found = roi_head._bbox_forward(
                        [level[image : image + 1] for level in own], roi
                    )
                row += [
                    found['cls_score'][0].double(),
                    found['bbox_pred'][0].double(),
                ]
            rows.append(row)
    number = 4 * topk
    assert (len(rows) == number) == (topk == 7)
    q = torch.stack([row[2].softmax(0) for row in rows])
    p = torch.stack([row[0].softmax(0) for row in rows])

    def kl(one, other):
        return sum(
            float(a * (a / b).log()) for a, b in zip(one, other, strict=True)
        )

    unit = sum(kl(row, q.mean(0)) for row in q) / len(rows)
    score = sum(kl(a, b) for a, b in zip(q, p, strict=True))
    sure = [1 - float(row[-1]) for row in q]
    at = [
        slice(0, 4)
        if agnostic
        else slice(4 * int(row[:3].argmax()), 4 * int(row[:3].argmax()) + 4)
        for row in q
    ]
    t = [row[3][part] for row, part in zip(rows, at, strict=True)]
    b = [row[1][part] for row, part in zip(rows, at, strict=True)]
    share = sum(sure) / len(rows)
    box = 0.0
    for side in range(4):
        values = [float(x[side]) for x in t]
        weighed = zip(sure, values, strict=True)
        mean = sum(w * x for w, x in weighed) / sum(sure)
        var = sum(
            w * (x - mean) ** 2 for w, x in zip(sure, values, strict=True)
        )
        scale = share * math.sqrt(var / sum(sure))
        box += sum(
            w * abs(float(x[side]) - y) / scale / 4
            for w, x, y in zip(sure, b, values, strict=True)
        )
    # Regions of several classes.
    assert (len({part.start for part in at}) > 1) != agnostic
    expected = {
        'loss_era_logit': 3 * score / number / unit,
        'loss_era_box': 0.5 * box / number,
    }
    for key, value in expected.items():
        assert value > 1e-2, key
        assert losses[key].item() == pytest.approx(value, rel=1e-3), key


def test_roi__is_the_default_of_two_stages(tmp_path):
    model = two_stages(tmp_path)
    era = model.distillers['distiller']
    assert type(era.logit) is RoITerm
    assert era.logit.topk == 100
    assert era.twi_targets == 'teacher'
    losses = model(**batch_of(model), mode='loss')
    assert {key for key in losses if 'loss_era' in key} == {
        'loss_era_align',
        'loss_era_residual',
        'loss_era_logit',
        'loss_era_box',
        'loss_era_twi_logit',
        'loss_era_twi_box',
        'loss_era_twi_rpn_logit',
        'loss_era_twi_rpn_box',
    }


def test_roi__terms_reach_the_students_own_head(tmp_path):
    model = two_stages(tmp_path)
    losses = model(**batch_of(model), mode='loss')
    head = model.student.roi_head.bbox_head
    for term, hears, rests in (
        ('logit', head.fc_cls, head.fc_reg),
        ('box', head.fc_reg, head.fc_cls),
    ):
        model.zero_grad()
        losses[f'loss_era_{term}'].backward(retain_graph=True)
        assert hears.weight.grad.any()
        assert rests.weight.grad is None
        assert model.student.backbone.conv1.weight.grad.any()
        # Regions are given, not learnt.
        rpn = model.student.rpn_head
        assert all(p.grad is None for p in rpn.parameters())


def test_roi__leaves_norms_and_random_state_alone(tmp_path):
    model = two_stages(tmp_path, norm=True)
    norms = [
        module
        for module in model.student.roi_head.modules()
        if isinstance(module, _BatchNorm)
    ]
    assert norms
    era = model.distillers['distiller']
    data = batch_of(model)
    feats = recorded(model, data)
    before = copy.deepcopy(model.student.state_dict())
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    losses = era.loss(**feats, data_samples=data['data_samples'])
    assert losses['loss_era_logit'] > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert all(norm.training for norm in norms)
    for key, value in model.student.state_dict().items():
        assert torch.equal(value, before[key]), key
    # Proposals of the data samples are not those of the loss.
    assert not any('proposals' in s for s in data['data_samples'])


def test_roi__has_its_regions_without_twi(tmp_path):
    model = two_stages(tmp_path, twi_steps='none')
    assert type(model.distillers['distiller'].logit) is RoITerm
    losses = model(**batch_of(model), mode='loss')
    assert {key for key in losses if 'loss_era' in key} == {
        'loss_era_align',
        'loss_era_residual',
        'loss_era_logit',
        'loss_era_box',
    }
    assert losses['loss_era_logit'] > 0


def test_roi__leaves_norms_alone_when_built(tmp_path):
    model = two_stages(tmp_path, norm=True)
    norms = [
        module
        for module in model.student.roi_head.modules()
        if isinstance(module, _BatchNorm)
    ]
    assert norms
    assert all(norm.num_batches_tracked == 0 for norm in norms)


def test_compare__gives_a_teacher_its_own_images(tmp_path, monkeypatch):
    teacher = detector_config(width=16, channels=24)
    teacher['data_preprocessor'] = teacher['data_preprocessor'] | dict(
        mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0]
    )
    model = build(
        save_teacher(teacher, tmp_path / 'teacher.pth'), teacher=teacher
    )
    model.load_teachers()
    extract, seen = model.teachers['teacher'].extract, []

    def spy(inputs, samples=None):
        seen.append(inputs)
        return extract(inputs, samples)

    monkeypatch.setattr(model.teachers['teacher'], 'extract', spy)
    data = detection_batch(2)
    model(**model.data_preprocessor(detection_batch(2), True), mode='loss')
    model.compare(data)
    assert torch.equal(seen[0], seen[1])
    assert seen[0].mean() > 50


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder',
                    target_stds=[0.1, 0.1, 0.2, 0.2],
                )
            ),
            'the two RoI heads encode them with different settings',
        ),
        (
            dict(reg_class_agnostic=True),
            'the two RoI heads encode them with different settings',
        ),
    ],
)
def test_roi__boxes_of_another_code_are_left_out(
    change, message, tmp_path, monkeypatch
):
    said = []
    monkeypatch.setattr(
        'era_mm.heads.detector_term.print_log',
        lambda text, **kwargs: said.append(text),
    )
    teacher = two_stage_config(16, 24)
    teacher['roi_head']['bbox_head'] |= change
    model = build(student=two_stage_config(), teacher=teacher)
    assert len(said) == 1
    assert message in said[0]
    losses = model(**batch_of(model), mode='loss')
    assert losses['loss_era_logit'] > 0
    assert 'loss_era_box' not in losses


def test_roi__without_any_proposal_is_zero(tmp_path):
    model = two_stages(tmp_path)
    era = model.distillers['distiller']
    data = batch_of(model)
    feats = recorded(model, data)
    samples = data['data_samples']
    for sample in samples:
        sample.proposals = InstanceData(bboxes=torch.zeros(0, 4))
    said = era.logit.target(
        era.twi_head, feats['teacher_feats']['neck'], samples
    )
    era.logit.measure(said)
    terms = era.logit.of_student(feats['student_feats'], said)
    for name, value in terms.items():
        assert value == 0, name
    value = era.logit.score_unit.value
    assert value.isfinite()
    assert era.logit.box_unit.value.isfinite().all()


# -- the hook -----------------------------------------------------------------


class Listener:
    """What is said in a run's log."""

    def __init__(self, runner):
        self.lines = []
        self.logger = runner.logger
        info = runner.logger.info

        def listen(message, *args, **kwargs):
            self.lines.append(message)
            info(message, *args, **kwargs)

        runner.logger.info = listen


def validated(make_runner, model, batches=None, epochs=1):
    """The metrics of a run's last validation, and what it says."""
    from mmengine.hooks import Hook

    class Metrics(Hook):
        priority = 'LOWEST'

        def after_val_epoch(self, runner, metrics=None):
            self.found = dict(metrics)

    hook = dict(type='era_mm.TWIHook', modes=['S'])
    if batches is not None:
        hook |= dict(unexplained_batches=batches)
    runner = make_runner(
        model,
        custom_hooks=[hook],
        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=1),
        optim_wrapper=dict(
            type='OptimWrapper', optimizer=dict(type='SGD', lr=0.0)
        ),
    )
    metrics = Metrics()
    runner.register_hook(metrics)
    listener = Listener(runner)
    runner.train()
    shares = {k: v for k, v in metrics.found.items() if 'unexplained' in k}
    idle = [line for line in listener.lines if 'adds less' in line]
    return runner, shares, idle


def left_by(space, estimate, targets):
    """Share of the teacher's variance that an estimate leaves."""
    shares = []
    for level, (e, t) in enumerate(zip(estimate, targets, strict=True)):
        _, std = space.statistics(level)
        error = (((e - t) / std.view(1, -1, 1, 1)) ** 2).mean()
        shares.append(float(error * space.share_weights[level]))
    return sum(shares) / len(shares)


@pytest.mark.parametrize('batches', [1, 3, None])
def test_hook__reports_what_the_first_batches_leave(
    batches, make_runner, teacher_file
):
    era = dict(type='era_mm.ERADistiller', mbrnet=dict(num_branches=2))
    runner, shares, lines = validated(
        make_runner,
        distillation_config(era, checkpoint=teacher_file),
        batches,
    )
    model = runner.model.eval()
    net = model.distillers['distiller'].mbrnet
    teacher = model.teachers['teacher'].model
    found = []
    # Eight images in four batches.
    for data in list(runner.val_dataloader)[: batches or 8]:
        inputs = model.data_preprocessor(data, False)['inputs']
        with torch.no_grad():
            targets = teacher.extract_feat(inputs)
            steps = net.estimates(model.student.extract_feat(inputs))
        found.append([left_by(net.space, step, targets) for step in steps])
    assert len(found) == (batches or 4)
    expected = [
        sum(column) / len(found) for column in zip(*found, strict=True)
    ]
    assert list(shares) == [f'era/unexplained_e{k}' for k in range(3)]
    assert list(shares.values()) == pytest.approx(expected, rel=1e-4)
    # Branches that have not learnt yet add nothing.
    assert len(lines) == 1
    assert 'branch 1, 2 adds less than 0.1%' in lines[0]
    assert f'e_0 leaves {expected[0]:.1%} and e_2' in lines[0]


def test_hook__names_the_idle_branches_alone(
    make_runner, teacher_file, monkeypatch
):
    era = dict(type='era_mm.ERADistiller', mbrnet=dict(num_branches=3))
    found = []
    compare = ERADistiller.compare

    def spy(self, **feats):
        found.append(compare(self, **feats))
        # The second takes nothing away, the third makes it worse; in the
        # first of two validations all were better.
        shares = torch.tensor([0.5, 0.3, 0.2995, 0.31])
        return shares if len(found) > 4 else shares / 2

    monkeypatch.setattr(ERADistiller, 'compare', spy)
    _, shares, lines = validated(
        make_runner,
        distillation_config(era, checkpoint=teacher_file),
        epochs=2,
    )
    assert len(found) == 2 * 4
    assert all(values.shape == (4,) for values in found)
    assert list(shares.values()) == pytest.approx([0.5, 0.3, 0.2995, 0.31])
    assert len(lines) == 2
    assert lines[1] == (
        "era: of the teacher's variance e_0 leaves 50.0% and e_3 31.0%; "
        'branch 2, 3 adds less than 0.1%.'
    )


@pytest.mark.parametrize(
    ('options', 'batches'),
    [(dict(), 0), (dict(form='released'), None)],
    ids=['none asked for', 'no space'],
)
def test_hook__reports_nothing_without_batches_or_space(
    options, batches, make_runner, teacher_file
):
    era = dict(type='era_mm.ERADistiller', **options)
    _, shares, lines = validated(
        make_runner,
        distillation_config(era, checkpoint=teacher_file),
        batches,
    )
    assert shares == {}
    assert lines == []


def test_hook__tells_several_distillers_apart(make_runner, teacher_file):
    era = dict(type='era_mm.ERADistiller', mbrnet=dict(num_branches=1))
    _, shares, lines = validated(
        make_runner,
        distillation_config(
            dict(
                one=era,
                two=dict(era, source='backbone'),
                other=dict(type='era_mm.FeatureImitationDistiller'),
            ),
            checkpoint=teacher_file,
        ),
    )
    assert list(shares) == [
        f'{name}.era/unexplained_e{k}'
        for name in ('one', 'two')
        for k in (0, 1)
    ]
    assert [line.partition(':')[0] for line in lines] == ['one.era', 'two.era']


def test_hook__refuses_a_negative_number():
    with pytest.raises(ValueError, match='must not be negative, but got -1'):
        TWIHook(unexplained_batches=-1)
