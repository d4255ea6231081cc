"""SoKD's configs: a training step of each, and what the digits' is against."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

from era_mm.core.host_models import resolve_model_config
from era_mm.engine.preflight import find_config
from era_mm.testing import detection_batch

ROOT = Path(__file__).resolve().parents[2]
STEMS = sorted(
    file.stem
    for start in ('sokd', 'fitnet')
    for file in (ROOT / 'configs').rglob(f'{start}_*.py')
)


def load(stem):
    cfg = Config.fromfile(find_config(stem))
    init_default_scope(cfg.default_scope)
    return cfg


def narrow(config):
    """A model of a config with a backbone that is quick to run."""
    config, scope = resolve_model_config(config)
    if scope is not None and '.' not in config.type:
        config.type = f'{scope}.{config.type}'
    config.backbone.pop('init_cfg', None)
    if config.backbone.get('depth') in (34, 50, 101):
        config.backbone.update(base_channels=8, stem_channels=8)
        if 'in_channels' in config.get('neck', {}):
            config.neck.in_channels = [64 // 2 * 2**i for i in range(4)]
            config.backbone.depth = 50
    elif config.backbone.type.rpartition('.')[2] == 'ResNet':
        config.backbone.update(base_channels=8, stem_channels=8)
        if 'in_channels' in config.get('neck', {}):
            config.neck.in_channels = [8, 16, 32, 64]
    if config.get('head', {}).get('in_channels') == 512:
        config.head.in_channels = 64
    return config


def batch_of(cfg):
    if cfg.default_scope == 'mmdet':
        return detection_batch(2, size=128)
    size = 32 if 'CIFAR' in cfg.model.student.backbone.type else 64
    return dict(
        inputs=[
            torch.randint(0, 256, (3, size, size)).byte() for _ in range(2)
        ],
        data_samples=[DataSample().set_gt_label(label) for label in (1, 7)],
    )


@pytest.mark.parametrize('stem', STEMS)
def test_config__trains_a_step(stem):
    cfg = load(stem)
    model = copy.deepcopy(cfg.model)
    if 'data_preprocessor' in cfg:
        model.data_preprocessor = cfg.data_preprocessor
    model.student = narrow(model.student)
    model.teacher = dict(
        config=narrow(model.teacher.config), checkpoint='random'
    )
    built = MODELS.build(model)
    built.init_weights()
    built.train()
    wrapper = build_optim_wrapper(built, cfg.optim_wrapper)
    logged = built.train_step(batch_of(cfg), wrapper)
    base = 'reviewkd' if 'reviewkd' in stem else 'imitation'
    assert f'loss_{base}' in logged
    own = {key for key in logged if key.startswith('loss_sokd_')}
    expected = {'adapter', 'agree', 'anchor', 'area'}
    assert own == (
        {f'loss_sokd_{key}' for key in expected}
        if stem.startswith('sokd')
        else set()
    )
    assert all(torch.as_tensor(v).isfinite() for v in logged.values())


def test_configs__are_all_there():
    assert STEMS == [
        'fitnet_retinanet_r18w32_gfl_r18w16_digits',
        'fitnet_retinanet_r18w32_r18w16_digits',
        'fitnet_retinanet_r18w32_r18w16_letters',
        'fitnet_retinanet_r18w32_r18w8_letters',
        'sokd_faster_rcnn_r101_r50',
        'sokd_resnet32x4_resnet8x4_cifar100',
        'sokd_resnet34_resnet18_imagenet',
        'sokd_retinanet_r101_r50',
        'sokd_retinanet_r18w32_gfl_r18w16_digits',
        'sokd_retinanet_r18w32_r18w16_digits',
        'sokd_reviewkd_faster_rcnn_r101_r50',
        'sokd_reviewkd_resnet34_resnet18_imagenet',
        'sokd_reviewkd_resnet50_mobilenet_v2_cifar100',
    ]


@pytest.mark.parametrize('student', ['r18w16', 'gfl_r18w16'])
def test_digits__wraps_what_it_is_compared_with(student):
    sokd = load(f'sokd_retinanet_r18w32_{student}_digits')
    fitnet = load(f'fitnet_retinanet_r18w32_{student}_digits')
    assert sokd.model.distiller.base == fitnet.model.distiller
    assert sokd.model.teacher == fitnet.model.teacher
    assert sokd.model.distiller.dam.anchor == 'boxes'
