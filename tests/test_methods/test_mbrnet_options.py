"""Options of MBRNet and of ERA's loss, each by what it changes."""

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmpretrain.structures import DataSample
from torch import nn
from torch.nn import functional as F  # noqa: N812

from era_mm.engine.measure import Member
from era_mm.engine.pairing import Pair
from era_mm.methods.era import ERADistiller, ERALoss, MBRNet, mbrnet
from era_mm.methods.era.building import ChannelLayerNorm
from era_mm.testing import (
    detection_batch,
    detector_config,
    era_model,
    noise,
)

# One level's feature of each rank: vectors, sequences, maps.
SHAPES = {0: (6, 4), 1: (3, 4, 5), 2: (3, 4, 5, 2)}
RANKS = sorted(SHAPES)
CLOSE = dict(rtol=1e-9, atol=1e-11)


def feature(dims, seed=0, channels=4):
    n, _, *space = SHAPES[dims]
    return noise(n, channels, *space, seed=seed)


def make(dims, out=5, seed=0, **kwargs):
    """A net whose every weight is of ordinary size, float64, in training."""
    torch.manual_seed(seed)
    net = MBRNet(4, out, spatial_dims=dims, **kwargs).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net.train()


# -- a slow reference ---------------------------------------------------------


def norm_by_hand(layer, x, kind):
    """Normalise ``(N, C, *)``, group by group of values."""
    out = torch.empty_like(x)
    flat = x.reshape(*x.shape[:2], -1)  # (N, C, P)
    target = out.view(*flat.shape)
    samples, channels, positions = flat.shape
    if kind in ('BN', 'SyncBN'):
        groups = [(slice(None), c, slice(None)) for c in range(channels)]
    elif kind == 'LN':
        groups = [
            (n, slice(None), p)
            for n in range(samples)
            for p in range(positions)
        ]
    else:
        half = channels // 2  # GN with two groups
        groups = [
            (n, slice(g * half, (g + 1) * half), slice(None))
            for n in range(samples)
            for g in range(2)
        ]
    for group in groups:
        values = flat[group]
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        target[group] = (values - mean) / (variance + 1e-5).sqrt()
    shape = (1, channels, *[1] * (x.dim() - 2))
    return out * layer.weight.view(shape) + layer.bias.view(shape)


def layer_by_hand(layer, x):
    if isinstance(layer, nn.Linear):
        return x @ layer.weight.T + layer.bias
    convolve = F.conv1d if x.dim() == 3 else F.conv2d
    padding = layer.weight.shape[-1] // 2
    return convolve(x, layer.weight, layer.bias, padding=padding)


def residuals_by_hand(net, x, kind='BN', act=torch.relu, branches=None):
    """What era.md sections 1.3, 1.4 and 2 say, written out."""
    hidden, residuals = [], []
    for index, branch in enumerate(net.levels[0]):
        if net.topology == 'parallel' or index == 0:
            y = x
        elif net.topology == 'serial':
            y = hidden[-1]
        else:
            y = x + sum(hidden)
        for k, layer in enumerate(branch.layers):
            y = act(y) if k else y
            y = norm_by_hand(branch.norms[k][0], layer_by_hand(layer, y), kind)
        hidden.append(y)
        for projection in (branch.projection, net.projections[0]):
            if not isinstance(projection, nn.Identity):
                y = layer_by_hand(projection, y)
        residuals.append(y)
    return residuals


@pytest.mark.parametrize('dims', RANKS)
@pytest.mark.parametrize('topology', MBRNet.TOPOLOGIES)
@pytest.mark.parametrize('out', [4, 5])
@pytest.mark.parametrize('shared', [False, True])
def test_topology__against_a_slow_reference(dims, topology, out, shared):
    net = make(
        dims,
        out,
        num_branches=3,
        topology=topology,
        share_projection=shared,
        act_cfg=dict(type='ReLU'),
    )
    x = feature(dims)
    found = net.residuals([x])
    expected = residuals_by_hand(net, x)
    assert len(found) == 3
    for (d,), r in zip(found, expected, strict=True):
        assert d.shape == (x.shape[0], out, *x.shape[2:])
        torch.testing.assert_close(d, r, **CLOSE)


@pytest.mark.parametrize('topology', ['serial', 'accumulated'])
def test_topology__is_another_function_than_parallel(topology):
    nets = [make(0, topology=t) for t in ('parallel', topology)]
    nets[1].load_state_dict(nets[0].state_dict())
    (one, two, *_), (same, other, *_) = (
        [d for (d,) in net.residuals([feature(0)])] for net in nets
    )
    assert torch.equal(one, same)
    assert (two - other).abs().max() > 0.1


@pytest.mark.parametrize(
    ('topology', 'reached'),
    [('parallel', {2}), ('serial', {0, 1, 2}), ('accumulated', {0, 1, 2})],
)
def test_topology__which_branches_a_residual_trains(topology, reached):
    net = make(0, num_branches=4, topology=topology)
    (net.residuals([feature(0)])[2][0] ** 2).sum().backward()
    found = {
        i
        for i, branch in enumerate(net.levels[0])
        if branch.layers[0].weight.grad is not None
    }
    assert found == reached


@pytest.mark.parametrize('dims', RANKS)
@pytest.mark.parametrize(('branches', 'blocks'), [(1, 1), (2, 3), (5, 2)])
def test_branches_and_blocks__by_number(dims, branches, blocks):
    net = make(dims, num_branches=branches, num_blocks=blocks)
    assert [len(level) for level in net.levels] == [branches]
    assert {len(branch.layers) for branch in net.levels[0]} == {blocks}
    x = feature(dims)
    found, expected = net.residuals([x]), residuals_by_hand(net, x)
    assert len(found) == branches
    for (d,), r in zip(found, expected, strict=True):
        torch.testing.assert_close(d, r, **CLOSE)
    # The first ones alone, as the modes E_i need them.
    for count in range(branches + 1):
        some = net.residuals([x], count)
        assert len(some) == count
        for (d,), r in zip(some, expected, strict=False):
            torch.testing.assert_close(d, r, **CLOSE)


def test_branches__draw_no_more_than_is_asked_for():
    net = make(0, num_branches=3)
    calls = []
    for index, branch in enumerate(net.levels[0]):
        branch.layers[0].register_forward_hook(
            lambda *_, index=index: calls.append(index)
        )
    net.estimates([feature(0)], 2)
    assert calls == [0, 1]


# -- norms --------------------------------------------------------------------

NORMS = {
    'BN': dict(type='BN'),
    'SyncBN': dict(type='SyncBN'),
    'LN': dict(type='LN'),
    'GN': dict(type='GN', num_groups=2),
}


@pytest.mark.parametrize('dims', RANKS)
@pytest.mark.parametrize('kind', NORMS)
def test_norm__against_a_slow_reference(dims, kind):
    net = make(dims, num_branches=2, norm_cfg=NORMS[kind])
    x = feature(dims)
    for (d,), r in zip(
        net.residuals([x]), residuals_by_hand(net, x, kind), strict=True
    ):
        torch.testing.assert_close(d, r, **CLOSE)


@pytest.mark.parametrize('dims', RANKS)
@pytest.mark.parametrize('kind', ['LN', 'GN'])
def test_norm__without_running_statistics_is_one_at_test(dims, kind):
    net = make(dims, norm_cfg=NORMS[kind])
    x = feature(dims)
    trained = net([x])[0]
    torch.testing.assert_close(net.eval()([x])[0], trained, **CLOSE)
    # And of one sample by itself.
    torch.testing.assert_close(net([x[:1]])[0], trained[:1], **CLOSE)
    assert not list(net.buffers())


@pytest.mark.parametrize('share', [False, True])
@pytest.mark.parametrize('kind', NORMS)
def test_norm__statistics_and_weights_are_per_level(kind, share):
    net = MBRNet(
        4, 4, num_levels=3, share_levels=share, norm_cfg=NORMS[kind]
    ).double()
    norms = [
        module
        for module in net.modules()
        if hasattr(module, 'bias') and not hasattr(module, 'in_channels')
    ]
    # 3 levels, 4 branches, 2 blocks; none in two places.
    assert len(norms) == len({id(norm.weight) for norm in norms}) == 24
    assert len({id(branch) for level in net.levels for branch in level}) == (
        4 if share else 12
    )
    feats = [feature(2, seed) for seed in range(3)]
    before = net.residuals(feats)
    levels = net.levels[0 if share else 1]
    nn.init.zeros_(levels[0].norms[-1][1 if share else 0].weight)
    after = net.residuals(feats)
    changed = [
        not torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)
    ]
    assert changed == [False, True, False]


def test_norm__ln2d_is_ln_and_layouts_are_plain():
    one, two = (make(2, norm_cfg=dict(type=t)) for t in ('LN', 'LN2d'))
    two.load_state_dict(one.state_dict())
    x = feature(2)
    assert torch.equal(one([x])[0], two([x])[0])
    layer = ChannelLayerNorm(4).double()
    assert layer(x).is_contiguous()


@pytest.mark.parametrize('dims', RANKS)
def test_norm__syncbn_on_a_cpu_and_converted(dims):
    # One process: SyncBN is BN, and becomes and un-becomes it.
    plain = make(dims, norm_cfg=dict(type='BN', momentum=0.01))
    synced = make(dims, norm_cfg=dict(type='SyncBN', momentum=0.01))
    kinds = {type(m) for m in synced.modules()}
    assert any(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)
    assert not any('BatchNorm1d' in k.__name__ for k in kinds)
    x = feature(dims)
    expected = plain([x])[0]
    torch.testing.assert_close(synced([x])[0], expected, **CLOSE)
    at_test = plain.eval()([x])[0]
    for net in (
        synced,
        revert_sync_batchnorm(synced),
        convert_sync_batchnorm(plain),
    ):
        torch.testing.assert_close(net.eval()([x])[0], at_test, **CLOSE)
    converted = [m for m in plain.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(converted) == 8
    assert {m.momentum for m in converted} == {0.01}


@pytest.mark.parametrize(
    ('dims', 'kind'),
    [(0, nn.BatchNorm1d), (1, nn.BatchNorm1d), (2, nn.BatchNorm2d)],
)
def test_norm__default_is_batch_norm_with_the_released_momentum(dims, kind):
    net = MBRNet(4, 4, spatial_dims=dims)
    norms = [m for m in net.modules() if hasattr(m, 'momentum')]
    assert len(norms) == 8
    assert {(type(m), m.momentum) for m in norms} == {(kind, 0.01)}


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(norm_cfg=dict(type='GN')), 'needs `num_groups`.*4 channels'),
        (dict(norm_cfg=dict(type='GN', num_groups=3)), 'divisible'),
        (dict(topology='paralel'), "'parallel', .*'paralel'"),
        (dict(reduction='avg'), "'sum', 'mean'.*'avg'"),
        (dict(branch='wide'), "'released', 'bottleneck'.*'wide'"),
        (dict(branch='bottleneck', spatial_dims=0), 'for maps and sequences'),
        (
            dict(branch_width=8),
            "`branch_width` is not an option of 'released'",
        ),
        *(
            (
                dict(branch='bottleneck') | option,
                f"`{next(iter(option))}` is not an option of 'bottleneck'",
            )
            for option in (
                dict(num_blocks=3),
                dict(topology='serial'),
                dict(share_projection=True),
                dict(share_levels=True),
                dict(group_width=2),
                dict(zero_init=True),
            )
        ),
    ],
)
def test_options__refused_when_built(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MBRNet(4, 4, **kwargs)


# -- activations --------------------------------------------------------------

ACTIVATIONS = [
    (None, torch.relu),
    (dict(type='ReLU'), torch.relu),
    (dict(type='GELU'), F.gelu),
    (dict(type='Mish'), lambda x: x * torch.tanh(torch.log1p(x.exp()))),
    (dict(type='PReLU'), lambda x: x.clamp(min=0) + 0.25 * x.clamp(max=0)),
    # As released, where PyTorch has 0.01.
    (
        dict(type='LeakyReLU'),
        lambda x: x.clamp(min=0) + 0.2 * x.clamp(max=0),
    ),
    (
        dict(type='LeakyReLU', negative_slope=0.1),
        lambda x: x.clamp(min=0) + 0.1 * x.clamp(max=0),
    ),
]


@pytest.mark.parametrize(('cfg', 'function'), ACTIVATIONS)
def test_activation__between_the_blocks_and_not_after_the_last(cfg, function):
    net = make(0, num_branches=2, num_blocks=3, act_cfg=cfg)
    for module in net.modules():
        if isinstance(module, nn.PReLU):
            nn.init.constant_(module.weight, 0.25)
    x = feature(0)
    for (d,), r in zip(
        net.residuals([x]),
        residuals_by_hand(net, x, act=function),
        strict=True,
    ):
        torch.testing.assert_close(d, r, **CLOSE)


def test_activation__that_learns_has_a_weight_per_block():
    net = make(0, num_blocks=3, act_cfg=dict(type='PReLU'))
    slopes = [m.weight for m in net.modules() if isinstance(m, nn.PReLU)]
    assert len(slopes) == 4 * 2
    sum((d**2).sum() for (d,) in net.residuals([feature(0)])).backward()
    assert all(slope.grad.abs() > 0 for slope in slopes)


# -- the shared projection ----------------------------------------------------


def projections(net):
    return [
        name
        for name, _ in net.named_parameters()
        if 'projection' in name and name.endswith('weight')
    ]


def test_shared_projection__one_per_level_for_all_branches():
    options = dict(num_levels=2, spatial_dims=0)
    net = MBRNet(4, 6, **options)
    assert len(projections(net)) == 8
    net = MBRNet(4, 6, share_projection=True, **options)
    assert projections(net) == ['projections.0.weight', 'projections.1.weight']
    net = MBRNet(4, 6, share_projection=True, share_levels=True, **options)
    assert projections(net) == ['projections.0.weight']
    # Only where the channels differ.
    net = MBRNet([4, 6], [6, 6], share_projection=True, **options)
    assert projections(net) == ['projections.0.weight']


def test_shared_projection__gets_every_branchs_gradient():
    net = make(0, num_branches=3, share_projection=True)
    x = feature(0)
    residuals = [d for (d,) in net.residuals([x])]
    weight = net.projections[0].weight
    total = torch.autograd.grad(
        sum((d**2).sum() for d in residuals), weight, retain_graph=True
    )[0]
    # dL/dW = sum_i 2 d_i^T h_i.
    hidden = [branch.hidden(x) for branch in net.levels[0]]
    expected = sum(2 * d.T @ h for d, h in zip(residuals, hidden, strict=True))
    torch.testing.assert_close(total, expected, **CLOSE)


@pytest.mark.parametrize('dims', [0, 2])
def test_shared_projection__starts_like_the_released_one(dims):
    net = MBRNet(64, 256, spatial_dims=dims, share_projection=True)
    net.init_weights()
    (projection,) = net.projections
    std = 0.01 if dims == 0 else (2 / 256) ** 0.5
    assert projection.weight.std().item() == pytest.approx(std, rel=0.1)
    assert not projection.bias.any()


def test_shared_projection__says_where_it_has_no_effect(monkeypatch):
    said = []
    monkeypatch.setattr(mbrnet, 'print_log', lambda text, **_: said.append(1))
    net = MBRNet(4, 4, share_projection=True)
    assert said
    assert not projections(net)
    said.clear()
    MBRNet(4, 6, share_projection=True)
    MBRNet(4, 4)
    assert not said


# -- sum or mean --------------------------------------------------------------


@pytest.mark.parametrize('dims', RANKS)
def test_reduction__by_hand(dims):
    net = make(dims, num_branches=3)
    x = feature(dims)
    u = net.align([x])[0]
    one, two, three = (d for (d,) in net.residuals([x]))
    expected = {
        'sum': [u, u + one, u + one + two, u + one + two + three],
        'mean': [
            u,
            u + one,
            u + (one + two) / 2,
            u + (one + two + three) / 3,
        ],
    }
    for reduction, steps in expected.items():
        net.reduction = reduction
        found = net.estimates([x])
        assert len(found) == 4
        for (e,), step in zip(found, steps, strict=True):
            torch.testing.assert_close(e, step, **CLOSE)
        assert torch.equal(net([x])[0], found[-1][0])
        for count in range(4):
            few = net.estimates([x], count)
            assert len(few) == count + 1
            assert torch.equal(few[-1][0], found[count][0])


@pytest.fixture
def build(classifiers):
    """A classifier pair in float64."""

    def built(**kwargs):
        torch.manual_seed(0)
        era = dict(type='era_mm.ERADistiller', **kwargs)
        return classifiers(era).double()

    return built


def batch(num=6):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(
        num, 3, 32, 32, generator=generator, dtype=torch.float64
    )
    return inputs, [DataSample().set_gt_label(i % 3) for i in range(num)]


@torch.no_grad()
@pytest.mark.parametrize('reduction', ['sum', 'mean'])
@pytest.mark.parametrize('topology', MBRNet.TOPOLOGIES)
def test_modes__are_the_same_estimates_as_the_neck(build, reduction, topology):
    options = dict(num_branches=3, reduction=reduction, topology=topology)
    model = build(mbrnet=options, alpha=0.25).eval()
    inputs, samples = batch()
    model.active_modes = ('E0', 'E1', 'E2', 'T', 'ST')
    model(inputs, samples, mode='predict')
    feats = model.student.extract_feat(inputs)
    net = model.distillers['distiller'].mbrnet
    head = model.teachers['teacher'].model.head
    u, d = net.align(feats)[0], [d for (d,) in net.residuals(feats)]
    mean = reduction == 'mean'
    estimates = {
        'E0': u,
        'E1': u + d[0],
        'E2': u + (d[0] + d[1]) / (2 if mean else 1),
        'T': u + (d[0] + d[1] + d[2]) / (3 if mean else 1),
    }
    z = {mode: head((e,)) for mode, e in estimates.items()}
    z['ST'] = 0.75 * model.student.head(feats) + 0.25 * z['T']
    for mode, logits in z.items():
        found = torch.stack(
            [s.pred_score for s in model.mode_predictions[mode]]
        )
        torch.testing.assert_close(found, logits.softmax(1), **CLOSE)
    # A stock model with this neck is mode T.
    torch.testing.assert_close(net(feats)[0], estimates['T'], **CLOSE)


def test_reduction__leaves_training_as_it_is(build):
    found = []
    for reduction in ('sum', 'mean'):
        model = build(mbrnet=dict(reduction=reduction))
        losses = model(*batch(), mode='loss')
        found.append({k: v.item() for k, v in losses.items()})
    assert found[0] == found[1]


# -- the loss -----------------------------------------------------------------


@pytest.mark.parametrize('dims', RANKS)
def test_loss__against_slow_loops(dims):
    # Two levels, three branches; every value by itself.
    levels, scales = 2, (1.0, 0.3, 0.1)
    u = [feature(dims, level) for level in range(levels)]
    t = [feature(dims, 10 + level) for level in range(levels)]
    d = [
        [feature(dims, 20 + 2 * i + level) for level in range(levels)]
        for i in range(3)
    ]
    r = [
        [feature(dims, 40 + 2 * i + level) for level in range(levels)]
        for i in range(3)
    ]

    def mse(a, b):
        pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
        squares = [(x - y) ** 2 for x, y in pairs]
        return sum(squares) / len(squares)

    loss = ERALoss(align_weight=2.0, residual_weight=3.0, scales=scales)
    found = loss(aligned=u, residuals=d, targets=r, teacher_feats=t)
    align = sum(mse(u[level], t[level]) for level in range(levels))
    branch = [
        sum(mse(d[i][level], r[i][level]) for level in range(levels))
        for i in range(3)
    ]
    residual = sum(s / 3 * b for s, b in zip(scales, branch, strict=True))
    assert found['loss_era_align'].item() == pytest.approx(2 * align)
    assert found['loss_era_residual'].item() == pytest.approx(3 * residual)
    assert [found[f'era_mse_e{i}'].item() for i in range(4)] == pytest.approx(
        [align, *branch]
    )


def test_scales__weigh_each_branch_and_its_head_loss(build):
    scales = (0.7, 0.0, 0.2)
    model = build(mbrnet=dict(num_branches=3), loss=dict(scales=scales))
    losses = model(*batch(), mode='loss')
    expected = sum(
        s / 3 * losses[f'era_mse_e{i}'] for i, s in enumerate(scales, start=1)
    )
    torch.testing.assert_close(losses['loss_era_residual'].detach(), expected)
    assert model.distillers['distiller'].loss_terms.step_weights(3) == [
        1.0,
        *(s / 3 for s in scales),
    ]


def head_losses(model, inputs, samples):
    """Cross-entropy of the teacher's head on e_0 ... e_n, in eval mode."""
    feats = model.student.extract_feat(inputs)
    net = model.distillers['distiller'].mbrnet
    head = model.teachers['teacher'].model.head
    labels = torch.cat([s.gt_label for s in samples])
    return [
        F.cross_entropy(head((e,)), labels) for (e,) in net.estimates(feats)
    ]


@pytest.mark.parametrize(
    ('steps', 'weights'),
    [
        ('all', [0, 1 / 2, 1 / 4]),
        ('last', [0, 0, 3 / 4]),
    ],
)
def test_twi_on_aligned__off_takes_e0_out(build, steps, weights):
    model = build(
        mbrnet=dict(num_branches=2),
        loss=dict(twi_on_aligned=False),
        twi_steps=steps,
        # It runs the head on the teacher's own feature.
        logit=None,
    ).eval()
    calls = []
    head = model.teachers['teacher'].model.head
    inputs, samples = batch()
    expected = sum(
        w * loss
        for w, loss in zip(
            weights, head_losses(model, inputs, samples), strict=True
        )
    )
    head.fc.register_forward_hook(lambda _, args, __: calls.append(*args))
    found = model(inputs, samples, mode='loss')['loss_era_twi_cls']
    torch.testing.assert_close(found, expected, **CLOSE)
    # Nor is the head run for nothing: once, on what is judged.
    (judged,) = calls
    assert len(judged) == len(samples) * sum(w > 0 for w in weights)


def test_twi_on_aligned__on_is_the_default(build):
    model = build(mbrnet=dict(num_branches=2)).eval()
    inputs, samples = batch()
    zero, one, two = head_losses(model, inputs, samples)
    found = model(inputs, samples, mode='loss')['loss_era_twi_cls']
    torch.testing.assert_close(found, zero + one / 2 + two / 4, **CLOSE)


def test_logit__kl_dist_or_none(build):
    inputs, samples = batch()
    for logit in (
        None,
        'auto',
        dict(),
        dict(kind='dist', weight=3.0, temperature=2),
    ):
        model = build(logit=logit).eval()
        losses = model(inputs, samples, mode='loss')
        if logit is None:
            assert 'loss_era_logit' not in losses
            continue
        s = model.student.head(model.student.extract_feat(inputs))
        teacher = model.teachers['teacher'].model
        t = teacher.head(teacher.extract_feat(inputs))
        if logit in ('auto', dict()):
            p = t.softmax(1)
            expected = 2 * (p * (p.log() - s.log_softmax(1))).sum() / len(s)
        else:
            s, t = (s / 2).softmax(1), (t / 2).softmax(1)

            def rho(a, b):
                a, b = a - a.mean(), b - b.mean()
                return (a * b).sum() / (a.norm() * b.norm() + 1e-8)

            rows = [rho(*pair) for pair in zip(s, t, strict=True)]
            columns = [rho(*pair) for pair in zip(s.T, t.T, strict=True)]
            expected = 2 - sum(rows) / len(rows) - sum(columns) / len(columns)
            expected = 3 * 2**2 * expected
        torch.testing.assert_close(losses['loss_era_logit'], expected, **CLOSE)


# -- neither boxes nor classes ------------------------------------------------


class Dense(nn.Module):
    """A head that tells one number per position; `y` holds what it is."""

    def __init__(self, dims, channels):
        super().__init__()
        layers = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d}
        kernel = [1] if dims else []
        self.layer = layers[dims](channels, 1, *kernel)

    def forward(self, feats):
        return [self.layer(feat) for feat in feats]

    def loss(self, feats, y):
        return {'loss_l1': [F.l1_loss(z, y[0]) for z in self(feats)]}

    def predict(self, feats, y):
        return self(feats)


class Host(nn.Module):
    def __init__(self, dims, channels):
        super().__init__()
        self.head = Dense(dims, channels).double()


def pair(dims, levels=2, **kwargs):
    """ERA on bare features of one rank, with a head of its own."""
    torch.manual_seed(0)
    student = [feature(dims, i).requires_grad_() for i in range(levels)]
    teacher = [feature(dims, 10 + i, channels=5) for i in range(levels)]
    hosts = dict(student=Host(dims, 4), teacher=Host(dims, 5))
    # A head of no known kind has no logits to compare.
    options = dict(form='released', logit=None) | kwargs
    era = ERADistiller(mbrnet=dict(num_branches=2), **options)
    feats = dict(
        student_feats={'neck': tuple(student)},
        teacher_feats={'neck': tuple(teacher)},
    )
    # The distiller builds its net in float32; these features are float64.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        era.choose_sources(**hosts)
        era.prepare(**hosts, **feats)
    finally:
        torch.set_default_dtype(default)
    return era.train(), hosts, feats


@pytest.mark.parametrize('dims', RANKS)
def test_any_head__total_against_the_formula(dims):
    era, hosts, feats = pair(dims)
    student, teacher = (feats[f'{who}_feats']['neck'] for who in hosts)
    y = [feature(dims, 99)[:, :1]]
    found = era.loss(**feats, data_samples=y)
    net, head = era.mbrnet, hosts['teacher'].head
    u, d = net.align(student), net.residuals(student)

    def mse(a, b):
        return sum(((x - y) ** 2).mean() for x, y in zip(a, b, strict=True))

    def judge(estimate):
        return sum((head.layer(e) - y[0]).abs().mean() for e in estimate)

    align, twi, residual = 5 * mse(u, teacher), judge(u), 0
    estimate = u
    for weight, step in zip((1 / 2, 1 / 4), d, strict=True):
        missing = [t - e for t, e in zip(teacher, estimate, strict=True)]
        residual = residual + weight * mse(step, [m.detach() for m in missing])
        estimate = [e + s for e, s in zip(estimate, step, strict=True)]
        twi = twi + weight * judge(estimate)
    expected = {
        'loss_era_align': align,
        'loss_era_residual': residual,
        'loss_era_twi_l1': twi,
    }
    assert expected.keys() == {k for k in found if 'loss' in k}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **CLOSE)
        inputs = [*student, *net.parameters()]
        ours, theirs = (
            torch.autograd.grad(
                loss, inputs, retain_graph=True, allow_unused=True
            )
            for loss in (found[key], value)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize('dims', RANKS)
def test_any_head__detach_leaves_the_student_the_terms_on_u(dims):
    era, hosts, feats = pair(dims, detach=True)
    student, teacher = (feats[f'{who}_feats']['neck'] for who in hosts)
    y = feature(dims, 99)[:, :1]
    losses = era.loss(**feats, data_samples=[y])
    total = sum(v for k, v in losses.items() if 'loss' in k)
    # L_S alone: 5 MSE(u, f_t) + H_t(u).
    aligned = era.mbrnet.align(student)
    expected = sum(
        5 * ((u - t) ** 2).mean()
        + (hosts['teacher'].head.layer(u) - y).abs().mean()
        for u, t in zip(aligned, teacher, strict=True)
    )
    parameters = [*student, *era.mbrnet.aligns.parameters()]
    for a, b in zip(
        torch.autograd.grad(total, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **CLOSE)
    branches = torch.autograd.grad(total, list(era.mbrnet.levels.parameters()))
    assert all(gradient.isfinite().all() for gradient in branches)


@pytest.mark.parametrize('dims', RANKS)
def test_any_head__modes_predict_through_it(dims):
    era, hosts, feats = pair(dims)
    era.eval()
    assert era.inference_modes() == ('E0', 'E1', 'T', 'ST')
    student = feats['student_feats']['neck']

    class Sample:
        def new(self):
            return self

    found = era.predict(
        ('E0', 'T'),
        student=hosts['student'],
        student_feats=feats['student_feats'],
        data_samples=[Sample()],
    )
    for mode, estimate in (
        ('E0', era.mbrnet.align(student)),
        ('T', era.mbrnet(student)),
    ):
        expected = hosts['teacher'].head(estimate)
        for a, b in zip(found[mode], expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize('dims', RANKS)
def test_no_head__needs_nothing_but_features(dims):
    student, teacher = feature(dims).float(), feature(dims, 1, 5).float()
    era = ERADistiller(twi_steps='none')
    feats = dict(
        student_feats={'neck': (student,)}, teacher_feats={'neck': (teacher,)}
    )
    era.prepare(student=nn.Identity(), teacher=nn.Identity(), **feats)
    losses = era.loss(**feats, data_samples=[])
    assert {k for k in losses if 'loss' in k} == {
        'loss_era_align',
        'loss_era_residual',
    }
    assert era.inference_modes() == ()


def detector(**kwargs):
    """A pair of toy detectors."""
    init_default_scope('mmdet')
    model = era_model(**kwargs)
    model.init_weights()
    return model


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for _ in range(3):  # The third would say which extras got no gradient.
        data = model.data_preprocessor(detection_batch(), True)
        total, _ = model.parse_losses(model(**data, mode='loss'))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert total.isfinite()


EVERY_OPTION = dict(
    num_branches=2,
    num_blocks=3,
    share_projection=True,
    share_levels=True,
    reduction='mean',
    norm_cfg=dict(type='LN'),
    act_cfg=dict(type='PReLU'),
)


@pytest.mark.parametrize('topology', MBRNet.TOPOLOGIES)
def test_detector__trains_with_every_option_at_once(topology):
    train(
        detector(
            form='released',
            mbrnet=dict(EVERY_OPTION, topology=topology),
            loss=dict(twi_on_aligned=False),
        )
    )


def test_detector__released_options_make_released_branches_in_any_form():
    model = detector(mbrnet=EVERY_OPTION, loss=dict(twi_on_aligned=False))
    net = model.distillers['distiller'].mbrnet
    assert net.branch == 'released'
    # Of the form remain the space and the start at zero.
    assert net.space is not None
    assert not any(
        d.any()
        for branch in net.residuals(
            [torch.randn(2, 16, size, size) for size in (8, 4)]
        )
        for d in branch
    )
    train(model)


@pytest.mark.parametrize('topology', ['serial', 'accumulated'])
def test_detector__branches_that_read_one_another_have_no_space(topology):
    model = detector(mbrnet=dict(topology=topology))
    assert model.distillers['distiller'].form == 'released'
    with pytest.raises(ValueError, match="needs topology='parallel'"):
        detector(form='normalised', mbrnet=dict(topology=topology))


def test_norm__that_does_not_fit_is_refused_with_the_pair():
    student, teacher = feature(0).float(), feature(0, 1, 5).float()
    era = ERADistiller(
        twi_steps='none', mbrnet=dict(norm_cfg=dict(type='BN2d'))
    )
    with pytest.raises(ValueError, match='Choose a norm_cfg'):
        era.prepare(
            student=nn.Identity(),
            teacher=nn.Identity(),
            student_feats={'neck': (student,)},
            teacher_feats={'neck': (teacher,)},
        )


# -- groups ---------------------------------------------------------------


def test_groups__of_a_backbones_maps_by_number():
    # ResNet-50, 4 branches of 2 blocks: 8 * 9 * sum(C^2) without groups; with
    # groups of 256, 8 * 9 * 256 * sum(C).
    for group_width, expected in ((None, 401_080_320), (256, 70_778_880)):
        with torch.device('meta'):
            net = MBRNet([256, 512, 1024, 2048], 8, 4, group_width=group_width)
        convs = [p for n, p in net.named_parameters() if 'layers.' in n]
        assert sum(p.numel() for p in convs) == expected


@pytest.mark.parametrize(
    ('channels', 'width', 'groups'),
    # The fewest groups that divide: 10 in threes are 5 of 2.
    [(8, 4, 2), (8, 8, 1), (4, 8, 1), (10, 3, 5), (7, 4, 7)],
)
def test_groups__are_as_few_as_fit(channels, width, groups):
    net = MBRNet(channels, channels, group_width=width)
    layer = net.levels[0][0].layers[0]
    assert layer.groups == groups
    x = torch.randn(1, channels, 3, 3)
    size = channels // groups
    parts = [
        nn.functional.conv2d(
            x[:, i : i + size], layer.weight[i : i + size], padding=1
        )
        for i in range(0, channels, size)
    ]
    torch.testing.assert_close(layer(x), torch.cat(parts, dim=1))


@pytest.mark.parametrize(
    ('width', 'dims'), [(0, 2), (4, 0)], ids=['none', 'vectors']
)
def test_groups__refused_when_built(width, dims):
    with pytest.raises(ValueError, match='`group_width` must be'):
        MBRNet(4, 4, spatial_dims=dims, group_width=width)


def test_groups__are_not_needed_by_bottlenecks():
    # So `plan_for` sets none, however wide the maps.
    with torch.device('meta'):
        net = MBRNet([256, 512, 1024, 2048], 8, 4, branch='bottleneck')
    convs = sum(
        p.numel() for n, p in net.named_parameters() if 'aligns' not in n
    )
    assert convs < 70_778_880 / 10
    pair = Pair(
        *(
            Member(role, role, ConfigDict(detector_config(channels=number)))
            for role, number in (('student', 520), ('teacher', 600))
        ),
        input_sizes=[64],
    )
    plan = ERADistiller.plan_for(pair)
    assert plan.distiller == dict(type='era_mm.ERADistiller')
    assert plan.modes == ('E0', 'T', 'ST')
