"""Detectors of mmdet's own configs, shrunk: one of every family of heads."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

from mmengine.hub import get_config

#: Paths below mmdet's ``configs/`` by family.
DENSE = {
    'retinanet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'fcos': 'fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-'
    'giou_1x_coco.py',
    'atss': 'atss/atss_r50_fpn_1x_coco.py',
    'gfl': 'gfl/gfl_r50_fpn_1x_coco.py',
    'reppoints': 'reppoints/reppoints-moment_r50_fpn_1x_coco.py',
    'rtmdet': 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'yolox': 'yolox/yolox_tiny_8xb8-300e_coco.py',
}
#: Its assigner asks the run for the epoch.
TIMED = {'tood': 'tood/tood_r50_fpn_1x_coco.py'}
TWO_STAGE = {
    'faster_rcnn': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'mask_rcnn': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'cascade_rcnn': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'cascade_mask': 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
}
DETR_LIKE = {
    'detr': 'detr/detr_r50_8xb2-150e_coco.py',
    'conditional_detr': 'conditional_detr/conditional-detr_r50_8xb2-50e_coco'
    '.py',
    'deformable_detr': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'dino': 'dino/dino-4scale_r50_8xb2-12e_coco.py',
}
#: Its masks come from another head.
MASKS_APART = {'yolact': 'yolact/yolact_r50_1xb8-55e_coco.py'}
_CONFIGS = {**DENSE, **TWO_STAGE, **DETR_LIKE, **MASKS_APART, **TIMED}


def _replace(config: Any, changes: Mapping[str, Any]) -> None:
    """Set the keys that a nested dict has, wherever they are."""
    if isinstance(config, list):
        for item in config:
            _replace(item, changes)
    elif isinstance(config, dict):
        for key, value in config.items():
            if key in changes:
                config[key] = changes[key]
            else:
                _replace(value, changes)


@functools.cache
def _installed(family: str) -> dict:
    return get_config(f'mmdet::{_CONFIGS[family]}').model.to_dict()


def host_config(family: str, width: int = 8, num_classes: int = 3) -> dict:
    """A detector's config as the installed mmdet has it, widths cut down.

    Args:
        family: A key of one of the tables above.
        width: Base channels of the backbone; neck and head have twice that.
        num_classes: Of all heads.
    """
    config = copy.deepcopy(_installed(family))
    config['data_preprocessor']['batch_augments'] = None
    config['backbone']['init_cfg'] = None
    # Conditional DETR's code encodes positions in 256 numbers.
    channels = 256 if family == 'conditional_detr' else 2 * width
    _replace(
        {k: v for k, v in config.items() if k.endswith('head')},
        dict(
            num_classes=num_classes,
            in_channels=channels,
            feat_channels=channels,
            point_feat_channels=channels,
            conv_out_channels=channels,
            out_channels=channels,
            fc_out_channels=32,
            stacked_convs=2,
            num_convs=1,
        ),
    )
    if family in ('fcos', 'atss', 'gfl', 'reppoints', 'tood'):
        config['bbox_head']['norm_cfg'] = dict(type='GN', num_groups=4)
    if config['backbone']['type'] == 'ResNet':
        config['backbone'] |= dict(
            depth=18,
            base_channels=width,
            stem_channels=width,
            frozen_stages=-1,
            norm_cfg=dict(type='BN'),
            norm_eval=False,
            style='pytorch',
        )
        outs = config['backbone']['out_indices']
        config['neck'] |= dict(
            in_channels=[width * 2**i for i in outs], out_channels=channels
        )
    else:
        # width 8: channels 8, 16, 32, 64 after the stem's 4.
        config['backbone'] |= dict(
            widen_factor=width / 64 / 2, deepen_factor=0.1
        )
        config['neck'] |= dict(
            in_channels=[2 * width, 4 * width, 8 * width],
            out_channels=channels,
        )
    _replace(config['test_cfg'], dict(score_thr=0.001))
    if 'encoder' in config:
        _shrink_transformer(config, channels)
    if 'rpn_head' in config:
        _shrink_two_stage(config)
    return config


def _shrink_transformer(config: dict, channels: int) -> None:
    _replace(
        config,
        dict(
            embed_dims=channels,
            num_heads=2,
            feedforward_channels=16,
            num_layers=1,
            num_feats=channels // 2,
            num_queries=5,
            num_groups=4,
            num_dn_queries=2,
        ),
    )
    config['bbox_head']['embed_dims'] = channels
    config['encoder']['layer_cfg']['self_attn_cfg']['num_heads'] = 2
    config['decoder']['layer_cfg']['cross_attn_cfg']['num_heads'] = 2


def _shrink_two_stage(config: dict) -> None:
    # Few enough that the samplers have to choose.
    _replace(
        config['train_cfg'],
        dict(nms_pre=50, max_per_img=20),
    )
    config['train_cfg']['rpn']['sampler']['num'] = 12
    stages = config['train_cfg']['rcnn']
    for stage in stages if isinstance(stages, list) else [stages]:
        stage['sampler']['num'] = 8
    config['test_cfg']['rpn'] |= dict(nms_pre=50, max_per_img=10)
    config['test_cfg']['rcnn'] |= dict(max_per_img=10)
