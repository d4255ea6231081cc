"""What a step costs on a GPU: the stages, tried on a CPU."""

import json

import pytest
import torch

from dev import gpu_benchmark
from era_mm.methods.era.bottleneck import BottleneckBranches
from era_mm.testing import distillation_config


@pytest.fixture
def config(tmp_path):
    model = distillation_config(dict(type='era_mm.ERADistiller'))
    wrapper = dict(
        type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9)
    )
    file = tmp_path / 'toy.py'
    file.write_text(
        f"default_scope = 'mmdet'\nmodel = {model!r}\n"
        f'optim_wrapper = {wrapper!r}\n'
    )
    return file


def run(stage, config, *arguments):
    out = config.parent / f'{stage}.json'
    status = gpu_benchmark.main(
        [stage, str(config), '--out', str(out), '--device', 'cpu']
        + ['--size', '64', '64', '--iters', '2', '--warmup', '1']
        + ['--lock', str(config.parent / 'lock'), *arguments]
    )
    assert status == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize('amp', [False, True])
def test_settings__are_those_that_are_asked_for(config, amp):
    record = run(
        'settings', config, '--batch-size', '1', *(['--amp'] if amp else [])
    )
    assert record['stage'] == 'settings'
    assert record['setting']['batch_size'] == 1
    assert record['setting']['amp'] is amp
    assert record['distillers'][0]['ratio']['median'] > 0


def test_variants__are_compared_with_one_floor(config):
    record = run('variants', config, '--amp')
    assert record['setting']['amp']
    names = [variant['name'] for variant in record['variants']]
    assert names == list(gpu_benchmark.VARIANTS)
    teachers = {
        tuple(variant['teacher_ms']['rounds'])
        for variant in record['variants']
    }
    assert len(teachers) == 1


def test_profile__names_kernels_and_parts(config):
    record = run('profile', config)
    assert set(record['era']['parts']) == set(gpu_benchmark.PARTS)
    assert record['plain']['parts'] == {}
    for name in ('plain', 'era'):
        found = record[name]
        times = [kernel['ms'] for kernel in found['kernels']]
        assert times == sorted(times, reverse=True)
        assert 0 < sum(times) <= found['kernels_ms'] + 1e-6
    assert record['era']['launches'] > record['plain']['launches']


def test_looped__equals_the_grouped_branches():
    branches = BottleneckBranches(
        [6, 6], [10, 12], 3, 4, None, dict(type='ReLU')
    )
    branches.init_weights()
    for layer in (*branches.reduce, *branches.spatial):
        torch.nn.init.normal_(layer[0].bias)
    feats = [torch.randn(2, 6, 8, 9), torch.randn(2, 6, 4, 5)]
    for found, expected in zip(
        gpu_benchmark.looped(branches, feats),
        branches._hidden(feats),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
