"""A real matrix: a teacher, a plain and a distilled student, tiny."""

import hashlib
import io
import json
import os
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from rich.console import Console

from era_mm import testing
from era_mm.core.safe_files import load_file
from era_mm.engine.suite import rows
from era_mm.engine.suite.command import run_suite

ROOT = Path(__file__).resolve().parents[3]
SUITE = """
title = 'Toys'
metric = dict(key='coco/bbox_mAP', name='AP', scale=100)
seeds = [3]
keep = ['loss_bb*']
options = {'preflight': False}
pairs = dict(toy=dict(teacher='big', student='small'))
methods = dict(
    plain=dict(config='{student}', role='plain'),
    era=dict(config='era_{pair}', options={'train_cfg.max_epochs': 1}),
)
"""


def save_config(name, model, coco, **kwargs):
    cfg = testing.run_config(model, coco, 'work_dirs/unused')
    # A run's own name, as in the configs that people write.
    for key in ('work_dir', 'experiment_name'):
        del cfg[key]
    Config(cfg | kwargs).dump(f'configs/{name}.py')


# Eight programs, each of which imports the hosts.
@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_suite__trains_and_tests_real_models(coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Where the programs find the package.
    monkeypatch.setenv(
        'PYTHONPATH', f'{ROOT}:{os.environ.get("PYTHONPATH", "")}'
    )
    for folder in ('configs', 'results', 'docs'):
        Path(folder).mkdir()
    big = testing.detector_config(width=16, channels=24)
    save_config('big', big, coco)
    save_config('small', testing.detector_config(), coco)
    save_config(
        'era_toy',
        testing.distillation_config(
            dict(type='era_mm.ERADistiller'),
            teacher=str(tmp_path / 'configs/big.py'),
            checkpoint='missing.pth',
        ),
        coco,
        custom_hooks=[dict(type='era_mm.TWIHook', modes=['T'])],
    )
    Path('toys.py').write_text(SUITE)
    screen = io.StringIO()
    done = run_suite(
        'toys.py', jobs=2, console=Console(file=screen, width=200)
    )
    assert done, screen.getvalue()
    _, found = rows.read_rows(Path('results/toys.jsonl'))
    assert [(r['method'], r['seed']) for r in found] == [
        ('teacher', None),
        ('plain', 3),
        ('era', 3),
    ]
    teacher, plain, era = found
    for row in found:
        assert 0 <= row['metrics']['coco/bbox_mAP'] <= 1
        assert row['seconds']['train'] > 0
        assert row['memory']['process_mib'] > 100
        assert row['versions']['torch'] == torch.__version__.split('+')[0]
        assert row['machine']['threads'] == 1
    assert plain['val'].keys() >= {'coco/bbox_mAP'}
    assert set(plain['values']) == {'loss_bbox'}
    assert teacher['schedule'] == plain['schedule'] == {'epochs': 2}
    assert era['schedule'] == {'epochs': 1}
    assert 'T/coco/bbox_mAP' in era['metrics']
    folder = Path('work_dirs/suites/toys/toy')
    cfg = Config.fromfile(folder / 'era/seed3/config.py')
    assert cfg.randomness.seed == 3
    # The checksum is of the weights alone, in the order of their names.
    left = json.loads((folder / 'teacher/train.json').read_text())
    weights = load_file(left['checkpoint'])['state_dict']
    expected = hashlib.sha256()
    for key in sorted(weights):
        shape = tuple(weights[key].shape)
        expected.update(f'{key} {weights[key].dtype} {shape} '.encode())
        expected.update(weights[key].numpy().tobytes())
    assert era['teacher'] == left['weights'] == expected.hexdigest()
    # Those weights are the teacher's, and no other's.
    weights = folder / 'teacher/train/epoch_2.pth'
    assert Path(cfg.model.teacher.checkpoint).samefile(weights)
    assert Path('docs/results.md').read_text().count('1 of 1') >= 3

    # Of a cell that was stopped behind its training the test is left.
    (folder / 'plain/seed3/test.json').unlink()
    Path('results/toys.jsonl').unlink()
    before = (folder / 'plain/seed3/train.json').stat().st_mtime_ns
    assert run_suite(
        'toys.py',
        jobs=2,
        console=Console(file=io.StringIO()),
        only=['*/plain/s3'],
    )
    _, (again,) = rows.read_rows(Path('results/toys.jsonl'))
    assert again['metrics'] == plain['metrics']
    assert (folder / 'plain/seed3/train.json').stat().st_mtime_ns == before
