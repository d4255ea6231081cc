"""Heads that several files try."""

import copy

import pytest
from mmengine.hub import get_config
from mmengine.registry import MODELS


@pytest.fixture(scope='session')
def guided_head():
    """Builds heads that predict the anchors which their boxes refer to."""
    stock = get_config(
        'mmdet::guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco.py'
    ).model

    def build(width):
        config = copy.deepcopy(stock.bbox_head)
        config.update(
            num_classes=3,
            in_channels=width,
            feat_channels=width,
            stacked_convs=1,
            train_cfg=stock.train_cfg,
        )
        for name in ('approx_anchor_generator', 'square_anchor_generator'):
            config[name].strides = [8, 16]
        return MODELS.build(config).eval()

    return build
