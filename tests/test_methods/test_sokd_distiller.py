"""SoKD around other distillers: what learns from what, what stays equal."""

import copy
import itertools

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from torch.nn.functional import avg_pool2d, mse_loss

from era_mm.core import BaseDistiller, extras_of
from era_mm.methods.era import ERADistiller
from era_mm.methods.sokd import attention_targets
from era_mm.methods.sokd.search import POLICY_OPTIMIZER, total
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
    save_teacher,
)

BASES = {
    'fitnet': dict(type='era_mm.FeatureImitationDistiller'),
    'pkd': dict(type='era_mm.FeatureImitationDistiller', measure='pearson'),
    'era': dict(type='era_mm.ERADistiller'),
    'iekd': dict(type='era_mm.IEKDDistiller'),
}
NOTHING = dict(dafa=dict(ops=['Identity']), dam=False)


def build(teacher_file, distiller=None, **kwargs):
    torch.manual_seed(0)
    distiller = distiller or dict(type='era_mm.SoKDDistiller', **kwargs)
    model = MODELS.build(
        distillation_config(distiller, checkpoint=teacher_file)
    )
    model.init_weights()
    return model


def losses_of(model, num=2, seed=0):
    data = model.data_preprocessor(detection_batch(num, seed=seed), True)
    return model(**data, mode='loss')


def train(model, steps=3):
    """Some optimiser steps; what each has logged."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    logged = []
    for step in range(steps):
        MessageHub.get_current_instance().update_info('iter', step)
        loss, values = model.parse_losses(losses_of(model, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logged.append({key: v.item() for key, v in values.items()})
    return logged


def equal(before, after):
    return all(torch.equal(v, after[k]) for k, v in before.items())


def snapshot(model):
    distiller = model.distillers['distiller']
    return {
        'student': copy.deepcopy(model.student.state_dict()),
        'extras': copy.deepcopy(distiller.state_dict()),
        'policy': copy.deepcopy(distiller.policy.state_dict()),
        'teacher': copy.deepcopy(model.teachers['teacher'].model.state_dict()),
    }


def changed(before, after):
    return {key for key in before if not equal(before[key], after[key])}


# -- the plug-in -----------------------------------------------------------


@pytest.mark.parametrize('name', BASES)
def test_identity_policy__is_the_wrapped_distiller_bit_for_bit(
    teacher_file, name, monkeypatch
):
    # What SoKD wraps runs after the student's head. Before it, gradients add
    # up in another order.
    monkeypatch.setattr(
        ERADistiller, 'early_sources', BaseDistiller.early_sources
    )
    plain = build(teacher_file, BASES[name])
    wrapped = build(teacher_file, base=BASES[name], **NOTHING)
    assert train(plain) == train(wrapped)
    assert equal(plain.state_dict(), wrapped.state_dict())
    theirs = wrapped.distillers['distiller'].base
    assert equal(
        plain.distillers['distiller'].state_dict(), theirs.state_dict()
    )
    inner = plain.distillers['distiller'].inner
    if inner is not None:
        assert equal(inner.state_dict(), theirs.inner.state_dict())


def test_policy__changes_what_the_wrapped_distiller_learns(teacher_file):
    """The base sees F_t' in the teacher's place, and nothing else of it."""
    model = build(teacher_file, dafa=dict(init=(0, 1.0, 0.5)), dam=False)
    distiller = model.distillers['distiller']
    seen = {}
    base_loss = distiller.base.loss

    def spy(**batch):
        seen.update(batch)
        return base_loss(**batch)

    distiller.base.loss = spy
    data = model.data_preprocessor(detection_batch(2), True)
    own = model.teachers['teacher'].extract(data['inputs'])
    MessageHub.get_current_instance().update_info('max_iters', 10)
    MessageHub.get_current_instance().update_info('iter', 5)
    losses = model(**data, mode='loss')
    with torch.no_grad():
        expected = distiller.policy(own['neck'], seed=5)
    for mine, refined, before in zip(
        seen['teacher_feats']['neck'], expected, own['neck'], strict=True
    ):
        assert torch.equal(mine, refined)
        assert not torch.equal(mine, before)
        assert not mine.requires_grad
    sums = [
        sum(f.square().sum() for f in fs) for fs in (expected, own['neck'])
    ]
    assert losses['sokd_norm_ratio'].item() == pytest.approx(
        (sums[0] / sums[1]).sqrt().item(), rel=1e-5
    )
    assert losses['sokd_searching'] == 0


def test_era__keeps_its_modes_under_sokd(teacher_file):
    plain = build(teacher_file, BASES['era'])
    model = build(teacher_file, base=BASES['era'])
    plain.eval(), model.eval()
    plain.load_teachers(), model.load_teachers()
    distiller = model.distillers['distiller']
    distiller.base.load_state_dict(plain.distillers['distiller'].state_dict())
    assert distiller.inference_modes() == (
        plain.distillers['distiller'].inference_modes()
    )
    found = []
    for each in (plain, model):
        each.active_modes = ('T',)
        data = each.data_preprocessor(detection_batch(2), False)
        with torch.no_grad():
            each(**data, mode='predict')
        found.append(each.mode_predictions['T'])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.pred_instances.bboxes, b.pred_instances.bboxes)
        assert torch.equal(a.pred_instances.scores, b.pred_instances.scores)


def test_era__hears_what_the_head_says_of_the_teachers_own_feature(
    teacher_file,
):
    """Under a strong policy the student's own head learns as without one."""
    plain = build(teacher_file, BASES['era'])
    model = build(
        teacher_file,
        base=BASES['era'],
        dafa=dict(init=(0, 1.0, 0.9)),
        dam=False,
    )
    theirs, found = losses_of(plain), losses_of(model)
    assert abs(found['sokd_norm_ratio'] - 1) > 0.01
    for key in ('loss_era_logit', 'loss_era_box'):
        assert theirs[key] > 0
        torch.testing.assert_close(found[key], theirs[key], rtol=0, atol=0)
    assert found['loss_era_align'] != theirs['loss_era_align']


def test_era__of_a_classifier_hears_the_teachers_own_logits(tmp_path):
    init_default_scope('mmpretrain')
    teacher = classifier_config(width=16)
    file = save_teacher(teacher, tmp_path / 't.pth', scope='mmpretrain')
    inputs = torch.randn(8, 3, 64, 64)
    samples = [DataSample().set_gt_label(y % 3) for y in range(8)]
    found = []
    for distiller in (
        BASES['era'],
        dict(
            type='era_mm.SoKDDistiller',
            base=BASES['era'],
            dafa=dict(init=(0, 1.0, 0.9)),
            dam=False,
        ),
    ):
        torch.manual_seed(0)
        model = MODELS.build(
            dict(
                type='era_mm.Distillation',
                student=classifier_config(),
                teacher=dict(config=teacher, checkpoint=file),
                distiller=distiller,
            )
        )
        model.init_weights()
        found.append(model(inputs, samples, mode='loss'))
    assert found[0]['loss_era_logit'] > 0
    assert torch.equal(*(each['loss_era_logit'] for each in found))
    assert not torch.equal(*(each['loss_era_align'] for each in found))


def test_era__measures_its_space_on_the_teachers_own_feature(teacher_file):
    """Under a strong policy it is that of ERA alone."""
    plain = build(teacher_file, BASES['era'])
    model = build(
        teacher_file,
        base=BASES['era'],
        dafa=dict(init=(0, 1.0, 0.9)),
        dam=False,
    )
    for step in range(2):
        total(losses_of(plain, seed=step)).backward()
        found = losses_of(model, seed=step)
        total(found).backward()
        assert abs(found['sokd_norm_ratio'] - 1) > 0.01
    space = plain.distillers['distiller'].mbrnet.space.state_dict()
    theirs = model.distillers['distiller'].base.mbrnet.space.state_dict()
    assert space['first_batches.seen'] == 2
    assert equal(space, theirs)


@pytest.mark.parametrize('kind', ['CrossKD', 'Logit'])
def test_base__that_compares_predictions_alone_is_refused(kind, teacher_file):
    with pytest.raises(
        ValueError, match=f'compare features, but {kind}Distiller compares'
    ):
        build(teacher_file, base=dict(type=f'era_mm.{kind}Distiller'))


def test_base__of_a_classifier_that_compares_logits_is_refused(classifiers):
    base = dict(type='era_mm.LogitDistiller')
    with pytest.raises(ValueError, match='LogitDistiller compares pred'):
        classifiers(dict(type='era_mm.SoKDDistiller', base=base, dam=False))


def test_simkd__learns_refined_features(classifiers, image_batch):
    """It uses predictions, but compares features."""
    base = dict(type='era_mm.SimKDDistiller', channels=[64, 128])
    found = []
    for options in (NOTHING, dict(dafa=dict(init=(0, 1.0, 0.9)), dam=False)):
        torch.manual_seed(0)
        model = classifiers(
            dict(type='era_mm.SoKDDistiller', base=base, **options),
            inherit=['head'],
        )
        found.append(model(**image_batch(), mode='loss')['loss_simkd'])
    assert found[0].isfinite()
    assert found[0] != found[1]


def test_residual_kd__pairs_the_students_cuts(classifiers, image_batch):
    """With the adapter first, and without the assistant's."""
    base = dict(
        type='era_mm.ResidualKDDistiller',
        source='backbone',
        assistant=dict(form='image'),
        cuts=['layer1', 'layer2'],
    )
    model = classifiers(
        dict(type='era_mm.SoKDDistiller', base=base, dam=False)
    )
    distiller = model.distillers['distiller']
    stages = 'backbone.student.backbone.layer'
    assert distiller.feature_pairs == (
        ('backbone.adapter', 'backbone'),
        (f'{stages}1', 'backbone.layer1'),
        (f'{stages}2', 'backbone.layer2'),
    )
    batch = image_batch()
    with torch.no_grad():
        expected = model.teachers['teacher'].extract(batch['inputs'])
    seen = {}
    adapters, fit = distiller.adapters, distiller.adapters.fit

    def spy(maps, targets, weights):
        seen.update(maps=maps, targets=targets)
        return fit(maps, targets, weights)

    adapters.fit = spy
    losses = model(**batch, mode='loss')
    assert total(losses).isfinite()
    for target, (_, source) in zip(
        seen['targets'], distiller.feature_pairs, strict=True
    ):
        assert torch.equal(target, expected[source][-1])
    student = model.student.backbone.student.backbone
    with torch.no_grad():
        stem = student.maxpool(
            student.relu(student.norm1(student.conv1(batch['inputs'])))
        )
        first = student.layer1(stem)
    assert torch.equal(seen['maps'][1], first)


def test_iekd__pretrains_under_sokd_and_then_the_policy_begins(teacher_file):
    hub = MessageHub.get_current_instance()
    hub.update_info('max_iters', 12)
    model = build(
        teacher_file,
        base=dict(BASES['iekd'], pretrain_iters=2),
        search_share=0.5,
    )
    distiller = model.distillers['distiller']
    policies = [copy.deepcopy(distiller.policy.state_dict())]
    coders = [copy.deepcopy(distiller.base.inner.state_dict())]
    for step in range(9):
        hub.update_info('iter', step)
        if step < 2:
            model.pretrain_step(detection_batch(2, seed=step))
        else:
            total(losses_of(model, seed=step)).backward()
        policies.append(copy.deepcopy(distiller.policy.state_dict()))
        coders.append(copy.deepcopy(distiller.base.inner.state_dict()))
    # Searching from 2 to 2 + .5 * (12 - 2) = 7; the coder in 0 and 1.
    assert [not equal(*p) for p in itertools.pairwise(policies)] == [
        2 <= step < 7 for step in range(9)
    ]
    assert [not equal(*c) for c in itertools.pairwise(coders)] == [
        step < 2 for step in range(9)
    ]


def test_schedules__of_the_wrapped_and_its_own(teacher_file):
    base = dict(BASES['fitnet'], schedules={'loss_imitation': dict(scale=2)})
    plain = build(teacher_file, base=BASES['fitnet'], **NOTHING)
    model = build(
        teacher_file,
        base=base,
        schedules={'loss_imitation': dict(scale=3)},
        **NOTHING,
    )
    torch.testing.assert_close(
        losses_of(model)['loss_imitation'],
        6 * losses_of(plain)['loss_imitation'],
    )


def test_vectors__are_refined_and_refused_by_dam(tmp_path):
    init_default_scope('mmpretrain')
    teacher = classifier_config(width=16)
    file = save_teacher(teacher, tmp_path / 't.pth', scope='mmpretrain')

    def make(**kwargs):
        return MODELS.build(
            dict(
                type='era_mm.Distillation',
                student=classifier_config(),
                teacher=dict(config=teacher, checkpoint=file),
                distiller=dict(type='era_mm.SoKDDistiller', **kwargs),
            )
        )

    with pytest.raises(ValueError, match="source='backbone'"):
        make()
    with pytest.raises(ValueError, match="anchor='attention'"):
        make(
            base=dict(BASES['fitnet'], source='backbone'),
            dam=dict(anchor='boxes'),
        )
    inputs = torch.randn(4, 3, 64, 64)
    samples = [DataSample().set_gt_label(y) for y in (0, 1, 2, 0)]
    for kwargs in (
        dict(base=BASES['era'], dam=False),
        dict(base=dict(BASES['iekd'], source='backbone')),
    ):
        model = make(**kwargs)
        losses = model(inputs, samples, mode='loss')
        assert total(losses).isfinite()
        assert 'sokd_consistency' in losses


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (
            dict(
                base=dict(
                    type='mmdet.FPN',
                    in_channels=[8],
                    out_channels=8,
                    num_outs=1,
                )
            ),
            TypeError,
            'but is FPN',
        ),
        (dict(areas='loss'), ValueError, r"'term', 'base'.*got 'loss'"),
        (dict(areas='base', dam=False), ValueError, 'there are none'),
        (
            dict(areas='base', dam=dict(area_weight=0)),
            ValueError,
            'there are none',
        ),
        (
            dict(areas='base', base=BASES['era']),
            ValueError,
            'ERADistiller does not take areas',
        ),
        (dict(search_share=0), ValueError, 'set dafa=False'),
        (dict(unroll_lr=0), ValueError, 'first order'),
        (dict(adapter_weight=0), ValueError, 'set adapter=False'),
        (dict(adapter=False), ValueError, 'needs equal channels'),
        (dict(dafa=dict(op=[])), TypeError, "Did you mean 'ops'"),
        (dict(dam=dict(ancor=None)), TypeError, "Did you mean 'anchor'"),
    ],
)
def test_sokd__refuses(teacher_file, options, error, message):
    with pytest.raises(error, match=message):
        build(teacher_file, **options)


# -- who learns from what --------------------------------------------------


def test_steps__each_moves_its_own_alone(teacher_file):
    model = build(teacher_file)
    model.load_teachers()
    before = snapshot(model)
    model.train()
    losses = losses_of(model)
    after_policy = snapshot(model)
    # Norms' statistics of the student are the forward pass's own.
    for state in (before, after_policy):
        state['student'] = {
            k: v for k, v in state['student'].items() if 'weight' in k
        }
    assert changed(before, after_policy) == {'policy'}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    total(losses).backward()
    optimizer.step()
    last = snapshot(model)
    assert changed(after_policy, last) == {'student', 'extras'}
    policy = model.distillers['distiller'].policy
    assert all(p.grad is None for p in policy.parameters())
    own = {id(p) for p in model.parameters()}
    assert not any(id(p) in own for p in policy.parameters())


GROUPS = ('student', 'adapters', 'dam', 'base')


@pytest.mark.parametrize(
    ('term', 'reached'),
    [
        ('loss_sokd_adapter', {'adapters'}),
        ('loss_sokd_anchor', {'dam'}),
        ('loss_sokd_agree', {'student', 'adapters', 'dam'}),
        ('loss_sokd_area', {'student', 'adapters'}),
        ('loss_imitation', {'student', 'base'}),
    ],
)
@pytest.mark.parametrize('anchor', ['attention', 'boxes'])
def test_gradient__of_each_term(teacher_file, term, reached, anchor):
    model = build(teacher_file, dam=dict(anchor=anchor))
    losses_of(model)[term].backward()
    distiller = model.distillers['distiller']
    for group in GROUPS:
        module = (
            model.student
            if group == 'student'
            else (getattr(distiller, group))
        )
        gradients = [
            p.grad.abs().max()
            for p in module.parameters()
            if p.grad is not None
        ]
        assert bool(gradients and max(gradients) > 0) == (group in reached), (
            group
        )
    if term == 'loss_sokd_anchor':
        # Size and offset too, not the heat map alone.
        head = distiller.dam.predictors[0]
        for part in (head.heatmap, head.size, head.offset):
            assert part[0].weight.grad.abs().max() > 0


def test_terms__are_what_they_say(teacher_file):
    """All four once more, from the module's own parts.

    L_D and L_DA are against the refined feature, the adapter's and the
    anchor's targets are the teacher's own.
    """
    model = build(
        teacher_file,
        dam=dict(agree_weight=2.0, area_weight=3.0, anchor_weight=4.0),
        dafa=dict(init=(0, 1.0, 0.5)),
    )
    distiller = model.distillers['distiller']
    data = model.data_preprocessor(detection_batch(2), True)
    targets = model.teachers['teacher']
    model.load_teachers()
    targets = targets.extract(data['inputs'])['neck']
    maps = model.student.extract_feat(data['inputs'])
    losses = model(**data, mode='loss')
    # After its own step the policy is the one that the losses have seen.
    with torch.no_grad():
        refined = distiller.policy(targets, seed=0)
    assert not any(map(torch.equal, refined, targets))
    adapted = [a(m) for a, m in zip(distiller.adapters, maps, strict=True)]
    head = distiller.dam.predictors[0]
    fit = agree = area = 0.0
    for s, t, r in zip(adapted, targets, refined, strict=True):
        fit += mse_loss(s, t) / 2
        student, teacher = head(s), head(r)
        for one, other in zip(student, teacher, strict=True):
            agree += 2 * mse_loss(one, other) / 2
        masks = distiller.dam.decoder(student=student, teacher=teacher).masks
        weight = masks.sum(1, keepdim=True)
        error = ((s - r).square() * weight).sum() / (weight.sum() * 24)
        area += 3 * error / 2
    torch.testing.assert_close(losses['loss_sokd_adapter'], fit)
    torch.testing.assert_close(losses['loss_sokd_agree'], agree)
    torch.testing.assert_close(losses['loss_sokd_area'], area)
    # Weighted by `anchor_loss` itself; see its slow reference.
    anchor = distiller.dam.anchor_loss(
        [head(r) for r in refined], [attention_targets(t) for t in targets]
    )
    torch.testing.assert_close(losses['loss_sokd_anchor'], anchor)


@pytest.mark.parametrize(
    ('options', 'keys'),
    [
        (dict(dam=False), {'adapter'}),
        (dict(dafa=False), {'adapter', 'agree', 'anchor', 'area'}),
        (dict(dam=dict(agree_weight=0)), {'adapter', 'anchor', 'area'}),
        (dict(dam=dict(area_weight=0)), {'adapter', 'agree', 'anchor'}),
        (dict(dam=dict(anchor=None)), {'adapter', 'agree', 'area'}),
        (dict(areas='base'), {'adapter', 'agree', 'anchor'}),
        (NOTHING, set()),
    ],
)
def test_switches__each_turns_its_own_off(teacher_file, options, keys):
    model = build(teacher_file, **options)
    for seed in range(3):
        losses = losses_of(model, seed=seed)
        total(losses).backward()
    found = {k for k in losses if k.startswith('loss_sokd')}
    assert found == {f'loss_sokd_{key}' for key in keys}
    assert ('sokd_entropy' in losses) == (options.get('dafa', True) is True)


def test_areas__for_the_wrapped_distiller(teacher_file):
    """'base': the imitation is taken inside the areas alone."""
    model = build(teacher_file, areas='base', dafa=False)
    distiller = model.distillers['distiller']
    data = model.data_preprocessor(detection_batch(2), True)
    model.load_teachers()
    targets = model.teachers['teacher'].extract(data['inputs'])
    maps = model.student.extract_feat(data['inputs'])
    losses = model(**data, mode='loss')
    areas = distiller.areas_of(
        student_feats={'neck': maps}, teacher_feats=targets
    )
    expected = 0.0
    for connector, s, t, level in zip(
        distiller.base.connectors, maps, targets['neck'], areas, strict=True
    ):
        inside = level.masks.amax(1).bool()
        assert 0 < inside.sum() < inside.numel()
        error = (connector(s) - t).square().mean(1)
        expected += error[inside].mean() / 2
    torch.testing.assert_close(losses['loss_imitation'], expected)


def test_equal_channels__need_no_adapter(teacher_file, tmp_path):
    torch.manual_seed(0)
    teacher = detector_config(width=16)
    file = save_teacher(teacher, tmp_path / 't.pth')
    model = MODELS.build(
        distillation_config(
            dict(
                type='era_mm.SoKDDistiller',
                base=dict(BASES['pkd'], connector=False),
                adapter=False,
            ),
            teacher=teacher,
            checkpoint=file,
        )
    )
    losses = losses_of(model)
    assert 'loss_sokd_adapter' not in losses
    assert 'loss_sokd_area' in losses
    assert model.distillers['distiller'].adapters is None


# -- the search ------------------------------------------------------------


@pytest.mark.parametrize('mixture', ['sample', 'softmax'])
def test_search__finds_the_best_policy(tmp_path, mixture):
    """The student is 3/10 of the way from the teacher to its 3x3 means.

    So L_aug is 0 where SpatialSmooth is applied always, with m = .6, and
    nothing else is; every other policy has a positive loss.
    """
    file = save_teacher(detector_config(width=16), tmp_path / 't.pth')
    model = MODELS.build(
        distillation_config(
            dict(
                type='era_mm.SoKDDistiller',
                dafa=dict(
                    ops=[
                        'Identity',
                        'ChannelMask',
                        'GaussianNoise',
                        'SpatialSmooth',
                    ],
                    mixture=mixture,
                ),
                dam=False,
                adapter=False,
                optimizer=dict(POLICY_OPTIMIZER, lr=0.05),
            ),
            teacher=detector_config(width=16),
            checkpoint=file,
        )
    )
    distiller = model.distillers['distiller']
    generator = torch.Generator().manual_seed(0)
    before = distiller.policy.usage()
    assert before['ChannelMask'][0] == pytest.approx(
        before['SpatialSmooth'][0]
    )
    losses = []
    for step in range(200):
        distiller.begin_step(step)
        feat = torch.randn(4, 6, 5, 5, generator=generator)
        mean = avg_pool2d(feat, 3, 1, 1, count_include_pad=False)
        losses.append(
            distiller.inner_step(
                student_feats={'neck': (0.4 * feat + 0.6 * mean,)},
                teacher_feats={'neck': (feat,)},
                data_samples=[],
            ).item()
        )
    policy = distiller.policy
    usage = policy.usage()
    use, magnitude = usage['SpatialSmooth']
    # Not used, or used without effect.
    for name in ('ChannelMask', 'GaussianNoise'):
        assert usage[name][0] * usage[name][1] < 0.005
    best = int(policy.alpha.argmax())
    names = [type(op).__name__ for op in policy.policies[best]]
    assert policy.beta[best, names.index('SpatialSmooth')] > 0.95
    if mixture == 'sample':
        assert use > 0.75
        assert magnitude == pytest.approx(0.6, abs=0.03)
    else:
        # In a mixture more of fewer is the same.
        assert use * magnitude == pytest.approx(0.6, abs=0.03)
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])


def searching(tmp_path, *, optimizer=None, **dafa):
    """A distiller whose policy alone learns from given features.

    By long steps of SGD, unless told otherwise.
    """
    file = save_teacher(detector_config(width=16), tmp_path / 't.pth')
    model = MODELS.build(
        distillation_config(
            dict(
                type='era_mm.SoKDDistiller',
                dafa=dafa,
                dam=False,
                adapter=False,
                optimizer=optimizer or dict(type='SGD', lr=1000.0),
            ),
            teacher=detector_config(width=16),
            checkpoint=file,
        )
    )
    return model.distillers['distiller']


def test_search__of_small_features_is_the_losss_and_no_decays(tmp_path):
    """The optimiser as shipped, at the rate and the length of the demo.

    A student of zeros asks for what erases the most. The teacher's variance
    is 0.02, as that of the digit scenes: the loss's gradients are so small
    that a decay of 1e-3 turned gate and magnitude to 0 (0.007 both) and left
    the choice at ln 29 = 3.3673.
    """
    distiller = searching(tmp_path, optimizer=dict(POLICY_OPTIMIZER, lr=0.01))
    policy = distiller.policy
    assert len(policy.policies) == 29
    generator = torch.Generator().manual_seed(0)
    for step in range(450):
        distiller.begin_step(step)
        feat = 0.02**0.5 * torch.randn(4, 6, 5, 5, generator=generator)
        distiller.inner_step(
            student_feats={'neck': (torch.zeros_like(feat),)},
            teacher_feats={'neck': (feat,)},
            data_samples=[],
        )
    summary = policy.summary()
    assert summary['gate'] > 0.65
    assert summary['magnitude'] > 0.52
    assert summary['entropy'] < 3.2
    use, magnitude = policy.usage()['SpatialSmooth']
    assert use > 0.4
    assert magnitude > 0.85


def test_step__leaves_sub_policies_alone_that_were_not_drawn(tmp_path):
    distiller = searching(tmp_path, optimizer=POLICY_OPTIMIZER)
    policy = distiller.policy
    before = [policy.beta.clone(), policy.magnitude.clone()]
    chosen = policy.draw(seed=0).chosen
    feat = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    distiller.inner_step(
        student_feats={'neck': (torch.zeros_like(feat),)},
        teacher_feats={'neck': (feat,)},
        data_samples=[],
    )
    others = [i for i in range(29) if i != chosen]
    for old, new in zip(before, (policy.beta, policy.magnitude), strict=True):
        assert torch.equal(old[others], new[others])
        assert not torch.equal(old[chosen], new[chosen])


def test_search__has_its_gradient_in_half_precision_too(tmp_path):
    """As autocast hands features over: float16, and no scaled loss.

    Of a mean over 2 * 6 * 80 * 80 numbers each has the gradient error / 76800,
    here about 6e-9; float16 ends at 6e-8.
    """
    generator = torch.Generator().manual_seed(0)
    feat = (0.001 * torch.randn(2, 6, 80, 80, generator=generator)).half()
    moved = []
    for dtype in (torch.float32, torch.float16):
        distiller = searching(
            tmp_path,
            mixture='softmax',
            ops=['Identity', 'SpatialSmooth'],
            ops_per_policy=1,
            init=(0.0, 1.0, 0.5),
        )
        before = distiller.policy.alpha.detach().clone()
        distiller.inner_step(
            student_feats={'neck': (0.99 * feat.to(dtype),)},
            teacher_feats={'neck': (feat.to(dtype),)},
            data_samples=[],
        )
        moved.append(distiller.policy.alpha.detach() - before)
    error = (moved[1] - moved[0]).norm() / moved[0].norm()
    assert error < 0.03


def test_search__keeps_the_policy_in_its_ranges(tmp_path):
    """A student of zeros asks for more of what weakens: all of it at once."""
    distiller = searching(tmp_path, ops=['SpatialSmooth', 'GaussianNoise'])
    feat = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    distiller.inner_step(
        student_feats={'neck': (torch.zeros_like(feat),)},
        teacher_feats={'neck': (feat,)},
        data_samples=[],
    )
    assert distiller.policy.beta[0, 0] == 1
    assert distiller.policy.magnitude[0, 0].item() == pytest.approx(0.9)


@pytest.fixture
def said(monkeypatch):
    """What the search prints."""
    lines = []
    monkeypatch.setattr(
        'era_mm.methods.sokd.search.print_log',
        lambda text, **kwargs: lines.append(text),
    )
    return lines


@pytest.mark.parametrize(
    ('lr', 'steps', 'parts'),
    [
        # 0.2 of 1280 and 3e-4: 0.0768.
        (3e-4, 1280, ['has 256 iterations', 'about 0.077', 'lr=0.004']),
        (1e-2, 1280, []),
        (3e-4, 100_000, []),
        # 0.2 of 120 are 24: 0.24 and 0.264.
        (1e-2, 120, ['has 24 iterations', 'about 0.24', 'lr=0.04']),
        (1.1e-2, 120, []),
        # 0.2 of 2 is 0.4: one step searches.
        (3e-4, 2, ['has 1 iterations']),
        # Outside a run it does not end.
        (3e-4, None, []),
    ],
)
def test_search__too_short_to_move_says_so_once(
    lr, steps, parts, teacher_file, said
):
    optimizer = dict(type='Adam', lr=lr, betas=(0.5, 0.999))
    model = build(teacher_file, dam=False, optimizer=optimizer)
    MessageHub.get_current_instance().update_info('max_iters', steps)
    train(model, 2)
    assert len(said) == bool(parts)
    assert all(part in said[0] for part in parts)


def test_search__of_another_optimiser_says_nothing_of_its_length(
    teacher_file, said
):
    # The step of SGD depends on the gradient.
    model = build(teacher_file, dam=False, optimizer=dict(type='SGD', lr=1e-4))
    MessageHub.get_current_instance().update_info('max_iters', 1280)
    train(model, 2)
    assert not said


def test_search__after_a_pretraining_is_judged_by_its_own_length(
    teacher_file, said
):
    hub = MessageHub.get_current_instance()
    hub.update_info('max_iters', 12)
    model = build(
        teacher_file,
        base=dict(BASES['iekd'], pretrain_iters=2),
        search_share=0.5,
    )
    for step in range(4):
        hub.update_info('iter', step)
        if step < 2:
            model.pretrain_step(detection_batch(2, seed=step))
        else:
            total(losses_of(model, seed=step)).backward()
        # Half of 12 - 2, told of in its first step.
        assert len(said) == (step >= 2)
    assert 'has 5 iterations' in said[0]


def test_search__stops_after_its_share_and_goes_on_without_a_run(teacher_file):
    model = build(teacher_file, search_share=0.25, dam=False)
    distiller = model.distillers['distiller']
    distiller.begin_step(10**6)
    assert distiller.is_searching
    MessageHub.get_current_instance().update_info('max_iters', 10)
    found = []
    for step in range(10):
        distiller.begin_step(step)
        found.append(distiller.is_searching)
    # 10 * .25 = 2.5: steps 0, 1 and 2.
    assert found == [True] * 3 + [False] * 7
    assert distiller.base.step == 9


def test_policys_optimizer__is_dadas_without_its_decay(teacher_file):
    model = build(teacher_file)
    optimizer = model.distillers['distiller'].inner_optimizer
    (group,) = optimizer.optimizers['policy'].param_groups
    assert group['lr'] == 3e-4
    assert group['betas'] == (0.5, 0.999)
    assert group['weight_decay'] == 0
    assert len(group['params']) == 3


def test_unrolled__is_the_gradient_through_the_students_step(teacher_file):
    """Against differences of upper(theta - lr * slope(alpha), alpha)."""
    lr = 0.02
    model = build(
        teacher_file,
        dafa=dict(
            ops=['Identity', 'SpatialSmooth', 'SampleMix'],
            ops_per_policy=1,
            mixture='softmax',
            hard=False,
        ),
        dam=dict(area_weight=0),
        unroll_lr=lr,
        # Without decay: a gradient of 0 leaves the policy as it is.
        optimizer=dict(type='SGD', lr=0.1),
    ).double()
    model.load_teachers()
    # mmdet's preprocessor makes float32 of uint8.
    data = model.data_preprocessor(detection_batch(2), True)
    data['inputs'] = data['inputs'].double()
    distiller = model.distillers['distiller']
    policy = distiller.policy
    found = {}
    unrolled = distiller._unrolled

    def spy(parameters, **batch):
        loss, gradients = unrolled(parameters, **batch)
        found.update(loss=loss, alpha=gradients[0])
        found.update(batch=batch)
        return loss, [torch.zeros_like(g) for g in gradients]

    distiller._unrolled = spy
    before = {
        'student': copy.deepcopy(model.student.state_dict()),
        'extras': copy.deepcopy(distiller.state_dict()),
    }
    state = torch.get_rng_state()
    losses = model(**data, mode='loss')
    assert torch.equal(torch.get_rng_state(), state)
    # The look ahead leaves no trace but one forward's norm statistics.
    plain = build(teacher_file).double()
    plain.student.load_state_dict(before['student'])
    plain.student(data['inputs'], data['data_samples'], mode='loss')
    assert equal(plain.student.state_dict(), model.student.state_dict())
    assert equal(before['extras'], distiller.state_dict())
    total(losses).backward()

    batch = found['batch']
    rerun = batch.pop('rerun')
    parameters = {
        **{
            f'student.{n}': p
            for n, p in model.student.named_parameters()
            if p.requires_grad
        },
        **{
            f'adapters.{n}': p
            for n, p in distiller.adapters.named_parameters()
        },
    }

    def forward(values):
        own = {k: {} for k in ('student', 'adapters')}
        for key, value in values.items():
            owner, _, name = key.partition('.')
            own[owner][name] = value
        task, feats = rerun(own['student'])
        with torch.no_grad():
            refined = distiller._refine(batch['teacher_feats'])
        return task, feats, refined, own['adapters']

    def objective():
        start = {k: v.detach().requires_grad_() for k, v in parameters.items()}
        task, feats, refined, weights = forward(start)
        lower = total(task) + total(
            distiller._terms(
                student_feats=feats,
                teacher_feats=batch['teacher_feats'],
                refined_feats=refined,
                data_samples=batch['data_samples'],
                adapter_weights=weights,
            )
        )
        slope = torch.autograd.grad(lower, list(start.values()))
        ahead = {
            k: (v - lr * g).detach()
            for (k, v), g in zip(start.items(), slope, strict=True)
        }
        _, feats, refined, weights = forward(ahead)
        adapted = distiller.adapters(feats['neck'], weights)
        return sum(
            (r - a).square().mean() / 2
            for r, a in zip(refined['neck'], adapted, strict=True)
        ).item() / len(adapted)

    assert found['loss'].item() == pytest.approx(objective(), rel=1e-6)
    step = 1e-4
    for index in range(3):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                policy.alpha[index] += sign * step
            values.append(objective())
            with torch.no_grad():
                policy.alpha[index] -= sign * step
        expected = (values[0] - values[1]) / (2 * step)
        assert found['alpha'][index].item() == pytest.approx(
            expected, rel=0.02, abs=1e-5
        )


def test_unrolled__leaves_the_count_of_the_first_batches(teacher_file):
    """Each step measures one batch, whatever was looked ahead."""

    def start():
        model = build(
            teacher_file,
            base=dict(BASES['era'], mbrnet=dict(num_batches=4)),
            unroll_lr=0.01,
            dam=False,
        )
        era = model.distillers['distiller'].base
        era.logit.first_batches.number = 4
        return model, (era.mbrnet.space, era.logit)

    whole, measuring = start()
    states = []
    for step in range(6):
        MessageHub.get_current_instance().update_info('iter', step)
        total(losses_of(whole, seed=step)).backward()
        for part in measuring:
            assert int(part.first_batches.seen) == min(step + 1, 4)
        states.append(copy.deepcopy(whole.state_dict()))
    # And a resumed run measures as many.
    resumed, again = start()
    resumed.load_state_dict(states[1])
    for step in range(2, 6):
        MessageHub.get_current_instance().update_info('iter', step)
        total(losses_of(resumed, seed=step)).backward()
    for part, other in zip(measuring, again, strict=True):
        assert equal(part.state_dict(), other.state_dict())


def test_unrolled__leaves_the_norms_of_the_wrapped_distiller(teacher_file):
    model = build(teacher_file, base=BASES['iekd'], unroll_lr=0.01)
    distiller = model.distillers['distiller']
    search, seen = distiller._search, []

    def spy(**batch):
        before = copy.deepcopy(dict(distiller.named_buffers()))
        loss = search(**batch)
        seen.append(equal(before, dict(distiller.named_buffers())))
        return loss

    distiller._search = spy
    before = copy.deepcopy(dict(distiller.named_buffers()))
    total(losses_of(model)).backward()
    assert seen == [True]
    # The loss itself has counted once.
    assert not equal(before, dict(distiller.named_buffers()))
    counts = {
        value.item()
        for name, value in distiller.named_buffers()
        if name.endswith('num_batches_tracked')
    }
    assert counts == {1}


# -- the file --------------------------------------------------------------


def test_export__is_the_bare_student(teacher_file):
    model = build(teacher_file)
    losses_of(model)
    plain = MODELS.build(detector_config())
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state, strict=True)
    plain.eval()
    model.eval()
    inputs = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for mine, theirs in zip(plain(inputs), model(inputs), strict=True):
            assert all(map(torch.equal, mine, theirs))
    entry = extras_of(state)['distiller']
    assert {key.split('.')[0] for key in entry['state_dict']} == {
        'base',
        'adapters',
        'dam',
    }
    assert set(entry['inner']) == {
        f'policy.{name}' for name in ('alpha', 'beta', 'magnitude')
    }
