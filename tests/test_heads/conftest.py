"""Heads that several files try."""

import pytest
from mmengine.config import ConfigDict
from mmengine.registry import MODELS

TRAIN_CFG = dict(
    ga_assigner=dict(
        type='ApproxMaxIoUAssigner',
        pos_iou_thr=0.5,
        neg_iou_thr=0.4,
        min_pos_iou=0.4,
        ignore_iof_thr=-1,
    ),
    # More than there are, so nothing is drawn.
    ga_sampler=dict(
        type='RandomSampler',
        num=1000,
        pos_fraction=0.5,
        neg_pos_ub=-1,
        add_gt_as_proposals=False,
    ),
    assigner=dict(
        type='MaxIoUAssigner',
        pos_iou_thr=0.5,
        neg_iou_thr=0.5,
        min_pos_iou=0.0,
        ignore_iof_thr=-1,
    ),
    sampler=dict(type='PseudoSampler'),
    allowed_border=-1,
    pos_weight=-1,
    center_ratio=0.2,
    ignore_ratio=0.5,
)


@pytest.fixture(scope='session')
def guided_head():
    """Builds heads that predict the anchors which their boxes refer to."""

    def build(width):
        strides = [8, 16]
        return MODELS.build(
            ConfigDict(
                type='GARetinaHead',
                num_classes=3,
                in_channels=width,
                feat_channels=width,
                stacked_convs=1,
                approx_anchor_generator=dict(
                    type='AnchorGenerator',
                    octave_base_scale=4,
                    scales_per_octave=1,
                    ratios=[1.0],
                    strides=strides,
                ),
                square_anchor_generator=dict(
                    type='AnchorGenerator',
                    scales=[4],
                    ratios=[1.0],
                    strides=strides,
                ),
                loss_cls=dict(type='FocalLoss', use_sigmoid=True),
                train_cfg=TRAIN_CFG,
            )
        ).eval()

    return build
