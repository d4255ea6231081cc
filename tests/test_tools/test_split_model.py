"""The separation costs what it may, counted on the whole host models."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models.backbones import ResNet

from era_mm.methods.residual_kd import pair_config, split_by_flops
from era_mm.methods.residual_kd.pair_config import arguments_of
from era_mm.methods.residual_kd.split import (
    _divisor_for,
    _widest,
    widths,
)
from era_mm.testing import classifier_config, detector_config

ROOT = Path(__file__).resolve().parents[2]
SIZE = 32
SHORT = dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,))


def classifier(**backbone):
    """A classifier without head: its features are what is counted."""
    return ConfigDict(
        type='mmpretrain.ImageClassifier',
        data_preprocessor=dict(type='mmpretrain.ClsDataPreprocessor'),
        backbone=backbone,
    )


# The second number: what the narrowest assistant must fit into.
MODELS_OF = {
    'resnet': (classifier(type='mmpretrain.ResNet', depth=18, **SHORT), 0.1),
    'resnext': (
        classifier(type='mmpretrain.ResNeXt', depth=50, **SHORT),
        0.2,
    ),
    'mobilenet_v2': (
        classifier(type='mmpretrain.MobileNetV2', widen_factor=0.5),
        0.3,
    ),
    'convnext': (
        classifier(
            type='mmpretrain.ConvNeXt',
            arch=dict(depths=[1, 1, 1, 1], channels=[40, 80, 160, 320]),
        ),
        0.1,
    ),
    'retinanet': (detector_config(width=64, channels=64), 0.2),
    # The project's own.
    'resnet20': (classifier(type='era_mm.CIFARResNet', depth=20), 0.1),
    'resnet8x4': (
        classifier(type='era_mm.CIFARResNet', depth=8, width=4),
        0.1,
    ),
    'wrn_10_2': (
        classifier(type='era_mm.CIFARWideResNet', depth=10, width=2),
        0.1,
    ),
    'vgg8': (classifier(type='era_mm.CIFARVGG', depth=8), 0.1),
    'mobilenet_v1': (classifier(type='era_mm.MobileNetV1'), 0.1),
    'mobilenet_v2_cifar': (
        classifier(type='era_mm.CIFARMobileNetV2'),
        0.1,
    ),
    'shufflenet_v1': (classifier(type='era_mm.CIFARShuffleNetV1'), 0.1),
    'shufflenet_v2': (classifier(type='era_mm.CIFARShuffleNetV2'), 0.1),
    'cswin': (
        classifier(
            type='era_mm.CSWinTransformer',
            arch=dict(
                embed_dims=32, depths=(1, 1, 1, 1), num_heads=(2, 4, 8, 16)
            ),
        ),
        0.1,
    ),
}


def count(config):
    """FLOPs of a whole host model, the additions of a pair by hand."""
    model = MODELS.build(copy.deepcopy(config)).eval()
    inputs = torch.zeros(1, 3, SIZE, SIZE)
    with torch.no_grad():
        analyzer = FlopAnalyzer(model, inputs)
        analyzer.unsupported_ops_warnings(False)
        analyzer.uncalled_modules_warnings(False)
        flops = analyzer.total()
        if config['backbone']['type'] == 'era_mm.ResidualPair':
            flops += sum(feat.numel() for feat in model.backbone(inputs))
    return flops


def check(model, share, source):
    split = split_by_flops(model, share, source=source, input_size=SIZE)
    pair = pair_config(
        model, source=source, student=split.student, assistant=split.assistant
    )
    costs = split.costs
    whole, both = count(model), count(pair)
    assert both <= whole
    # What the split has measured up to the cut, the host's counter confirms
    # on the whole: the head is the same.
    assert whole - both == costs['model'].flops - costs['pair'].flops
    assert 0 < costs['assistant'].flops <= share * costs['model'].flops
    parts = costs['student'].flops + costs['assistant'].flops
    assert parts < costs['pair'].flops
    return split


@pytest.mark.parametrize('name', list(MODELS_OF))
def test_split__costs_no_more_than_the_model(name):
    model, share = MODELS_OF[name]
    split = check(model, share, 'neck' if name == 'retinanet' else 'backbone')
    # And not much less.
    assert split.costs['pair'].flops > 0.88 * split.costs['model'].flops


@pytest.mark.parametrize('share', [0.1, 0.3, 0.5])
def test_split__takes_the_widest_that_fit(share):
    model, _ = MODELS_OF['resnet']
    split = check(model, share, 'backbone')
    # A step of 4 channels more, of either, would be too much.
    wider = copy.deepcopy(split)
    wider.student['backbone']['base_channels'] += 4
    wider.student['backbone']['stem_channels'] += 4
    for student, assistant in (
        (wider.student, split.assistant),
        ({}, _wider(split.assistant)),
    ):
        pair = pair_config(
            model, source='backbone', student=student, assistant=assistant
        )
        if student:
            assert count(pair) > count(model)
        else:
            alone = count(pair) - count(model)
            assert alone > share * count(model)


def _wider(assistant):
    backbone = {k: v + 4 for k, v in assistant['backbone'].items()}
    return dict(assistant, backbone=backbone)


def test_split__of_share_0_is_the_model():
    model, _ = MODELS_OF['resnet']
    split = split_by_flops(model, 0, source='backbone', input_size=SIZE)
    assert (split.student, split.assistant) == ({}, None)
    assert split.costs['pair'] == split.costs['model']
    assert 'assistant' not in split.costs


def test_widths__by_hand():
    backbone = dict(type='mmdet.ResNeXt', depth=50, groups=32, base_width=4)
    found = widths(dict(backbone=backbone), 16, with_neck=True)
    # 64 channels by 16: four widths; groups in proportion.
    assert [c['backbone'] for c in found] == [
        dict(base_channels=b, stem_channels=b, groups=g)
        for b, g in ((16, 8), (32, 16), (48, 24), (64, 32))
    ]
    # A stem has channels of its own.
    backbone = dict(type='mmdet.ResNet', base_channels=16, stem_channels=32)
    found = widths(dict(backbone=backbone), 16, with_neck=True)
    assert [c['backbone'] for c in found] == [
        dict(base_channels=16, stem_channels=stem) for stem in (16, 32)
    ]
    neck = dict(type='FPN', out_channels=24)
    found = widths(
        dict(backbone=dict(type='mmdet.ResNet', base_channels=8), neck=neck),
        8,
        with_neck=True,
    )
    assert [c['neck']['out_channels'] for c in found] == [8, 16, 24]
    assert all(c['backbone']['base_channels'] == 8 for c in found)
    # A student's neck keeps what the head gets.
    parts = dict(backbone=dict(type='mmdet.ResNet'), neck=neck)
    assert all('neck' not in c for c in widths(parts, 8, with_neck=False))
    # 'atto' begins with 40 channels; half of 40 is 20, by 8 it is 16.
    found = widths(
        dict(backbone=dict(type='mmpretrain.ConvNeXt', arch='atto')),
        8,
        with_neck=True,
    )
    assert dict(
        depths=[2, 2, 6, 2], channels=[16, 40, 80, 160], _delete_=True
    ) in [c['backbone']['arch'] for c in found]
    # 63 / 64 of them are 39.4, 78.8, 157.5, 315: never rounded up.
    *_, narrower, unchanged = [
        c['backbone']['arch']['channels'] for c in found
    ]
    assert narrower == [32, 72, 152, 312]
    assert unchanged == [40, 80, 160, 320]


def test_widths__of_the_projects_backbones_by_hand():
    def half(**backbone):
        found = widths(dict(backbone=backbone), None, with_neck=True)
        return found[len(found) // 2 - 1]['backbone']

    # Its `width` says 64 and 32, in steps of 4 and 2: 16 of them.
    assert half(type='era_mm.CIFARResNet', depth=8, width=4) == dict(
        base_channels=32, stem_channels=16
    )
    assert half(type='era_mm.CIFARWideResNet', depth=10, width=4) == dict(
        width=2.0
    )
    assert half(type='era_mm.CIFARVGG', depth=8) == dict(widen_factor=0.5)
    for name in ('MobileNetV1', 'CIFARShuffleNetV1', 'CIFARShuffleNetV2'):
        assert half(type=f'era_mm.{name}') == dict(widen_factor=0.5)
    # Heads of 144 / 6 = 24 numbers: 72 / 6 = 12. Steps of lcm(8, 6) = 24.
    assert half(type='era_mm.CSWinTransformer', arch='large') == dict(
        arch=dict(
            embed_dims=72,
            depths=(2, 4, 32, 2),
            num_heads=(6, 12, 24, 24),
            _delete_=True,
        )
    )


@pytest.mark.parametrize(
    ('channels', 'divisor'), [(8, 1), (16, 1), (40, 2), (64, 4), (256, 8)]
)
def test_divisor__by_hand(channels, divisor):
    assert _divisor_for(channels) == divisor


def test_widest__is_the_last_that_fits():
    for limit, expected in ((0, None), (1, 1), (4, 4), (9, 5)):
        found = _widest([1, 2, 3, 4, 5], lambda w, n=limit: w <= n)
        assert found == expected


def test_widths__are_multiples_of_a_group_norms_groups():
    norm = dict(type='GN', num_groups=12)
    parts = dict(
        backbone=dict(type='mmdet.ResNet', base_channels=48, norm_cfg=norm),
        neck=dict(type='FPN', out_channels=24, norm_cfg=norm),
    )
    found = widths(parts, 8, with_neck=True)
    # lcm(8, 12) = 24.
    assert [
        (c['backbone']['base_channels'], c['neck']['out_channels'])
        for c in found
    ] == [(24, 24), (48, 24)]


def test_split__of_the_digits_student():
    """Its neck has a group norm of 8 groups; channels are tried by 4."""
    model = Config.fromfile(
        ROOT / 'configs/plain/plain_retinanet_r18w16_digits.py'
    )
    with DefaultScope.overwrite_default_scope('mmdet'):
        split = split_by_flops(
            model.model, 0.2, divisor=4, input_size=(64, 64)
        )
    assert split.assistant['neck']['out_channels'] % 8 == 0
    assert split.costs['pair'].flops <= split.costs['model'].flops


@pytest.mark.parametrize(
    'backbone',
    [
        # Heads of a single number, stages with widths of their own, no heads.
        dict(type='mmpretrain.VisionTransformer', arch='b'),
        dict(type='mmpretrain.PoolFormer', arch='s12'),
        dict(type='mmpretrain.MlpMixer', arch='b'),
    ],
    ids=['vit', 'poolformer', 'mixer'],
)
def test_widths__of_an_arch_of_another_kind_are_not_known(backbone):
    with pytest.raises(
        ValueError, match=r'How to narrow a .* is not known.*yourself'
    ):
        widths(dict(backbone=backbone), None, with_neck=True)


@MODELS.register_module(name='_Fixed', force=True)
class Fixed(ResNet):
    """Passes none of the host's arguments on."""

    def __init__(self, init_cfg=None):
        super().__init__(18, base_channels=8, init_cfg=init_cfg, **SHORT)


@MODELS.register_module(name='_PassedOn', force=True)
class PassedOn(ResNet):
    """Passes all of them on."""

    def __init__(self, depth=18, **kwargs):
        super().__init__(depth, **kwargs)


def test_arguments__are_those_that_the_class_takes():
    assert 'base_channels' not in arguments_of(dict(type='_Fixed'))
    found = arguments_of(dict(type='_PassedOn'))
    assert (found['depth'], found['base_channels']) == (18, 64)


def test_pair__of_a_backbone_without_arguments():
    """It gets none that only its base class takes, such as `norm_eval`."""
    pair = pair_config(
        classifier(type='_Fixed'),
        source='backbone',
        assistant=dict(form='image'),
    )
    assert count(pair) > 2 * count(classifier(type='_Fixed'))


@pytest.mark.parametrize(
    ('model', 'share', 'message'),
    [
        (MODELS_OF['resnet'][0], 1.0, r'in \[0, 1\)'),
        (MODELS_OF['resnet'][0], 0.001, 'narrowest one takes'),
        (
            classifier(type='mmpretrain.VGG', depth=11),
            0.1,
            'How to narrow a mmpretrain.VGG',
        ),
        (
            # It has four widths: 0.5, 1, 1.5 and 2.
            classifier(type='mmpretrain.ShuffleNetV2'),
            0.1,
            r"ShuffleNetV2 cannot be narrowed.*'widen_factor': 0\..*must be in"
            '.*yourself',
        ),
        (
            classifier(type='era_mm.CIFARMobileNetV2'),
            0.001,
            "cannot be narrowed.*'width'.*Give a larger share",
        ),
        (
            classifier(type='_Fixed'),
            0.1,
            'How to narrow a _Fixed is not known',
        ),
    ],
    ids=[
        'share',
        'too small',
        'unknown',
        'some widths',
        'no channels',
        'not its own',
    ],
)
def test_split__that_cannot_be_is_refused(model, share, message):
    with pytest.raises(ValueError, match=message):
        split_by_flops(model, share, source='backbone', input_size=SIZE)


def test_split__by_a_divisor_that_is_none_is_refused():
    with pytest.raises(ValueError, match='1 or more, but got 0'):
        split_by_flops(MODELS_OF['resnet'][0], 0.1, divisor=0)


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location(
        'split_model', ROOT / 'tools/split_model.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tool__prints_what_a_config_has_to_say(tool, tmp_path, capsys):
    model = classifier_config(width=32)
    file = tmp_path / 'given.py'
    file.write_text(f'model = {model!r}\n')
    options = ['--source', 'backbone', '--share', '0.2', '--divisor', '4']
    assert tool.main([str(file), *options, '--input-size', str(SIZE)]) == 0
    printed = capsys.readouterr().out
    table, _, snippet = printed.partition('\n\n')
    for name in ('model', 'student', 'assistant', 'pair'):
        assert f'\n{name} ' in table
    found = {}
    exec(snippet, found)
    distiller = found['distiller']
    assert distiller.pop('type') == 'era_mm.ResidualKDDistiller'
    pair = pair_config(model, **distiller)
    assert count(pair) <= count(model)


def test_tool__says_what_is_wrong(tool, capsys):
    assert tool.main(['no_such_config']) == 1
    assert 'no_such_config' in capsys.readouterr().err
    assert tool.main(['ie_dml_retinanet_r50_r50']) == 1
    assert 'trains two students' in capsys.readouterr().err
