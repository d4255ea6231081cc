"""Proposals and RoI heads."""

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmengine.structures import InstanceData

from era_mm.heads.head_views import assigning_regions_once
from era_mm.heads.twi import find_head
from era_mm.heads.two_stage import TwoStageTWIHead
from era_mm.testing import (
    detection_batch,
    detector_config,
    noise,
    two_stage_config,
)
from era_mm.testing.host_families import host_config

RPN_TRAIN_CFG = dict(
    assigner=dict(
        type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0
    ),
    sampler=dict(
        type='RandomSampler',
        num=64,
        pos_fraction=0.5,
        neg_pos_ub=-1,
        add_gt_as_proposals=False,
    ),
    allowed_border=-1,
    pos_weight=-1,
    debug=False,
)


def test_proposals__of_a_detector_of_their_own_have_one_class():
    head = find_head(
        MODELS.build(
            ConfigDict(
                detector_config(),
                type='RPN',
                bbox_head=None,
                rpn_head=dict(
                    type='RPNHead',
                    in_channels=16,
                    feat_channels=16,
                    anchor_generator=dict(
                        type='AnchorGenerator',
                        scales=[2],
                        ratios=[1.0],
                        strides=[8, 16],
                    ),
                ),
                train_cfg=dict(rpn=RPN_TRAIN_CFG),
                test_cfg=dict(rpn=dict()),
            )
        )
    )
    generator = torch.Generator().manual_seed(0)
    feats = [
        torch.randn(2, 16, size, size, generator=generator) for size in (8, 4)
    ]
    losses = []
    for label in (0, 2):
        samples = detection_batch()['data_samples']
        for sample in samples:
            sample.set_metainfo(dict(batch_input_shape=(64, 64)))
            sample.gt_instances.labels[:] = label
        losses.append(head.loss(feats, samples))
        assert (samples[0].gt_instances.labels == label).all()
    # Objects of any class are objects.
    assert losses[0]['loss_rpn_cls'] == losses[1]['loss_rpn_cls'] > 0
    # A trial has all that pipelines give.
    trial = head.trial_sample(feats)
    assert trial.ignored_instances.bboxes.shape == (0, 4)


def test_judge__of_several_assigns_the_truth_once(monkeypatch):
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(two_stage_config())).eval()
    model.init_weights()
    head = find_head(model)
    steps = [
        [
            noise(2, 16, size, size, seed=9 * step + size).float()
            for size in (8, 4)
        ]
        for step in range(3)
    ]
    samples = detection_batch(2)['data_samples']
    generator = torch.Generator().manual_seed(0)
    corners = 32 * torch.rand(40, 2, generator=generator)
    sides = 10 + 20 * torch.rand(40, 2, generator=generator)
    # The same boxes in both images, which have other objects.
    boxes = torch.cat([corners, corners + sides], dim=1)
    samples[1].gt_instances.bboxes = samples[1].gt_instances.bboxes + 9
    for sample in samples:
        sample.set_metainfo(dict(batch_input_shape=(64, 64)))
        sample.proposals = InstanceData(bboxes=boxes, scores=torch.ones(40))
    before = torch.get_rng_state()
    alone = [head.judge([step], samples)[0] for step in steps]

    calls = {}

    def count(owner, name, key):
        original = getattr(owner, name)

        def spy(*args, **kwargs):
            calls[key] = calls.get(key, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    count(model.rpn_head.assigner, 'assign', 'rpn')
    count(model.roi_head.bbox_assigner, 'assign', 'roi')
    found = head.judge(steps, samples)
    # Once for each of the two images, whatever the number of estimates.
    assert calls == {'rpn': 2, 'roi': 2}
    # The samplers of the RoI head draw as after those of the RPN.
    for one, other, step in zip(found, alone, steps, strict=True):
        assert set(one) == {
            'loss_rpn_cls',
            'loss_rpn_bbox',
            'loss_cls',
            'loss_bbox',
        }
        assert one == other == head.loss(step, samples)
    assert len({float(terms['loss_cls']) for terms in found}) == 3
    assert torch.equal(torch.get_rng_state(), before)
    # The next batch's truth is another.
    head.judge(steps[:2], samples)
    assert calls['rpn'] == 2 + 3 * 2 + 2
    assert 'get_targets' not in vars(model.rpn_head)


def test_pair__head_of_learnt_proposals_is_no_rpn():
    # It has no priors to count and no losses of its own.
    teacher = MODELS.build(ConfigDict(host_config('faster_rcnn', 12)))
    learnt = MODELS.build(
        dict(
            type='EmbeddingRPNHead',
            num_proposals=4,
            proposal_feature_channel=24,
        )
    )
    head = TwoStageTWIHead(learnt, teacher.roi_head)
    feats = [torch.zeros(1, 24, 2, 2)] * 5
    assert 'NotImplementedError' in head.why_not_judged(feats, training=True)


def test_assigning_once__refined_regions_are_assigned_anew(monkeypatch):
    """The second stage of a cascade has each estimate's own regions."""
    torch.manual_seed(0)
    config = ConfigDict(two_stage_config())
    rcnn = config.train_cfg.rcnn
    one = config.roi_head
    config.roi_head = dict(
        one,
        type='CascadeRoIHead',
        num_stages=2,
        stage_loss_weights=[1.0, 0.5],
        bbox_head=[one.bbox_head, one.bbox_head],
    )
    config.train_cfg.rcnn = [rcnn, rcnn]
    model = MODELS.build(config).eval()
    model.init_weights()
    head = find_head(model)
    samples = detection_batch(1)['data_samples']
    samples[0].set_metainfo(dict(batch_input_shape=(64, 64)))
    samples[0].proposals = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 30, 30], [10, 10, 50, 60]]),
        scores=torch.ones(2),
    )
    steps = [
        [
            noise(1, 16, size, size, seed=9 * step + size).float()
            for size in (8, 4)
        ]
        for step in range(3)
    ]
    alone = [head.judge([step], samples)[0] for step in steps]
    calls = []
    for stage, assigner in enumerate(model.roi_head.bbox_assigner):

        def spy(*args, original=assigner.assign, stage=stage, **kwargs):
            calls.append(stage)
            return original(*args, **kwargs)

        monkeypatch.setattr(assigner, 'assign', spy)
    assert head.judge(steps, samples) == alone
    assert calls == [0, 1, 1, 1]


def test_assigning_once__shares_the_values_of_the_assigner():
    """Dynamic R-CNN sets its assigner's thresholds while it trains."""
    roi_head = MODELS.build(ConfigDict(two_stage_config())).roi_head
    view = assigning_regions_once(roi_head)
    view.bbox_assigner.pos_iou_thr = 0.625
    assert roi_head.bbox_assigner.pos_iou_thr == 0.625
    assert 'assign' not in vars(roi_head.bbox_assigner)
