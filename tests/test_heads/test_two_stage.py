"""Proposals and RoI heads."""

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS

from era_mm.heads.twi import find_head
from era_mm.heads.two_stage import TwoStageTWIHead
from era_mm.testing import detection_batch, detector_config
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
