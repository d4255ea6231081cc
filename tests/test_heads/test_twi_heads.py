"""The teacher's head on estimates."""

import copy

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models.heads import LinearClsHead
from mmpretrain.structures import DataSample
from torch import nn

from era_mm.heads import DenseTerm, LogitTerm
from era_mm.heads.twi import find_head
from era_mm.heads.twi_heads import DenseTWIHead, TWIHead
from era_mm.testing import (
    detection_batch,
    detector_config,
    give_opinions,
    noise,
)
from era_mm.testing.host_families import host_config


def test_trial__is_on_noise_that_costs_no_draw(monkeypatch):
    head = find_head(MODELS.build(host_config('retinanet')).eval())
    seen = []
    monkeypatch.setattr(head, 'judge', lambda steps, _: seen.extend(steps))
    # As an empty image has them.
    blank = [torch.zeros(1, 16, size, size) for size in (16, 8, 4, 2, 1)]
    before = torch.get_rng_state()
    for _ in range(2):
        assert head.why_not_judged(blank, training=True) is None
    for once, again, flat in zip(*seen, blank, strict=True):
        assert once.shape == flat.shape
        assert once[0, 0].unique().numel() == once[0, 0].numel()
        assert torch.equal(once, again)
    assert torch.equal(torch.get_rng_state(), before)


def test_trial__of_a_head_that_asks_the_run_where_it_stands():
    model = MODELS.build(host_config('tood')).eval()
    head = find_head(model)
    seen = []
    get_targets = head.head.get_targets

    def spy(*args, **kwargs):
        hub = MessageHub.get_current_instance()
        seen.append((hub.get_info('iter'), hub.get_info('epoch')))
        return get_targets(*args, **kwargs)

    head.head.get_targets = spy
    feats = model.extract_feat(torch.randn(1, 3, 256, 256))
    # The newest is the current one.
    hub = MessageHub.get_instance('before any run')
    assert hub.get_info('epoch') is None
    assert head.why_not_judged(feats, training=True) is None
    # Nothing is left that a run would take for its own.
    assert not hub.runtime_info
    # And in a run nothing is taken away.
    hub.update_info('epoch', 7)
    assert head.why_not_judged(feats, training=True) is None
    assert seen == [(0, 0), (0, 7)]
    assert hub.runtime_info == dict(epoch=7)
    hub.pop_info('epoch')


def test_twi_head__holds_no_parameters():
    head = MODELS.build(ConfigDict(copy.deepcopy(detector_config()))).bbox_head
    twi = TWIHead(head)
    assert not list(twi.parameters())
    assert not twi.state_dict()


HEADS = ['RetinaHead', 'FCOSHead', 'ATSSHead', 'GFLHead']


CLOSE = dict(rtol=1e-10, atol=1e-12)


def dense_head(kind, **changes):
    """A head of a teacher in double precision, and features for it."""
    config = detector_config(head=kind)
    config['bbox_head'] |= changes
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(copy.deepcopy(config))).double().eval()
    model.init_weights()
    give_opinions(model.bbox_head)
    head = find_head(model)
    steps = [
        [noise(3, 16, size, size, seed=10 * k + size) for size in (8, 4)]
        for k in range(4)
    ]
    samples = detection_batch(3)['data_samples']
    for sample in samples:
        sample.set_metainfo(dict(batch_input_shape=(64, 64)))
    return head, steps, samples


@pytest.mark.parametrize(
    ('kind', 'changes'),
    [
        *((kind, dict()) for kind in HEADS),
        # It counts examples in a buffer; boxes are decoded.
        (
            'RetinaHead',
            dict(loss_cls=dict(type='GHMC', bins=5, momentum=0.75)),
        ),
        (
            'RetinaHead',
            dict(reg_decoded_bbox=True, loss_bbox=dict(type='GIoULoss')),
        ),
    ],
    ids=[*HEADS, 'counting', 'decoded'],
)
@pytest.mark.parametrize('by', ['labels', 'teacher', 'both'])
def test_judge__of_several_is_that_of_each(kind, changes, by, monkeypatch):
    head, steps, samples = dense_head(kind, **changes)
    assert type(head) is DenseTWIHead
    term = said = None
    if by != 'labels':
        term = DenseTerm()
        assert (
            term.prepare(
                head=head,
                student=nn.ModuleDict(dict(bbox_head=head.head)),
                student_feats={
                    'bbox_head': tuple(
                        level
                        for kind in head.training_forward(steps[0])
                        for level in kind
                    )
                },
                teacher_feats=steps[0],
            )
            is None
        )
        term.double()
        said = term.target(head, steps[0], samples)
        term.measure(said)
    options = dict(by_labels=by != 'teacher', term=term, said=said)
    before = copy.deepcopy(head.head.state_dict())
    found = head.judge(steps, samples, **options)
    assert len(found) == 4
    for step, terms in zip(steps, found, strict=True):
        (alone,) = head.judge([step], samples, **options)
        assert set(terms) == set(alone)
        expected = {}
        if by != 'teacher':
            expected |= head.loss(step, samples)
        if by != 'labels':
            expected |= term.of_estimate(head, step, said)
        assert set(terms) == set(expected)
        for key, value in expected.items():
            assert value.isfinite(), key
            torch.testing.assert_close(alone[key], value, **CLOSE)
            torch.testing.assert_close(terms[key], value, **CLOSE)
    # The steps differ, or it would say nothing.
    assert len({float(next(iter(terms.values()))) for terms in found}) == 4
    if by != 'labels':
        # The first is what the teacher has said itself.
        assert abs(found[0]['logit']) < 1e-12
    # The head is as it was.
    assert not any(module.training for module in head.head.modules())
    for key, value in head.head.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert 'get_targets' not in vars(head.head)


@pytest.mark.parametrize(
    ('kind', 'assigning', 'calls'),
    [
        # Once for each of the three images; FCOS has no assigner.
        ('RetinaHead', 'assigner.assign', 3),
        ('ATSSHead', 'assigner.assign', 3),
        ('GFLHead', 'assigner.assign', 3),
        ('FCOSHead', '_get_targets_single', 3),
    ],
)
def test_judge__assigns_the_truth_once(kind, assigning, calls, monkeypatch):
    head, steps, samples = dense_head(kind)
    owner, _, name = assigning.rpartition('.')
    owner = getattr(head.head, owner) if owner else head.head
    original, seen = getattr(owner, name), []

    def spy(*args, **kwargs):
        seen.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    head.judge(steps, samples)
    assert len(seen) == calls
    # The next batch's is another.
    head.judge(steps[:2], samples)
    assert len(seen) == 2 * calls
    # By the teacher alone there is no truth to assign.
    term = DenseTerm(box_weight=0.0)
    term.num_classes, term.num_levels = 3, 2
    term._set_up_units(3, 4)
    term.double()
    said = term.target(head, steps[0], samples)
    head.judge(steps, samples, by_labels=False, term=term, said=said)
    assert len(seen) == 2 * calls


CLASSIFIERS = {
    'linear': dict(
        type='LinearClsHead', loss=dict(type='CrossEntropyLoss'), cal_acc=False
    ),
    'smoothed': dict(
        type='LinearClsHead',
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1),
    ),
    # Its norm is frozen, or estimates would see one another.
    'layers': dict(
        type='StackedLinearClsHead',
        mid_channels=[8],
        norm_cfg=dict(type='BN1d'),
    ),
    'several labels': dict(
        type='MultiLabelLinearClsHead',
        loss=dict(type='CrossEntropyLoss', use_sigmoid=True),
    ),
    # Its loss is more than that of its logits.
    'own loss': dict(type='EfficientFormerClsHead', distillation=False),
}


@pytest.mark.parametrize('by', ['labels', 'teacher', 'both'])
@pytest.mark.parametrize('kind', CLASSIFIERS)
def test_judge__of_a_classifier_runs_its_head_once(kind, by):
    config = CLASSIFIERS[kind] | dict(num_classes=3, in_channels=16)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        module = MODELS.build(config).double().eval()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.running_mean.fill_(0.5)
    head = find_head(nn.ModuleDict(dict(head=module)))
    assert type(head) is TWIHead
    steps = [[noise(6, 16, seed=k).requires_grad_()] for k in range(5)]
    samples = [DataSample().set_gt_label(i % 3) for i in range(6)]
    term = said = None
    if by != 'labels':
        term = LogitTerm(temperature=2.0)
        said = term.target(head, [steps[0][0].detach()], samples)
    options = dict(by_labels=by != 'teacher', term=term, said=said)
    expected = [head.judge([step], samples, **options)[0] for step in steps]
    for step, terms in zip(steps, expected, strict=True):
        assert set(terms) == {'loss', 'logit'} - {
            dict(labels='logit', teacher='loss').get(by)
        }
        if by != 'teacher':
            assert terms['loss'] == module.loss((step[0],), samples)['loss']

    calls = []
    *_, last = (m for m in module.modules() if isinstance(m, nn.Linear))
    handle = last.register_forward_hook(lambda *_: calls.append(1))
    found = head.judge(steps, samples, **options)
    handle.remove()
    # Labels have its training outputs, the teacher its eval ones.
    passes = len(expected[0])
    assert len(calls) == passes * (1 if kind != 'own loss' else 5)
    leaves = [step[0] for step in steps]
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other)
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, **CLOSE)
    gradients = [
        torch.autograd.grad(sum(sum(t.values()) for t in terms), leaves)
        for terms in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, **CLOSE)
    assert not any(part.training for part in module.modules())
    assert 'forward' not in vars(module)


class Twofold(LinearClsHead):
    """Its logits are doubled while it trains."""

    def forward(self, feats):
        return (1 + self.training) * super().forward(feats)


@pytest.mark.parametrize('by', ['labels', 'teacher', 'both'])
def test_judge__labels_have_training_outputs_and_the_teacher_eval_ones(by):
    module = Twofold(num_classes=3, in_channels=16).double().eval()
    head = TWIHead(module)
    steps = [[noise(6, 16, seed=k)] for k in range(2)]
    samples = [DataSample().set_gt_label(i % 3) for i in range(6)]
    term = LogitTerm(temperature=2.0)
    said = term.target(head, [steps[0][0]], samples)
    found = head.judge(
        steps,
        samples,
        by_labels=by != 'teacher',
        term=None if by == 'labels' else term,
        said=said,
    )
    for (step,), terms in zip(steps, found, strict=True):
        logits = module.fc(step)
        if by != 'teacher':
            wanted = module._get_loss(2 * logits, samples)['loss']
            torch.testing.assert_close(terms['loss'], wanted, **CLOSE)
        if by != 'labels':
            wanted = term.of_outputs(logits, said)['logit']
            torch.testing.assert_close(terms['logit'], wanted, **CLOSE)


def test_judge__assigns_anew_where_it_depends_on_predictions():
    # YOLOX's assigner costs what a prediction gets wrong.
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(host_config('yolox'))).eval()
    head = find_head(model)
    steps = [
        [
            noise(2, 16, size, size, seed=10 * k + size).float()
            for size in (8, 4, 2)
        ]
        for k in range(3)
    ]
    samples = detection_batch(2)['data_samples']
    for sample in samples:
        sample.set_metainfo(dict(batch_input_shape=(64, 64)))
    calls = []
    assign = head.head.assigner.assign

    def spy(*args, **kwargs):
        calls.append(1)
        return assign(*args, **kwargs)

    head.head.assigner.assign = spy
    found = head.judge(steps, samples)
    assert len(calls) == 3 * 2
    for step, terms in zip(steps, found, strict=True):
        for key, value in head.loss(step, samples).items():
            torch.testing.assert_close(terms[key], value)


def test_judge__assigns_anew_where_anchors_are_predicted(guided_head):
    torch.manual_seed(0)
    module = guided_head(16)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.1)
    head = DenseTWIHead(module)
    steps = [
        [
            noise(2, 16, size, size, seed=10 * k + size).float()
            for size in (8, 4)
        ]
        for k in range(2)
    ]
    samples = detection_batch(2)['data_samples']
    for sample in samples:
        sample.set_metainfo(dict(batch_input_shape=(64, 64)))
    found = head.judge(steps, samples)
    for step, terms in zip(steps, found, strict=True):
        for key, value in head.loss(step, samples).items():
            torch.testing.assert_close(terms[key], value)
