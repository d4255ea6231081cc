"""TWI on every head family: mmdet's own configs, shrunk, as pairs."""

import copy

import numpy as np
import pytest
import torch
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm

from era_mm.methods.era.twi import StudentProposals, find_head
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
    save_teacher,
)

DENSE = {
    'retinanet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'fcos': 'fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-'
    'giou_1x_coco.py',
    'atss': 'atss/atss_r50_fpn_1x_coco.py',
    'gfl': 'gfl/gfl_r50_fpn_1x_coco.py',
    'reppoints': 'reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py',
    'rtmdet': 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'yolox': 'yolox/yolox_tiny_8xb8-300e_coco.py',
}
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
CONFIGS = {**DENSE, **TWO_STAGE, **DETR_LIKE}
FAMILIES = [*DENSE, *TWO_STAGE]
each_family = pytest.mark.parametrize('family', FAMILIES)
#: Every family with all of its head, the dense ones with predictors as well.
each_place = pytest.mark.parametrize(
    ('family', 'place'),
    [(family, 'head') for family in FAMILIES]
    + [(family, 'predictors') for family in DENSE],
)


# -- tiny pairs of the hosts' own configs -------------------------------------


def replace(config, changes):
    """Set the keys that a nested dict has, wherever they are."""
    if isinstance(config, list):
        for item in config:
            replace(item, changes)
    elif isinstance(config, dict):
        for key, value in config.items():
            if key in changes:
                config[key] = changes[key]
            else:
                replace(value, changes)


def host_config(family, width=8, num_classes=3):
    """An installed config with all widths cut down."""
    config = get_config(f'mmdet::{CONFIGS[family]}').model.to_dict()
    config['data_preprocessor']['batch_augments'] = None
    config['backbone']['init_cfg'] = None
    channels = 2 * width
    replace(
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
    if family in ('fcos', 'atss', 'gfl', 'reppoints'):
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
    if 'encoder' in config:
        shrink_transformer(config, channels)
    if 'rpn_head' in config:
        shrink_two_stage(config)
    return config


def shrink_transformer(config, channels):
    replace(
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
    config['encoder']['layer_cfg']['self_attn_cfg']['num_heads'] = 2
    config['decoder']['layer_cfg']['cross_attn_cfg']['num_heads'] = 2


def shrink_two_stage(config):
    # Few enough that the samplers have to choose.
    replace(
        config['train_cfg'],
        dict(nms_pre=50, max_per_img=20),
    )
    config['train_cfg']['rpn']['sampler']['num'] = 12
    stages = config['train_cfg']['rcnn']
    for stage in stages if isinstance(stages, list) else [stages]:
        stage['sampler']['num'] = 8
    config['test_cfg']['rpn'] |= dict(nms_pre=50, max_per_img=20)
    config['test_cfg']['rcnn'] |= dict(max_per_img=10)


def pair_of(family, tmp_path, student=None, width=12, **kwargs):
    """A Distillation of a family's pair, the teacher's weights loaded."""
    teacher = host_config(family, width=width)
    distiller = dict(
        type='era_mm.ERADistiller', mbrnet=dict(num_branches=2), **kwargs
    )
    model = MODELS.build(
        distillation_config(
            distiller,
            student=student or host_config(family),
            teacher=teacher,
            checkpoint=save_teacher(teacher, tmp_path / 'teacher.pth'),
        )
    )
    model.init_weights()
    return model


def twin_of(family, tmp_path, **kwargs):
    """A pair whose estimates of the teacher's features are exact.

    The student has the teacher's weights, align is the identity and the
    branches give zero.
    """
    model = pair_of(family, tmp_path, host_config(family, 12), **kwargs)
    teacher = model.teachers['teacher'].model
    model.student.load_state_dict(teacher.state_dict())
    net = model.distillers['distiller'].mbrnet
    for align in net.aligns:
        torch.nn.init.dirac_(align.weight)
        torch.nn.init.zeros_(align.bias)
    for module in net.levels.modules():
        if isinstance(module, _BatchNorm):
            torch.nn.init.zeros_(module.weight)
    return model


def batch_of(model, training=True, seed=0):
    """A preprocessed batch, with masks where the student predicts some."""
    batch = detection_batch(seed=seed)
    for sample in batch['data_samples'] if model.with_mask else ():
        truth = sample.gt_instances
        drawn = np.zeros((len(truth), 64, 64), np.uint8)
        for mask, box in zip(drawn, truth.bboxes.int().tolist(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = 1
        truth.masks = BitmapMasks(drawn, 64, 64)
    return model.data_preprocessor(batch, training)


def freeze_norms(model):
    """Training mode with norms as in a teacher."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


def era_losses(model, data):
    """The distiller's losses alone, drawn from seed 7."""
    era = model.distillers['distiller']
    with model._student_recorder as recorder:
        model.student(**data, mode='loss')
    student_feats = recorder.pop()
    teacher_feats = model.teachers['teacher'].extract(**data)
    torch.manual_seed(7)
    return era.loss(
        student_feats=student_feats,
        teacher_feats=teacher_feats,
        data_samples=data['data_samples'],
    )


def total(losses):
    return sum(v.sum() if torch.is_tensor(v) else sum(v) for v in losses)


def teacher_losses(model, data):
    """The teacher's own losses on the batch, as mmdet trains it."""
    plain = freeze_norms(copy.deepcopy(model.teachers['teacher'].model))
    torch.manual_seed(7)
    with torch.no_grad():
        losses = plain(**data, mode='loss')
    return {
        key: float(total([value]))
        for key, value in losses.items()
        if 'loss' in key
    }


# -- every family -------------------------------------------------------------


@each_place
def test_family__trains_and_predicts_in_every_mode(family, place, tmp_path):
    model = pair_of(family, tmp_path, twi_place=place)
    teacher = model.teachers['teacher']
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
    # The third forward is where an extra without gradient is noticed.
    for step in range(3):
        data = batch_of(model, seed=step)
        losses = model(**data, mode='loss')
        assert any(key.startswith('loss_era_twi_') for key in losses)
        loss, log = model.parse_losses(losses)
        assert all(torch.as_tensor(v).isfinite() for v in log.values()), log
        wrapper.update_params(loss)
    assert teacher.fingerprint() == teacher.loaded_fingerprint
    assert all(p.grad is None for p in teacher.model.parameters())
    assert not any(m.training for m in teacher.model.modules())

    model.eval()
    model.active_modes = ('E0', 'E1', 'T', 'ST')
    data = batch_of(model, training=False)
    with torch.no_grad():
        own = model(**data, mode='predict')
    assert all('pred_instances' in sample for sample in own)
    for mode in model.active_modes:
        samples = model.mode_predictions[mode]
        assert len(samples) == 2
        for sample in samples:
            assert len(sample.pred_instances), mode
            assert sample.pred_instances.scores.isfinite().all()


@each_place
def test_values__on_the_teachers_features_twi_is_the_teachers_loss(
    family, place, tmp_path
):
    # Flags, strides, assigners, samplers, proposals: were one of them not the
    # teacher's, a term would differ.
    model = twin_of(family, tmp_path, twi_place=place)
    freeze_norms(model.student)
    data = batch_of(model)
    found = era_losses(model, data)
    expected = teacher_losses(model, data)
    assert len(expected) > 1
    # w_0 + w_1 + w_2 = 1 + 1/2 + 1/4
    for key, value in expected.items():
        name = key.replace('loss_', '')
        assert found.pop(f'loss_era_twi_{name}').item() == pytest.approx(
            1.75 * value, rel=1e-4, abs=1e-6
        ), key
    assert not any('twi' in key for key in found)
    # And the features were exact indeed.
    assert found['loss_era_align'] < 1e-8


@each_place
def test_modes__on_the_teachers_features_all_predict_as_the_teacher(
    family, place, tmp_path
):
    model = twin_of(family, tmp_path, twi_place=place).eval()
    model.active_modes = ('E0', 'E1', 'T', 'ST')
    data = batch_of(model, training=False)
    with torch.no_grad():
        teacher = model.teachers['teacher'].model(
            data['inputs'],
            [sample.new() for sample in data['data_samples']],
            mode='predict',
        )
        model(**data, mode='predict')
    for mode in model.active_modes:
        for a, b in zip(teacher, model.mode_predictions[mode], strict=True):
            assert len(a.pred_instances)
            assert set(a.pred_instances.keys()) == set(b.pred_instances.keys())
            for key in a.pred_instances.keys():  # noqa: SIM118
                torch.testing.assert_close(
                    a.pred_instances[key],
                    b.pred_instances[key],
                    rtol=1e-4,
                    atol=1e-3,
                )


@each_place
def test_gradient__reaches_estimates_and_student_never_a_predictor(
    family, place, tmp_path
):
    model = pair_of(family, tmp_path, twi_place=place)
    losses = era_losses(model, batch_of(model))
    total(v for k, v in losses.items() if 'twi' in k).backward()

    def reached(module):
        return any(
            p.grad is not None and p.grad.any() for p in module.parameters()
        )

    student, net = model.student, model.distillers['distiller'].mbrnet
    assert reached(student.backbone)
    assert reached(net.aligns)
    for branches in net.levels[:2]:
        assert all(reached(branch) for branch in branches)
    assert not reached(model.teachers['teacher'].model)
    # The student's own head takes part as far as its towers are estimated.
    last = {
        name
        for name, p in student.named_parameters()
        if 'head' in name and p.grad is not None and p.grad.any()
    }
    assert bool(last) == (place == 'predictors')
    assert all('_convs.' in name for name in last), last


@pytest.mark.parametrize('steps', ['last', 'sampled', 'none'])
@pytest.mark.parametrize('family', ['yolox', 'cascade_rcnn'])
def test_steps__other_than_all_train_every_kind_of_head(
    family, steps, tmp_path
):
    model = pair_of(family, tmp_path, twi_steps=steps)
    losses = model(**batch_of(model), mode='loss')
    assert any('twi' in key for key in losses) == (steps != 'none')
    assert torch.isfinite(model.parse_losses(losses)[0])
    assert 'T' in model.distillers['distiller'].inference_modes()
