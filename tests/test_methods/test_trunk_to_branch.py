"""Trunk-to-Branch: the dossier's numbers, its identities, its gradients."""

import copy
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, log_softmax

from era_mm.core import extras_of
from era_mm.engine.config_check import check_config
from era_mm.engine.export import export_student
from era_mm.errors import UserError
from era_mm.methods.trunk_to_branch import (
    DensePeerBranch,
    PeerBranch,
    TrunkToBranchDistiller,
    mean_squared_correlation,
    ramp_factor,
    stage_names,
)
from era_mm.methods.trunk_to_branch.stages import as_feature
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    noise,
)


def build(student, **kwargs):
    torch.manual_seed(0)
    return MODELS.build(
        dict(
            type='era_mm.Distillation',
            student=student,
            distiller=dict(type='era_mm.TrunkToBranchDistiller', **kwargs),
        )
    )


def classifier(**kwargs):
    init_default_scope('mmpretrain')
    return build(classifier_config(), **kwargs)


def images(num=4, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (num, 3, size, size), generator=generator)
    samples = [DataSample().set_gt_label(index % 3) for index in range(num)]
    return dict(inputs=list(pixels.byte()), data_samples=samples)


def losses_of(model, batch):
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    return model(**data, mode='loss')


def reached(model, loss):
    """Names of the parameters with a gradient that is not 0."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }


def parts(names):
    """Modules of a toy classifier or detector that names begin with."""
    prefix = 'distillers.distiller.peers.'
    found = set()
    for name in names:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            found.add(
                name.split('.')[2]
                if 'branches' in name
                else name.split('.')[0]
            )
        else:
            found.add('.'.join(name.split('.')[:2]))
    return found


# -- the ramp ----------------------------------------------------------------


def test_ramp__by_hand():
    # exp(-5 * 1) = .0067, exp(-5 * (3/4)^2) = .0601, exp(-5 / 4) = .2865,
    # exp(-5 / 16) = .7316, then 1
    found = [ramp_factor(epoch, 80) for epoch in (0, 20, 40, 60, 80, 300)]
    expected = [0.0067, 0.0601, 0.2865, 0.7316, 1, 1]
    assert found == pytest.approx(expected, abs=5e-5)
    assert ramp_factor(0, 0) == 1


def test_ramp__goes_over_a_share_of_the_run():
    model = classifier()
    model.eval()
    hub = MessageHub.get_current_instance()

    def terms():
        with torch.no_grad():
            return losses_of(model, images())

    # No run: all of it.
    assert terms()['t2b_ramp'] == 1
    full = terms()
    hub.update_info('max_iters', 1000)
    # 0.27 of 1000 iterations are 270; at 135: exp(-5 / 4) = .2865.
    for step, expected in ((0, 0.0067), (135, 0.2865), (270, 1.0)):
        hub.update_info('iter', step)
        found = terms()
        assert found['t2b_ramp'].item() == pytest.approx(expected, abs=5e-5)
        ratio = found['loss_t2b_ensemble'] / full['loss_t2b_ensemble']
        assert ratio.item() == pytest.approx(expected, abs=5e-5)
        for key in ('loss', 'loss_t2b_peers', 'loss_t2b_decorrelation'):
            assert torch.equal(found[key], full[key])


# -- decorrelation -----------------------------------------------------------


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_correlation__by_hand():
    # E_1^T E_2 = 1 - 1 - 1 + 1 = 0. Both have mean 0 and variance 1.
    first, second = column(1, -1, 1, -1), column(1, 1, -1, -1)
    assert mean_squared_correlation([first, second]) == 0
    # Alike: C = 4 / 4 = 1 (less eps = 1e-5 in the variance); of the
    # opposite C = -1, whose square is the same.
    for other in (first, -first):
        same = mean_squared_correlation([first, other])
        assert same.item() == pytest.approx(1 / (1 + 1e-5) ** 2, rel=1e-12)
    # Three peers, pairs (1, 1, 0) / 3: two of three pairs are 0.
    three = mean_squared_correlation([first, first, second], eps=0)
    assert three.item() == pytest.approx(1 / 3)
    # D = 2, peers alike, their two numbers independent: C = identity, whose
    # squares sum to 2 of 4.
    both = torch.cat([first, second], dim=1)
    assert mean_squared_correlation([both, both], eps=0).item() == (
        pytest.approx(0.5)
    )


def test_correlation__slow_reference():
    embeddings = [noise(6, 3, seed=k) for k in range(3)]
    total, pairs = 0.0, 0
    for first, second in itertools.combinations(embeddings, 2):
        pairs += 1
        for a, b in itertools.product(first.t(), second.t()):
            total += np.corrcoef(a.numpy(), b.numpy())[0, 1] ** 2 / 9
    found = mean_squared_correlation(embeddings, eps=0)
    assert found.item() == pytest.approx(total / pairs)


def test_correlation__is_symmetric_and_blind_to_scale_and_shift():
    peers = [noise(8, 4, seed=k) for k in range(3)]
    found = mean_squared_correlation(peers, eps=0)
    for order in itertools.permutations(peers):
        torch.testing.assert_close(
            mean_squared_correlation(order, eps=0), found
        )
    scaled = [
        peer * torch.tensor([1.0, 3.0, 0.2, 7.0]) + 10 * k
        for k, peer in enumerate(peers)
    ]
    torch.testing.assert_close(mean_squared_correlation(scaled, eps=0), found)


def test_correlation__corner_cases():
    single = noise(4, 2).requires_grad_()
    assert mean_squared_correlation([single]).item() == 0
    # A number that never changes counts as uncorrelated, with a gradient.
    first, second = noise(4, 2), torch.ones(4, 2).double().requires_grad_()
    found = mean_squared_correlation([first, second])
    assert found == 0
    found.backward()
    assert second.grad.isfinite().all()
    # One sample, as an epoch's last batch may have, has none.
    first, second = (noise(1, 2, seed=k).requires_grad_() for k in range(2))
    found = mean_squared_correlation([first, second])
    assert found == 0
    found.backward()
    assert not first.grad.any()
    assert not second.grad.any()


def test_correlation__gradients_are_those_of_finite_differences():
    peers = [noise(5, 2, seed=k).requires_grad_() for k in range(3)]
    assert torch.autograd.gradcheck(
        lambda *e: mean_squared_correlation(e), peers
    )


def test_correlation__is_not_computed_in_half_precision():
    peers = [(noise(64, 8, seed=k) + 10).float() for k in range(2)]
    expected = mean_squared_correlation(peers)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(mean_squared_correlation(peers), expected)
    half = mean_squared_correlation([peer.bfloat16() for peer in peers])
    assert half.dtype == torch.float32


# -- distillation ------------------------------------------------------------


def test_distil__ensemble_by_hand():
    # T = 3. Peers softmax([ln 3, 0]) = [.75, .25] and [.25, .75]: their mean
    # logits are equal, as the trunk's. One of them alone:
    # .75 ln 1.5 + .25 ln .5 = .13081, times 9 = 1.17730.
    log3 = 3 * math.log(3)
    peers = classifier().distillers['distiller'].peers
    first, second = torch.tensor([[log3, 0.0]]), torch.tensor([[0.0, log3]])
    feats = {'head': (torch.zeros(1, 2),)}
    found = peers.distil([first, second], feats)
    assert found.item() == pytest.approx(0, abs=1e-6)
    found = peers.distil([first], feats)
    assert found.item() == pytest.approx(1.1773, abs=1e-4)


# -- classifiers -------------------------------------------------------------


def test_losses__are_what_their_formulas_say():
    model = classifier(
        decorrelation_weight=2.0, peer_weight=3.0, ensemble_weight=0.25
    )
    caught = {}
    distiller = model.distillers['distiller']
    classify = distiller.peers.classify

    def spy(embeddings):
        caught['e'], caught['z'] = embeddings, classify(embeddings)
        return caught['z']

    distiller.peers.classify = spy
    handle = model.student.head.register_forward_hook(
        lambda module, args, out: caught.update(z0=out)
    )
    found = losses_of(model, images())
    handle.remove()
    labels = torch.tensor([0, 1, 2, 0])
    scores = torch.stack(caught['z'])
    log_p = log_softmax(scores, dim=2)
    cross = -log_p[:, range(4), labels].mean(dim=1)
    torch.testing.assert_close(found['loss_t2b_peers'], 3 * cross.sum())

    def kl(target):
        p = (target / 3).softmax(dim=1)
        log_q = (caught['z0'] / 3).log_softmax(dim=1)
        return 9 * (p * (p.log() - log_q)).sum(dim=1).mean()

    torch.testing.assert_close(
        found['loss_t2b_ensemble'], 0.25 * kl(scores.mean(0))
    )
    squared = mean_squared_correlation(caught['e'])
    torch.testing.assert_close(found['loss_t2b_decorrelation'], 2 * squared)
    torch.testing.assert_close(found['t2b_correlation'], squared.sqrt())

    def top1(z):
        return 100 * (z.argmax(1) == labels).float().mean()

    assert found['t2b_top1_trunk'] == top1(caught['z0'])
    assert found['t2b_top1_ensemble'] == top1(scores.mean(0))
    torch.testing.assert_close(
        found['t2b_top1_peers'], sum(top1(z) for z in scores) / 3
    )
    deviations = [e.std(dim=0, correction=0).mean() for e in caught['e']]
    torch.testing.assert_close(found['t2b_embed_std'], sum(deviations) / 3)


def test_permeation__is_pooled_normed_and_concatenated():
    model = classifier()
    peers = model.distillers['distiller'].peers
    # Other statistics than BN's initial ones.
    taps = [3 * noise(4, 32, 4, 4).float() + 1, noise(4, 64, 2, 2).float()]
    feats = dict(zip(peers.tap_sources, [(t,) for t in taps], strict=True))
    pooled = [adaptive_avg_pool2d(taps[0], 2), taps[1]]
    normed = [
        (t - t.mean((0, 2, 3), keepdim=True))
        / (t.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        for t in pooled
    ]
    joint = torch.cat(normed, dim=1)
    expected = []
    for branch in peers.branches:
        y = torch.einsum(
            'nchw,dc->ndhw', joint, branch.layer.weight[..., 0, 0]
        )
        y = (y - y.mean((0, 2, 3), keepdim=True)) / (
            y.var((0, 2, 3), keepdim=True, correction=0) + 1e-5
        ).sqrt()
        expected.append(y.clamp(min=0).mean((2, 3)))
    for found, wanted in zip(peers.embed(feats), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_gradients__of_the_peers_reach_the_stages_and_not_the_head():
    model = classifier()
    found = reached(model, losses_of(model, images())['loss_t2b_peers'])
    assert {
        'permeation',
        'layer',
        'norm',
        'classifier',
        'backbone.layer3',
        'backbone.layer4',
    } <= parts(found)
    assert not any(name.startswith('head') for name in found)
    # Each peer learns from its own loss alone, the stages from all.
    assert {name.split('.')[4] for name in found if 'branches' in name} == {
        '0',
        '1',
        '2',
    }


def test_gradients__of_distillation_reach_the_trunk_alone():
    model = classifier()
    model.student.init_weights()
    found = parts(
        reached(model, losses_of(model, images())['loss_t2b_ensemble'])
    )
    assert {'head.fc', 'backbone.layer4', 'backbone.layer1'} <= found
    assert not found & {'permeation', 'layer', 'norm', 'classifier'}


def test_gradients__of_decorrelation_reach_the_trunk():
    model = classifier()
    losses = losses_of(model, images())
    found = parts(reached(model, losses['loss_t2b_decorrelation']))
    assert {'layer', 'norm', 'permeation'} <= found
    assert {'backbone.layer3', 'backbone.layer4'} <= found
    assert not found & {'head.fc', 'classifier'}


@pytest.mark.parametrize('host', ['classifier', 'detector'])
def test_nothing__is_the_plain_run(host):
    settings = dict(
        peer_weight=0.0, ensemble_weight=0.0, decorrelation_weight=0.0
    )
    if host == 'classifier':
        init_default_scope('mmpretrain')
        student, batch = classifier_config(), images
    else:
        student, batch = detector_config(), detection_batch
    model = build(student, **settings)
    torch.manual_seed(0)
    plain = MODELS.build(student)
    runs = []
    for trained in (model, plain):
        trained.train()
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
        totals = []
        for step in range(4):
            losses = losses_of(trained, batch(seed=step))
            total, _ = trained.parse_losses(losses)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
        runs.append((totals, trained.state_dict(), set(losses)))
    assert runs[0][0] == runs[1][0]
    assert runs[0][2] - runs[1][2]
    for key, value in runs[1][1].items():
        assert torch.equal(runs[0][1][key], value), key


def test_terms__with_weight_0_are_left_out():
    model = classifier(ensemble_weight=0.0, decorrelation_weight=0.0)
    found = losses_of(model, images())
    assert [key for key in found if 'loss_' in key] == ['loss_t2b_peers']
    # The correlation is still shown, to compare runs by.
    assert 0 < found['t2b_correlation'] < 1
    assert not found['t2b_correlation'].requires_grad


def test_decorrelation__lowers_the_correlation():
    final = {}
    for weight in (0.0, 50.0):
        model = classifier(decorrelation_weight=weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(10):
            losses = losses_of(model, images(16, size=32))
            total, log_vars = model.parse_losses(losses)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        final[weight] = float(log_vars['t2b_correlation'])
    assert final[50.0] < 0.8 * final[0.0]


def test_parameters__are_the_formula():
    # K ((sum C) d + 2 d + d classes + classes); ResNet-18 on ImageNet, taps
    # of 256 and 512: 3 (393216 + 1024 + 512000 + 1000) = 2721720, about 2.7M.
    branches = [PeerBranch(768, 512, 1000) for _ in range(3)]
    count = sum(p.numel() for b in branches for p in b.parameters())
    assert count == 2_721_720
    # In the toy: 3 (96 * 64 + 128 + 64 * 3 + 3) in the branches, and two
    # numbers per tapped channel in the norms of the permeation.
    peers = classifier().distillers['distiller'].peers
    count = sum(p.numel() for p in peers.branches.parameters())
    assert count == 3 * (96 * 64 + 128 + 64 * 3 + 3)
    count = sum(p.numel() for p in peers.permeation.parameters())
    assert count == 2 * 96


def test_branches__begin_orthogonal_and_different():
    peers = classifier().distillers['distiller'].peers
    matrices = [branch.layer.weight.flatten(1) for branch in peers.branches]
    for matrix in matrices:
        torch.testing.assert_close(matrix @ matrix.t(), torch.eye(64))
    for first, second in itertools.combinations(matrices, 2):
        assert (first - second).abs().max() > 0.1


# -- soft labels -------------------------------------------------------------


@pytest.mark.parametrize('augment', ['Mixup', 'CutMix'])
@pytest.mark.parametrize('smooth', [False, True])
def test_soft_labels__are_the_heads_own(augment, smooth):
    init_default_scope('mmpretrain')
    student = classifier_config()
    student['data_preprocessor']['to_onehot'] = True
    student['train_cfg'] = dict(augments=dict(type=augment, alpha=1.0))
    if smooth:
        student['head']['loss'] = dict(
            type='LabelSmoothLoss', label_smooth_val=0.1
        )
    model = build(student)
    caught = {}
    peers = model.distillers['distiller'].peers
    classify = peers.classify
    peers.classify = lambda e: caught.setdefault('z', classify(e))
    np.random.seed(3)
    data = model.data_preprocessor(images(), True)
    labels = torch.stack([s.gt_score for s in data['data_samples']])
    assert ((labels > 0) & (labels < 1)).any(), 'mixed'
    found = model(**data, mode='loss')
    if smooth:
        labels = 0.9 * labels + 0.1 / 3
    expected = sum(
        -(labels * log_softmax(z, dim=1)).sum(dim=1).mean()
        for z in caught['z']
    )
    torch.testing.assert_close(found['loss_t2b_peers'], expected)
    assert found['t2b_top1_trunk'].isfinite()


# -- backbones ---------------------------------------------------------------

RESNET = dict(type='ResNet', depth=18, base_channels=8, stem_channels=8)
CONVNEXT = dict(
    type='ConvNeXt', arch=dict(depths=[1, 1, 1, 1], channels=[8, 12, 16, 24])
)
SWIN = dict(
    type='SwinTransformer',
    arch=dict(embed_dims=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 2]),
    window_size=2,
)
CSWIN = dict(
    type='era_mm.CSWinTransformer',
    arch=dict(embed_dims=8, depths=[1, 1, 2, 1], num_heads=[2, 2, 4, 8]),
)
GAP = dict(type='GlobalAveragePooling')
# Backbone, neck, channels of the last stage, the stages' names.
BACKBONES = {
    'resnet': (RESNET, GAP, 64, ['layer1', 'layer2', 'layer3', 'layer4']),
    'mobilenet_v2': (
        dict(type='MobileNetV2', widen_factor=0.1),
        GAP,
        1280,
        ['layer1', 'layer2', 'layer3', 'layer5', 'conv2'],
    ),
    'mobilenet_v3': (
        dict(type='MobileNetV3', arch='small'),
        GAP,
        576,
        ['layer0', 'layer1', 'layer3', 'layer8', 'layer12'],
    ),
    'convnext_pooled': (
        CONVNEXT,
        None,
        24,
        ['stages.0', 'stages.1', 'stages.2', 'stages.3'],
    ),
    'convnext_map': (
        CONVNEXT | dict(gap_before_final_norm=False),
        GAP,
        24,
        ['stages.0', 'stages.1', 'stages.2', 'stages.3'],
    ),
    'swin': (
        SWIN,
        GAP,
        64,
        [f'stages.{i}.blocks.{(0, 0, 1, 0)[i]}' for i in range(4)],
    ),
    'cswin': (
        CSWIN,
        GAP,
        64,
        ['stages.0', 'stages.1', 'stages.2', 'stages.3'],
    ),
}


def on_backbone(name, **kwargs):
    init_default_scope('mmpretrain')
    backbone, neck, channels, _ = BACKBONES[name]
    student = classifier_config() | dict(backbone=backbone, neck=neck)
    student['head'] |= dict(in_channels=channels)
    return build(student, **kwargs)


@pytest.mark.parametrize('name', BACKBONES)
def test_backbones__their_stages_can_be_tapped(name):
    names = BACKBONES[name][3]
    sources = [f'backbone.{stage}' for stage in names]
    model = on_backbone(name)
    assert stage_names(model.student.backbone) == names
    peers = model.distillers['distiller'].peers
    assert list(peers.tap_sources) == sources[-2:]
    model = on_backbone(name, source=sources)
    # All stages; two steps show that all extras learn.
    for seed in range(2):
        total, _ = model.parse_losses(losses_of(model, images(2, seed=seed)))
        assert total.isfinite()
        total.backward()
    # Without the trunk's own path every stage still learns.
    found = reached(model, losses_of(model, images(2))['loss_t2b_peers'])
    for stage in names:
        assert any(f'backbone.{stage}.' in name for name in found), stage


def test_backbones__convnext_in_pooled_form_gives_vectors():
    backbone = BACKBONES['convnext_pooled'][0] | dict(out_indices=(2, 3))
    init_default_scope('mmpretrain')
    student = classifier_config() | dict(backbone=backbone, neck=None)
    student['head'] |= dict(in_channels=24)
    with pytest.raises(ValueError, match=r'must be maps .*final_norm=False'):
        build(student, source='backbone')
    # The same two stages as maps.
    student['backbone'] = backbone | dict(gap_before_final_norm=False)
    student['neck'] = GAP
    peers = build(student, source='backbone').distillers['distiller'].peers
    assert [norm.num_features for norm in peers.permeation.norms] == [16, 24]


def test_tokens__become_the_map_they_were():
    x = noise(2, 3, 4, 4)
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.equal(as_feature(tokens, source='s'), x)
    assert as_feature(x, source='s') is x
    with pytest.raises(ValueError, match="'s' outputs 6 tokens"):
        as_feature(tokens[:, :6], source='s')


# -- at inference ------------------------------------------------------------


class Sneaky(nn.Module):
    def forward(self, *args):
        raise AssertionError('a peer ran at inference')


@pytest.mark.parametrize('host', ['classifier', 'detector'])
def test_inference__is_the_plain_models(host, tmp_path):
    if host == 'classifier':
        scope, student, batch = 'mmpretrain', classifier_config(), images()
    else:
        scope, student, batch = 'mmdet', detector_config(), detection_batch()
    init_default_scope(scope)
    model = build(student)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        total, _ = model.parse_losses(losses_of(model, batch))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    file = tmp_path / 'epoch_1.pth'
    torch.save(
        {'meta': {}, 'state_dict': model.state_dict()},
        file,
    )
    saved = torch.load(file, weights_only=True)['state_dict']
    assert not any('peers' in key or 'distill' in key for key in saved)
    plain = MODELS.build(ConfigDict(copy.deepcopy(student)))
    plain.load_state_dict(saved, strict=True)
    assert (
        'peers.branches.0.layer.weight'
        in (extras_of(saved)['distiller']['state_dict'])
    )
    exported = export_student(
        Config(
            dict(
                model=dict(
                    type='era_mm.Distillation',
                    student=student,
                    distiller=dict(type='era_mm.TrunkToBranchDistiller'),
                ),
                default_scope=scope,
            )
        ),
        str(file),
        str(tmp_path / 'student'),
    )
    assert exported.needs_era_mm == ()
    peers = model.distillers['distiller'].peers
    for branch in peers.branches:
        branch.layer = branch.norm = branch.classifier = Sneaky()
    model.eval()
    results = []
    for trained in (model, plain, exported.model):
        trained.eval()
        data = trained.data_preprocessor(copy.deepcopy(batch), False)
        with torch.no_grad():
            tensors = trained(data['inputs'], mode='tensor')
            samples = trained(**data, mode='predict')
        flops = get_model_complexity_info(
            trained, (3, 64, 64), show_table=False, show_arch=False
        )['flops']
        results.append((tensors, samples, flops))
    for tensors, samples, flops in results[1:]:
        assert flops == results[0][2] > 0
        if host == 'classifier':
            assert torch.equal(tensors, results[0][0])
            for a, b in zip(samples, results[0][1], strict=True):
                assert torch.equal(a.pred_score, b.pred_score)
            continue
        for mine, theirs in zip(tensors, results[0][0], strict=True):
            assert all(map(torch.equal, mine, theirs))
        for a, b in zip(samples, results[0][1], strict=True):
            a, b = a.pred_instances, b.pred_instances
            assert torch.equal(a.bboxes, b.bboxes)
            assert torch.equal(a.scores, b.scores)


# -- detectors ---------------------------------------------------------------


def test_dense_branch__is_that_of_the_concatenation():
    """Resizing after W_t instead of before, level by level."""
    branch = DensePeerBranch([3, 4, 5], 6, 7).double().eval()
    branch.norm.running_mean += 0.1
    levels = [noise(2, 3, 8, 8), noise(2, 3, 4, 6, seed=1)]
    taps = [noise(2, 4, 8, 12, seed=2), noise(2, 5, 4, 4, seed=3)]
    for level, found in zip(levels, branch.embed(levels, taps), strict=True):
        grid = level.shape[2:]
        joint = [level, *(adaptive_avg_pool2d(tap, grid) for tap in taps)]
        expected = branch.act(branch.norm(branch.layer(torch.cat(joint, 1))))
        torch.testing.assert_close(found, expected)
    # Where a tap is finer it is pooled, where it is coarser repeated.
    assert (
        adaptive_avg_pool2d(taps[1], (8, 8))[0, 0, 3, 2]
        == (taps[1][0, 0, 1, 1])
    )
    scores = branch.classifier(branch.embed(levels, taps)[0]).sigmoid()
    # The prior of 0.01, but for the small random weights.
    assert scores.mean().item() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize(
    'head', ['RetinaHead', 'FCOSHead', 'ATSSHead', 'GFLHead']
)
def test_dense__peers_have_the_heads_own_loss(head):
    """Two peers with the trunk's scores have twice the trunk's loss."""
    model = build(detector_config(head=head))
    peers = model.distillers['distiller'].peers
    supervise = peers.supervise

    def as_trunk(logits, feats, data_samples):
        scores = feats['bbox_head'][: len(feats['neck'])]
        return supervise([scores, scores], feats, data_samples)

    peers.supervise = as_trunk
    found = losses_of(model, detection_batch(4))
    trunk = found['loss_cls']
    trunk = sum(trunk) if isinstance(trunk, list) else trunk
    torch.testing.assert_close(found['loss_t2b_peers'], 2 * trunk)
    model = build(detector_config(head=head))
    peers = model.distillers['distiller'].peers
    total, log_vars = model.parse_losses(losses_of(model, detection_batch(4)))
    total.backward()
    assert all(p.grad is not None for p in peers.parameters())
    assert 0 < log_vars['t2b_score_ensemble'] < 1


def test_dense__distils_the_top_places_of_each_image():
    model = build(detector_config())
    peers = model.distillers['distiller'].peers
    peers.topk = 1
    # Three classes, one anchor; level 0 has 2 places, level 1 has 1. Peers:
    # .5 everywhere, but .75 and .25 in class 1 of the second place, and .9
    # and .9 in class 2 of the last: mean .9 is the top.
    logit = {p: math.log(p / (1 - p)) for p in (0.75, 0.25, 0.9)}

    def peer(second, last):
        level = torch.zeros(1, 3, 1, 2)
        level[0, 1, 0, 1] = logit[second]
        other = torch.zeros(1, 3, 1, 1)
        other[0, 2] = logit[last]
        return [level, other]

    logits = [peer(0.75, 0.9), peer(0.25, 0.9)]
    feats = {
        'neck': (torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1)),
        'bbox_head': (torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 1)),
    }
    # KL(.9 || .5) = .9 ln 1.8 + .1 ln .2 = .36806.
    found = peers.distil(logits, feats)
    assert found.item() == pytest.approx(0.36806, abs=1e-5)
    # In the other places the peers agree with the trunk together. All have a
    # highest mean of .5.
    peers.topk = 3
    found = peers.distil(logits, feats)
    assert found.item() == pytest.approx(0.36806 / 3, abs=1e-5)


def test_dense__gradients_go_where_they_do_in_a_classifier():
    model = build(detector_config())
    losses = losses_of(model, detection_batch(4))
    own = {'permeation', 'level_permeation', 'layer', 'norm', 'classifier'}
    peers = parts(reached(model, losses['loss_t2b_peers']))
    assert own | {'backbone.layer2', 'backbone.layer3'} <= peers
    assert any(name.startswith('neck') for name in peers)
    assert not any(name.startswith('bbox_head') for name in peers)
    found = parts(reached(model, losses['loss_t2b_ensemble']))
    assert 'bbox_head.retina_cls' in found
    assert 'bbox_head.retina_reg' not in found
    assert not found & own
    found = parts(reached(model, losses['loss_t2b_decorrelation']))
    assert own - {'classifier'} <= found
    assert 'backbone.layer3' in found
    assert not any(name.startswith('bbox_head') for name in found)


def test_dense__every_place_is_a_sample():
    model = build(detector_config())
    peers = model.distillers['distiller'].peers
    levels = [noise(2, 3, 4, 4), noise(2, 3, 2, 2)]
    (found,) = peers.samples([levels])
    assert found.shape == (2 * 20, 3)
    assert torch.equal(found[5], levels[0][0, :, 1, 1])
    assert torch.equal(found[32 + 4], levels[1][1, :, 0, 0])


@pytest.mark.parametrize('taps', [[], ['layer3'], ['layer1', 'layer3']])
def test_dense__other_stages_can_be_tapped(taps):
    sources = [f'backbone.{tap}' for tap in taps]
    model = build(detector_config(), source=sources)
    peers = model.distillers['distiller'].peers
    assert list(peers.tap_sources) == sources
    for seed in range(2):
        losses = losses_of(model, detection_batch(2, seed=seed))
        model.parse_losses(losses)[0].backward()


# -- errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(num_taps=2), "no 'num_taps' any more: the last two stages are"),
        (dict(temperature=3.0), 'it is 3 in a classifier, 1 in a detector'),
        (
            dict(source=['backbone.layer4', 'neck']),
            'must be maps',
        ),
        (dict(peer_weigth=3.0), "Did you mean 'peer_weight'"),
    ],
)
def test_errors__say_what_to_change(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        classifier(**settings)


def test_errors__a_config_with_an_option_of_before_is_told():
    distiller = dict(type='era_mm.TrunkToBranchDistiller', ramp=0.5, topk=9)
    with pytest.raises(UserError) as caught:
        check_config(Config(dict(model=dict(distiller=distiller))))
    text = str(caught.value)
    for name, instead in (('ramp', '0.27 of the run'), ('topk', '100 places')):
        message = (
            f'distiller.{name}: TrunkToBranchDistiller has it no more: it is '
            f'{instead}'
        )
        assert text.count(message) == 1
    # Each was an option, and is none.
    known = inspect.signature(TrunkToBranchDistiller).parameters
    assert not set(TrunkToBranchDistiller.CUT) & set(known)


def test_errors__heads_that_do_not_fit():
    init_default_scope('mmpretrain')
    student = classifier_config()
    sigmoid = dict(use_sigmoid=True)
    for loss in (
        dict(type='CrossEntropyLoss', **sigmoid),
        dict(type='LabelSmoothLoss', label_smooth_val=0.1, **sigmoid),
        dict(type='FocalLoss'),
    ):
        student['head']['loss'] = loss
        with pytest.raises(ValueError, match='one softmax over the classes'):
            build(student)
    student['head'] = dict(type='MultiTaskHead', task_heads={})
    with pytest.raises(ValueError, match='supports classifiers with a `head`'):
        build(student)
    init_default_scope('mmdet')
    student = detector_config()
    student['bbox_head']['loss_cls'] = dict(type='CrossEntropyLoss')
    with pytest.raises(ValueError, match=r'scores each level .* by sigmoid'):
        build(student)


def test_errors__unknown_stages_are_asked_for():
    with pytest.raises(ValueError, match=r'Its children: body\.') as caught:
        stage_names(nn.ModuleDict(dict(body=nn.Conv2d(3, 3, 1))))
    assert "source=['backbone.<name>', ...]" in str(caught.value)
