"""IE-KD's configs: their phases, their schedules, and a step of each."""

import copy
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    MODELS,
    PARAM_SCHEDULERS,
    init_default_scope,
)
from mmpretrain.structures import DataSample

from era_mm.core.host_models import resolve_model_config
from era_mm.engine.preflight import find_config
from era_mm.testing import detection_batch

ROOT = Path(__file__).resolve().parents[2]
# Plain twin, training images (COCO: those with annotations) and batch over
# 8 GPUs (digits: one process).
DATA = {
    'ie_kd_retinanet_r101_r50': ('plain_retinanet_r50', 117266, 16),
    'ie_kd_resnet34_resnet18_imagenet': (
        'plain_resnet18_imagenet',
        1281167,
        256,
    ),
    'ie_kd_resnet56_resnet20_cifar10': ('plain_resnet20_cifar10', 50000, 128),
    'ie_kd_retinanet_r18w32_gfl_r18w16_digits': (
        'plain_gfl_r18w16_digits',
        1200,
        8,
    ),
    'ie_kd_retinanet_r18w32_r18w16_digits': (
        'plain_retinanet_r18w16_digits',
        1200,
        8,
    ),
}
STEMS = sorted(file.stem for file in (ROOT / 'configs/ie_kd').glob('*.py'))


def load(stem):
    cfg = Config.fromfile(find_config(stem))
    init_default_scope(cfg.default_scope)
    return cfg


def learning_rates(cfg, begin, end):
    """The rates of some epochs by the schedules that count epochs."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    configs = copy.deepcopy(cfg.param_scheduler)
    schedulers = []
    for config in configs if isinstance(configs, list) else [configs]:
        if config.get('by_epoch', True):
            config.pop('convert_to_iter_based', None)
            schedulers.append(
                PARAM_SCHEDULERS.build(
                    config, default_args=dict(optimizer=optimizer)
                )
            )
    rates = []
    for _ in range(end):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return rates[begin:]


@pytest.mark.parametrize('stem', DATA)
def test_phase__takes_whole_epochs_before_the_twins_schedule(stem):
    cfg = load(stem)
    name, images, batch = DATA[stem]
    twin = load(name)
    per_epoch = math.ceil(images / batch)
    epochs = cfg.train_cfg.max_epochs - twin.train_cfg.max_epochs
    iters = cfg.model.distiller.pretrain_iters
    assert iters == epochs * per_epoch
    # The student's rates are its twin's; tests/test_configs.py compares the
    # warm-up, which counts iterations.
    total = twin.train_cfg.max_epochs
    assert learning_rates(cfg, epochs, epochs + total) == pytest.approx(
        learning_rates(twin, 0, total)
    )


def test_configs__are_all_there():
    assert set(DATA) < set(STEMS)
    assert [stem for stem in STEMS if stem.startswith('ie_dml_')] == [
        'ie_dml_resnet18w8_resnet18w8_digit_crops',
        'ie_dml_resnet34_resnet18_imagenet',
        'ie_dml_resnet56_resnet20_cifar100',
        'ie_dml_retinanet_r18w16_r18w16_digits',
        'ie_dml_retinanet_r50_r50',
    ]


def narrow(config):
    """A model of a config with a backbone that is quick to run."""
    config, scope = resolve_model_config(config)
    if scope is not None:
        config.type = f'{scope}.{config.type}'
    config.backbone.pop('init_cfg', None)
    if (
        config.backbone.get('base_channels', 64) < 64
        or 'CIFAR' in config.backbone.type
    ):
        return config
    config.backbone.update(base_channels=8, stem_channels=8)
    if 'in_channels' in config.get('neck', {}):
        config.neck.in_channels = [c // 8 for c in config.neck.in_channels]
        config.backbone.depth = 50
    elif config.head.in_channels == 512:
        config.head.in_channels = 64
    return config


def batch_of(cfg):
    if cfg.default_scope == 'mmdet':
        return detection_batch(2, size=128)
    side = 64 if 'imagenet' in cfg.filename else 32
    return dict(
        inputs=[
            torch.randint(0, 256, (3, side, side)).byte() for _ in range(2)
        ],
        data_samples=[DataSample().set_gt_label(label) for label in (1, 7)],
    )


@pytest.mark.parametrize('stem', STEMS)
def test_config__trains_a_step_of_each_phase(stem):
    cfg = load(stem)
    model = copy.deepcopy(cfg.model)
    if 'data_preprocessor' in cfg:
        model.data_preprocessor = cfg.data_preprocessor
    if 'students' in model:
        model.students = {k: narrow(v) for k, v in model.students.items()}
    else:
        model.student = narrow(model.student)
        model.teacher = dict(
            config=narrow(model.teacher.config), checkpoint='random'
        )
    built = MODELS.build(model)
    built.init_weights()
    built.train()
    wrapper = build_optim_wrapper(built, cfg.optim_wrapper)
    if 'students' in model:
        logged = built.train_step(batch_of(cfg), wrapper)
        assert {f'{k}.loss_iekd_inherit' for k in model.students} <= set(
            logged
        )
        built.check_modes(cfg.custom_hooks[0].modes)
        return
    assert 'distiller.pretrain' in built.train_step(batch_of(cfg), wrapper)
    MessageHub.get_current_instance().update_info(
        'iter', cfg.model.distiller.pretrain_iters
    )
    logged = built.train_step(batch_of(cfg), wrapper)
    assert {'loss_iekd_inherit', 'loss_iekd_explore'} <= set(logged)
