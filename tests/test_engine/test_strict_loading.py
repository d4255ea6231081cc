"""`load_from` takes what the host takes, and refuses what does not fit."""

import copy
import logging

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import load_state_dict

from era_mm.engine.runner import TrainingRunner
from era_mm.errors import UserError
from era_mm.testing import detector_config, distillation_config


def vit(size, width=8):
    return dict(
        type='mmpretrain.ImageClassifier',
        data_preprocessor=dict(
            type='mmpretrain.ClsDataPreprocessor', num_classes=3
        ),
        backbone=dict(
            type='mmpretrain.VisionTransformer',
            img_size=size,
            patch_size=8,
            out_type='avg_featmap',
            arch=dict(
                embed_dims=width,
                num_layers=1,
                num_heads=1,
                feedforward_channels=width,
            ),
        ),
        head=dict(
            type='mmpretrain.LinearClsHead', num_classes=3, in_channels=width
        ),
    )


FCOS = detector_config(head='FCOSHead')
WEIGHT = 'bbox_head.fcos_cls.weight'


def of_vit():
    model = distillation_config(
        dict(type='era_mm.ERADistiller', source='backbone'),
        vit(32),
        vit(32, 16),
    )
    model['input_size'] = 32
    return 'mmpretrain', vit(32), model


def of_fcos():
    teacher = detector_config(head='FCOSHead', width=16, channels=24)
    return (
        'mmdet',
        FCOS,
        distillation_config(dict(type='era_mm.ERADistiller'), FCOS, teacher),
    )


def with_averages(state):
    return state | {f'ema_{k.replace(".", "_")}': v for k, v in state.items()}


def older_names(state):
    return {k.replace('.conv_', '.fcos_'): v for k, v in state.items()}


def saved(config, change, file):
    torch.manual_seed(1)
    state = MODELS.build(ConfigDict(copy.deepcopy(config))).state_dict()
    torch.save(dict(meta={}, state_dict=change(dict(state))), file)
    return str(file)


def runner_of(model, scope, tmp_path):
    return TrainingRunner.from_cfg(
        Config(
            dict(
                model=copy.deepcopy(model),
                work_dir=str(tmp_path / 'run'),
                default_scope=scope,
                experiment_name=tmp_path.name,
            )
        )
    )


@pytest.mark.parametrize(
    ('pair', 'of', 'change'),
    [
        (of_vit, vit(64), dict),
        (of_fcos, FCOS, with_averages),
        (of_fcos, FCOS, older_names),
    ],
    ids=['another-image-size', 'averages', 'older-names'],
)
@pytest.mark.parametrize('kind', ['plain', 'era'])
def test_load_from__holds_what_the_host_loads(
    kind, pair, of, change, tmp_path, caplog
):
    scope, plain, era = pair()
    with DefaultScope.overwrite_default_scope(scope):
        file = saved(of, change, tmp_path / 'file.pth')
        host = MODELS.build(ConfigDict(copy.deepcopy(plain)))
        load_state_dict(host, torch.load(file)['state_dict'], logger='silent')
        runner = runner_of(plain if kind == 'plain' else era, scope, tmp_path)
        with caplog.at_level(logging.WARNING, logger=runner.logger.name):
            runner.load_checkpoint(file)
    found = runner.model.state_dict()
    expected = host.state_dict()
    assert list(found) == list(expected)
    for key in expected:
        assert torch.equal(found[key], expected[key]), key
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    number = len(expected) if change is with_averages else 0
    assert (f'has {number} tensors that' in log) == bool(number)


def with_another_shape(state):
    return older_names(state) | {WEIGHT: torch.ones(9, 8, 3, 3)}


def with_nan(state):
    return older_names(state) | {
        WEIGHT: torch.full_like(state['bbox_head.conv_cls.weight'], torch.nan)
    }


def deeper(state):
    return state | {'backbone.layer4.7.conv1.weight': torch.ones(1)}


def lacking(state):
    state = older_names(state)
    del state[WEIGHT]
    return state


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (with_another_shape, 'other shapes (1): bbox_head.conv_cls.weight: f'),
        (with_nan, 'not finite (1): bbox_head.conv_cls.weight'),
        (deeper, 'not in the model (1): backbone.layer4.7.conv1.weight'),
        (lacking, 'missing in the file (1): bbox_head.conv_cls.weight'),
    ],
    ids=['shape', 'nan', 'deeper', 'lacking'],
)
def test_load_from__refuses_what_does_not_fit(change, said, tmp_path):
    """By the present names, whatever those in the file are."""
    scope, _, era = of_fcos()
    with DefaultScope.overwrite_default_scope(scope):
        file = saved(FCOS, change, tmp_path / 'file.pth')
        runner = runner_of(era, scope, tmp_path)
        with pytest.raises(UserError) as caught:
            runner.load_checkpoint(file)
    assert said in str(caught.value)
    assert 'strict_load=False' in str(caught.value)
