"""Models and data small enough for a test on one CPU thread."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torch import nn

from ..core.host_models import blank_sample

IMAGE_SIZE = 64
CLASSES = ('square', 'bar', 'cross')

_HEADS: dict[str, dict] = {
    'RetinaHead': dict(
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=2,
            scales_per_octave=1,
            ratios=[1.0],
            strides=[8, 16],
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_bbox=dict(type='L1Loss'),
    ),
    'FCOSHead': dict(
        strides=[8, 16],
        regress_ranges=((-1, 32), (32, 1e8)),
        norm_cfg=dict(type='BN'),
        norm_on_bbox=True,
        centerness_on_reg=True,
        loss_bbox=dict(type='GIoULoss'),
    ),
    'ATSSHead': dict(
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=2,
            scales_per_octave=1,
            ratios=[1.0],
            strides=[8, 16],
        ),
        norm_cfg=dict(type='BN'),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_bbox=dict(type='GIoULoss'),
    ),
    'GFLHead': dict(
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=2,
            scales_per_octave=1,
            ratios=[1.0],
            strides=[8, 16],
        ),
        norm_cfg=dict(type='BN'),
        reg_max=8,
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True),
        loss_dfl=dict(type='DistributionFocalLoss'),
        loss_bbox=dict(type='GIoULoss'),
    ),
}
_ASSIGNERS: dict[str, dict] = {
    'RetinaHead': dict(
        type='MaxIoUAssigner',
        pos_iou_thr=0.5,
        neg_iou_thr=0.4,
        min_pos_iou=0,
        ignore_iof_thr=-1,
    ),
    'ATSSHead': dict(type='ATSSAssigner', topk=4),
    'GFLHead': dict(type='ATSSAssigner', topk=4),
}
_DETECTORS = {
    'RetinaHead': 'RetinaNet',
    'FCOSHead': 'FCOS',
    'ATSSHead': 'ATSS',
    'GFLHead': 'GFL',
}


def detector_config(
    width: int = 8, channels: int = 16, head: str = 'RetinaHead', **kwargs: Any
) -> dict:
    """A detector with a two-level pyramid, a few thousand weights.

    Args:
        width: Base channels of its ResNet-18.
        channels: Channels of neck and head.
        head: 'RetinaHead', 'FCOSHead', 'ATSSHead' or 'GFLHead'.
        kwargs: Entries of the detector's config to add or replace.
    """
    train_cfg: dict = dict(allowed_border=-1, pos_weight=-1, debug=False)
    if head in _ASSIGNERS:
        train_cfg['assigner'] = _ASSIGNERS[head]
    return dict(
        type=f'mmdet.{_DETECTORS[head]}',
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            bgr_to_rgb=True,
            pad_size_divisor=32,
        ),
        backbone=dict(
            type='ResNet',
            depth=18,
            base_channels=width,
            stem_channels=width,
            num_stages=3,
            out_indices=(1, 2),
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            norm_eval=False,
        ),
        neck=dict(
            type='FPN',
            in_channels=[width * 2, width * 4],
            out_channels=channels,
            num_outs=2,
        ),
        bbox_head=dict(
            type=head,
            num_classes=len(CLASSES),
            in_channels=channels,
            feat_channels=channels,
            stacked_convs=1,
            **_HEADS[head],
        ),
        train_cfg=train_cfg,
        test_cfg=dict(
            nms_pre=100,
            min_bbox_size=0,
            score_thr=0.01,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=20,
        ),
    ) | dict(kwargs)


def two_stage_config(
    width: int = 8,
    channels: int = 16,
    agnostic: bool = False,
    norm: bool = False,
) -> dict:
    """Faster R-CNN on two levels.

    Args:
        width: Base channels of its ResNet-18.
        channels: Channels of neck and heads.
        agnostic: Boxes of the RoI head are the same for all classes.
        norm: The RoI head has a convolution with a norm.
    """
    strides = [8, 16]
    nms = dict(type='nms', iou_threshold=0.7)
    coder = dict(type='DeltaXYWHBBoxCoder')
    assigner = dict(
        type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0
    )
    sampler = dict(
        type='RandomSampler',
        num=16,
        pos_fraction=0.5,
        neg_pos_ub=-1,
        add_gt_as_proposals=True,
    )
    config = detector_config(width=width, channels=channels)
    head: dict = dict(
        type='Shared2FCBBoxHead',
        in_channels=channels,
        fc_out_channels=24,
        roi_feat_size=3,
        num_classes=len(CLASSES),
        bbox_coder=coder,
        reg_class_agnostic=agnostic,
        loss_bbox=dict(type='L1Loss'),
    )
    if norm:
        head |= dict(
            type='ConvFCBBoxHead',
            num_shared_convs=1,
            num_shared_fcs=1,
            conv_out_channels=16,
            norm_cfg=dict(type='BN'),
        )
    config.pop('bbox_head')
    return config | dict(
        type='mmdet.FasterRCNN',
        rpn_head=dict(
            type='RPNHead',
            in_channels=channels,
            feat_channels=channels,
            anchor_generator=dict(
                type='AnchorGenerator',
                scales=[2, 4],
                ratios=[1.0],
                strides=strides,
            ),
            bbox_coder=coder,
        ),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor',
                roi_layer=dict(
                    type='RoIAlign', output_size=3, sampling_ratio=1
                ),
                out_channels=channels,
                featmap_strides=strides,
            ),
            bbox_head=head,
        ),
        train_cfg=dict(
            rpn=dict(
                assigner=assigner,
                sampler=sampler | dict(add_gt_as_proposals=False),
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            rpn_proposal=dict(
                nms_pre=50, max_per_img=20, nms=nms, min_bbox_size=0
            ),
            rcnn=dict(
                assigner=assigner, sampler=sampler, pos_weight=-1, debug=False
            ),
        ),
        test_cfg=dict(
            rpn=dict(nms_pre=50, max_per_img=10, nms=nms, min_bbox_size=0),
            rcnn=dict(score_thr=0.05, nms=nms, max_per_img=10),
        ),
    )


def classifier_config(width: int = 8, num_classes: int = 3) -> dict:
    """A classifier with pooled ``(N, 8 * width)`` features at its neck."""
    return dict(
        type='mmpretrain.ImageClassifier',
        data_preprocessor=dict(
            type='mmpretrain.ClsDataPreprocessor', num_classes=num_classes
        ),
        backbone=dict(
            type='mmpretrain.ResNet',
            depth=18,
            base_channels=width,
            stem_channels=width,
        ),
        neck=dict(type='mmpretrain.GlobalAveragePooling'),
        head=dict(
            type='mmpretrain.LinearClsHead',
            num_classes=num_classes,
            in_channels=width * 8,
            loss=dict(type='mmpretrain.CrossEntropyLoss'),
        ),
    )


def save_teacher(
    config: dict, filename: str | Path, scope: str = 'mmdet', seed: int = 1
) -> str:
    """Write a random checkpoint of a model, as a trained one is written.

    Its norms hold the statistics of one batch of noise, so that eval mode
    gives features of ordinary size, other than train mode's.
    """
    with torch.random.fork_rng(), DefaultScope.overwrite_default_scope(scope):
        torch.manual_seed(seed)
        model = MODELS.build(ConfigDict(copy.deepcopy(config)))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            model(
                torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE),
                [blank_sample(IMAGE_SIZE, IMAGE_SIZE)] * 8,
            )
        torch.save(
            {'meta': {}, 'state_dict': model.state_dict()}, str(filename)
        )
    return str(filename)


def era_model(
    checkpoint: str = 'random',
    student: dict | None = None,
    teacher: dict | None = None,
    **options: Any,
) -> nn.Module:
    """ERA between toy detectors, built.

    Args:
        checkpoint: The teacher's weights.
        student: Its config; None: the toy's.
        teacher: Likewise.
        options: Of ``ERADistiller``.
    """
    return MODELS.build(
        distillation_config(
            dict(type='era_mm.ERADistiller', **options),
            student=student,
            teacher=teacher,
            checkpoint=checkpoint,
        )
    )


@torch.no_grad()
def give_opinions(head: nn.Module) -> None:
    """Scores other than 0.01, which a fresh dense head gives all.

    Args:
        head: Changed in place.
    """
    for name, parameter in head.named_parameters():
        if name.endswith(('_cls.weight', '_reg.weight')):
            parameter.mul_(30)


def distillation_config(
    distiller: dict,
    student: dict | None = None,
    teacher: dict | None = None,
    checkpoint: str = 'random',
) -> dict:
    """A Distillation of toy detectors, the teacher twice as wide."""
    return dict(
        type='era_mm.Distillation',
        student=student or detector_config(),
        teacher=dict(
            config=teacher or detector_config(width=16, channels=24),
            checkpoint=checkpoint,
        ),
        distiller=distiller,
    )


def detection_batch(
    num: int = 2, size: int = IMAGE_SIZE, seed: int = 0
) -> dict:
    """A raw batch as a dataloader gives it.

    Shape:
        - inputs: ``num`` of ``(3, size, size)``, uint8
        - data_samples: with one to three boxes each, in pixels
    """
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    generator = torch.Generator().manual_seed(seed)
    inputs, samples = [], []
    for index in range(num):
        inputs.append(
            torch.randint(0, 256, (3, size, size), generator=generator).byte()
        )
        boxes = index % 3 + 1
        corners = torch.rand(boxes, 2, generator=generator) * size / 2
        extents = 10 + torch.rand(boxes, 2, generator=generator) * size / 3
        sample = DetDataSample(
            metainfo=dict(
                img_id=index,
                img_shape=(size, size),
                ori_shape=(size, size),
                scale_factor=(1.0, 1.0),
                pad_shape=(size, size),
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([corners, corners + extents], dim=1),
            labels=torch.randint(
                0, len(CLASSES), (boxes,), generator=generator
            ),
        )
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long()
        )
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def write_coco(folder: str | Path, num_images: int = 8, seed: int = 0) -> str:
    """Write a tiny data set in COCO format: images/ and annotations.json.

    Each image has one bright square of one of three colours on noise.
    """
    folder = Path(folder)
    (folder / 'images').mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for index in range(num_images):
        pixels = rng.integers(
            0, 80, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8
        )
        side = int(rng.integers(14, 30))
        x, y = (int(v) for v in rng.integers(0, IMAGE_SIZE - side, 2))
        label = int(rng.integers(len(CLASSES)))
        pixels[y : y + side, x : x + side, label] = 230
        name = f'{index:04d}.png'
        Image.fromarray(pixels).save(folder / 'images' / name)
        images.append(
            dict(id=index, file_name=name, width=IMAGE_SIZE, height=IMAGE_SIZE)
        )
        annotations.append(
            dict(
                id=index + 1,
                image_id=index,
                category_id=label + 1,
                bbox=[x, y, side, side],
                area=side * side,
                iscrowd=0,
            )
        )
    (folder / 'annotations.json').write_text(
        json.dumps(
            dict(
                images=images,
                annotations=annotations,
                categories=[
                    dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)
                ],
            )
        )
    )
    return str(folder)


def write_class_folders(folder: str | Path, seed: int = 0) -> str:
    """Write a tiny data set for classifiers: two images in a folder each."""
    rng = np.random.default_rng(seed)
    for name in 'abc':
        (Path(folder) / name).mkdir(parents=True)
        for index in range(2):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder) / name / f'{index}.png')
    return str(folder)


def classifier_loader(
    data_root: str, batch_size: int = 2, shuffle: bool = True
) -> dict:
    """A dataloader config of what :func:`write_class_folders` wrote."""
    return dict(
        batch_size=batch_size,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=shuffle),
        collate_fn=dict(type='default_collate'),
        dataset=dict(
            type='CustomDataset',
            data_root=data_root,
            pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
        ),
    )


def run_config(
    model: dict, data_root: str, work_dir: str | Path, **kwargs: Any
) -> ConfigDict:
    """A whole mmengine config: two epochs of four iterations with COCO AP.

    Args:
        model: Model config.
        data_root: What :func:`write_coco` wrote.
        work_dir: Where the run writes.
        kwargs: Top-level entries to add or replace.
    """
    size = (IMAGE_SIZE, IMAGE_SIZE)
    pipeline = [
        dict(type='LoadImageFromFile'),
        # Writes the scale factor that prediction needs.
        dict(type='Resize', scale=size),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs'),
    ]
    dataset = dict(
        type='CocoDataset',
        data_root=data_root,
        metainfo=dict(classes=CLASSES),
        ann_file='annotations.json',
        data_prefix=dict(img='images/'),
        pipeline=pipeline,
    )
    loader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=dataset,
    )
    test_loader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            dataset,
            test_mode=True,
            pipeline=[
                *pipeline[:3],
                dict(
                    type='PackDetInputs',
                    meta_keys=(
                        'img_id',
                        'img_path',
                        'ori_shape',
                        'img_shape',
                        'scale_factor',
                    ),
                ),
            ],
        ),
    )
    evaluator = dict(
        type='CocoMetric', ann_file=f'{data_root}/annotations.json'
    )
    return ConfigDict(
        dict(
            default_scope='mmdet',
            custom_imports=dict(
                imports=['era_mm'], allow_failed_imports=False
            ),
            model=model,
            work_dir=str(work_dir),
            # Runs of one second in one process would else share their log.
            experiment_name=str(work_dir).replace('/', '-'),
            train_dataloader=loader,
            val_dataloader=test_loader,
            test_dataloader=test_loader,
            val_evaluator=evaluator,
            test_evaluator=evaluator,
            train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=2),
            val_cfg=dict(),
            test_cfg=dict(),
            optim_wrapper=dict(
                type='OptimWrapper',
                optimizer=dict(type='SGD', lr=0.001, momentum=0.9),
                clip_grad=dict(max_norm=1.0),
            ),
            default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
            randomness=dict(seed=0),
            log_level='WARNING',
        )
        | kwargs
    )
