"""Files that a host loads whole are a teacher's as well."""

import copy

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import load_state_dict

from era_mm.core.teacher import Teacher
from era_mm.testing import detector_config


def vit(size):
    return dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(
            type='mmpretrain.VisionTransformer',
            img_size=size,
            patch_size=8,
            out_type='avg_featmap',
            arch=dict(
                embed_dims=8,
                num_layers=1,
                num_heads=1,
                feedforward_channels=8,
            ),
        ),
        head=dict(
            type='mmpretrain.LinearClsHead', num_classes=3, in_channels=8
        ),
    )


def same(state):
    return state


def with_averages(state):
    """As mmdet 2 wrote them beside the weights."""
    return state | {f'ema_{k.replace(".", "_")}': v for k, v in state.items()}


def older_names(state):
    """As FCOS had them before mmdet 2.0."""
    return {k.replace('.conv_', '.fcos_'): v for k, v in state.items()}


@pytest.mark.parametrize(
    ('scope', 'config', 'of', 'change'),
    [
        ('mmdet', detector_config(), detector_config(), with_averages),
        (
            'mmdet',
            detector_config(head='FCOSHead'),
            detector_config(head='FCOSHead'),
            older_names,
        ),
        ('mmpretrain', vit(32), vit(64), same),
    ],
    ids=['averages', 'older-names', 'another-image-size'],
)
def test_teacher__holds_what_the_host_loads(
    scope, config, of, change, tmp_path, caplog
):
    with DefaultScope.overwrite_default_scope(scope):
        torch.manual_seed(1)
        state = MODELS.build(ConfigDict(copy.deepcopy(of))).state_dict()
        host = MODELS.build(ConfigDict(copy.deepcopy(config)))
        file = tmp_path / 'teacher.pth'
        torch.save({'state_dict': change(dict(state))}, file)
        load_state_dict(
            host, copy.copy(torch.load(file)['state_dict']), logger='silent'
        )
        teacher = Teacher(config, str(file))
        teacher.load()
    expected = host.state_dict()
    found = teacher.model.state_dict()
    assert list(found) == list(expected)
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


def test_teacher__names_in_one_line_what_its_file_has_besides(
    tmp_path, monkeypatch
):
    lines = []
    monkeypatch.setattr(
        'era_mm.core.checkpoint.print_log',
        lambda text, **kwargs: lines.append(text),
    )
    state = dict(MODELS.build(detector_config()).state_dict())
    file = tmp_path / 'teacher.pth'
    torch.save({'state_dict': with_averages(state)}, file)
    Teacher(detector_config(), str(file)).load()
    assert lines == [
        f'{str(file)!r} has {len(state)} tensors that RetinaNet does not '
        'use: ema_backbone_conv1_weight, '
        'ema_backbone_bn1_weight, ema_backbone_bn1_bias, ....'
    ]


def test_teacher__of_which_a_file_lacks_a_tensor_is_refused(tmp_path):
    state = older_names(
        dict(MODELS.build(detector_config(head='FCOSHead')).state_dict())
    )
    del state['bbox_head.fcos_cls.bias']
    file = tmp_path / 'teacher.pth'
    torch.save({'state_dict': state}, file)
    with pytest.raises(
        ValueError, match=r'missing in the file \(1\): bbox_head.conv_cls.bias'
    ):
        Teacher(detector_config(head='FCOSHead'), str(file)).load()


def test_teacher__of_numbers_that_are_none_is_refused_under_older_names(
    tmp_path,
):
    state = dict(MODELS.build(detector_config(head='FCOSHead')).state_dict())
    state['bbox_head.conv_cls.bias'] *= torch.nan
    file = tmp_path / 'teacher.pth'
    torch.save({'state_dict': older_names(state)}, file)
    with pytest.raises(
        ValueError, match=r'not finite \(1\): bbox_head.conv_cls.bias'
    ):
        Teacher(detector_config(head='FCOSHead'), str(file)).load()


def test_teacher__that_its_host_cannot_resize_has_the_hosts_error(tmp_path):
    """Not one of ours about shapes."""

    def refuse(*arguments):
        raise NotImplementedError('a table of this size cannot be resized')

    config = detector_config(head='FCOSHead')
    file = tmp_path / 'teacher.pth'
    torch.save({'state_dict': MODELS.build(config).state_dict()}, file)
    teacher = Teacher(config, str(file))
    teacher.model._register_load_state_dict_pre_hook(refuse)
    with pytest.raises(NotImplementedError, match='cannot be resized'):
        teacher.load()
