"""Trunk-to-Branch's configs: a step of each, on a narrower trunk."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

from era_mm.engine.preflight import find_config
from era_mm.testing import detection_batch

ROOT = Path(__file__).resolve().parents[2]
STEMS = sorted(
    file.stem for file in (ROOT / 'configs/trunk_to_branch').glob('*.py')
)


def narrow(student):
    """The trunk with a backbone that a slow core runs in no time."""
    backbone = student.backbone
    # Nothing is fetched.
    backbone.pop('init_cfg', None)
    if backbone.type == 'ConvNeXt':
        backbone.arch = dict(depths=[1, 1, 1, 1], channels=[8, 8, 16, 16])
        student.head.in_channels = 16
    elif backbone.get('arch') == 'tiny':
        backbone.arch = dict(
            embed_dims=8, depths=[1, 1, 2, 1], num_heads=[2, 2, 4, 8]
        )
        student.head.in_channels = 64
    elif backbone.get('depth') == 50:
        backbone.update(base_channels=8, stem_channels=8)
        student.neck.in_channels = [32, 64, 128, 256]
        student.neck.out_channels = student.bbox_head.in_channels = 16
        student.bbox_head.feat_channels = 16
    return student


@pytest.mark.parametrize('stem', STEMS)
def test_config__trains_a_step(stem):
    cfg = Config.fromfile(find_config(stem))
    init_default_scope(cfg.default_scope)
    config = copy.deepcopy(cfg.model)
    if 'data_preprocessor' in cfg:
        config.data_preprocessor = cfg.data_preprocessor
    config.student = narrow(config.student)
    model = MODELS.build(config)
    model.init_weights()
    model.train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    peers = model.distillers['distiller'].peers
    branches = copy.deepcopy(peers.state_dict())
    trunk = copy.deepcopy(model.state_dict())
    if cfg.default_scope == 'mmdet':
        batch = detection_batch(2)
    else:
        size = 32 if 'cifar' in stem else 64
        batch = dict(
            inputs=list(torch.randint(0, 256, (2, 3, size, size)).byte()),
            data_samples=[DataSample().set_gt_label(i) for i in (1, 7)],
        )
    found = model.train_step(batch, wrapper)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert {
        'loss_t2b_peers',
        'loss_t2b_ensemble',
        'loss_t2b_decorrelation',
        't2b_correlation',
    } <= set(found)
    for before, after in (
        (branches, peers.state_dict()),
        (trunk, model.state_dict()),
    ):
        assert any(not torch.equal(before[key], after[key]) for key in before)
    # What is trained is the twin's model: no peer is in it.
    plain = MODELS.build(
        dict(config.student, data_preprocessor=cfg.get('data_preprocessor'))
        if 'data_preprocessor' in cfg
        else copy.deepcopy(config.student)
    )
    plain.load_state_dict(model.state_dict(), strict=True)
