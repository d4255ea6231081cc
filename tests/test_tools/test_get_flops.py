"""Parameters and FLOPs of what a config deploys, the pair's among them."""

import importlib.util
import json
from pathlib import Path

import pytest
from mmengine.analysis import get_model_complexity_info
from mmengine.registry import MODELS

from era_mm.core import student_config_of
from era_mm.engine.preflight import find_config
from era_mm.methods.residual_kd.split import measure
from era_mm.testing import (
    classifier_config,
    detector_config,
    distillation_config,
)

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location(
    'get_flops', ROOT / 'tools/get_flops.py'
)
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)


def write_config(file, model, scope='mmdet'):
    file.write_text(f'default_scope = {scope!r}\nmodel = {model!r}\n')
    return str(file)


def test_cost__of_a_plain_detector_is_mmengines(tmp_path):
    model = MODELS.build(detector_config()).eval()
    cost = tool.cost_of(write_config(tmp_path / 'a.py', detector_config()), 64)
    counted = get_model_complexity_info(
        model, (3, 64, 64), show_table=False, show_arch=False
    )
    assert cost == dict(
        config='a',
        input_size=64,
        params=sum(p.numel() for p in model.parameters()),
        flops=counted['flops'],
    )


def test_cost__of_residual_kd_is_the_pairs_with_its_additions(tmp_path):
    config = distillation_config(dict(type='era_mm.ResidualKDDistiller'))
    cost = tool.cost_of(write_config(tmp_path / 'pair.py', config), 64)
    pair = MODELS.build(student_config_of(config)[0]).eval()
    counted = get_model_complexity_info(
        pair, (3, 64, 64), show_table=False, show_arch=False
    )
    # 16 channels at strides 8 and 16: 16 * (8 * 8 + 4 * 4) = 1280.
    assert cost['flops'] == counted['flops'] + 1280
    assert cost['params'] == sum(p.numel() for p in pair.parameters())
    plain = tool.cost_of(
        write_config(tmp_path / 'a.py', detector_config()), 64
    )
    assert plain['params'] < cost['params']
    assert plain['flops'] < cost['flops'] - 1280
    # Nothing is left behind on a pair that was counted.
    hooks = [len(m._forward_hooks) for m in pair.modules()]
    assert measure(pair, (64, 64))[''].flops == cost['flops']
    assert [len(m._forward_hooks) for m in pair.modules()] == hooks


def test_cost__of_another_distillation_is_the_students(tmp_path):
    config = dict(
        type='era_mm.Distillation',
        student=classifier_config(),
        teacher=dict(
            config=classifier_config(width=16), checkpoint='missing.pth'
        ),
        distiller=dict(type='era_mm.ERADistiller'),
    )
    scope = 'mmpretrain'
    found = [
        tool.cost_of(write_config(tmp_path / name, model, scope), 32)
        for name, model in (('a.py', config), ('b.py', classifier_config()))
    ]
    assert [cost.pop('config') for cost in found] == ['a', 'b']
    assert found[0] == found[1]


def test_cost__of_a_student_of_another_host_is_looked_up_there(tmp_path):
    plain = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'
    config = dict(type='era_mm.Distillation', student=plain)
    found = [
        tool.cost_of(name, 32)
        for name in (write_config(tmp_path / 'a.py', config), plain)
    ]
    names = [cost.pop('config') for cost in found]
    assert names == ['a', 'resnet18_8xb16_cifar10']
    assert found[0] == found[1]


def test_cost__of_two_stages_has_the_second_in_it():
    name = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco'
    with_regions, without = (
        tool.cost_of(f'mmdet::{config}.py', 64)
        for config in (name, 'rpn/rpn_r50_fpn_1x_coco')
    )
    assert with_regions['config'] == 'faster-rcnn_r50_fpn_1x_coco'
    # Two layers of 1024, the first on 256 channels of 7 x 7, and the two
    # linear layers for 81 classes and 80 boxes.
    layers = [(256 * 49, 1024), (1024, 1024), (1024, 81), (1024, 320)]
    parameters = sum((ins + 1) * outs for ins, outs in layers)
    assert with_regions['params'] - without['params'] == parameters
    # Each region goes through all of them.
    per_region = sum(ins * outs for ins, outs in layers)
    regions, rest = divmod(
        with_regions['flops'] - without['flops'], per_region
    )
    assert regions > 0
    assert rest == 0


@pytest.mark.parametrize(
    'file', ['digits_flops.jsonl', 'residual_kd_flops.jsonl']
)
def test_recorded__costs_are_what_is_counted(file):
    """As the documents show them; the teachers need not be there."""
    with (ROOT / 'results' / file).open() as lines:
        for cost in map(json.loads, lines):
            # The larger images take half a minute.
            if cost['input_size'] <= 224:
                config = find_config(cost['config'])
                assert tool.cost_of(config, cost['input_size']) == cost


def test_main__prints_a_row_and_writes_a_line_per_config(tmp_path, capsys):
    files = [
        write_config(tmp_path / f'{name}.py', detector_config(width=width))
        for name, width in (('small', 8), ('large', 16))
    ]
    out = tmp_path / 'flops.jsonl'
    assert tool.main([*files, '--input-size', '64', '--out', str(out)]) == 0
    costs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [cost['config'] for cost in costs] == ['small', 'large']
    printed = capsys.readouterr().out.splitlines()
    for cost, row in zip(costs, printed[-2:], strict=True):
        assert row.split() == [
            cost['config'],
            f'{cost["params"] / 1e6:.3f}',
            f'{cost["flops"] / 1e9:.3f}',
        ]
    assert list(tmp_path.glob('*.part')) == []


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ('no_such_config', 'no_such_config'),
        ('ie_dml_retinanet_r18w16_r18w16_digits', 'trains two students'),
    ],
)
def test_main__says_what_is_wrong(config, message, tmp_path, capsys):
    out = tmp_path / 'flops.jsonl'
    assert tool.main([config, '--out', str(out)]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()
