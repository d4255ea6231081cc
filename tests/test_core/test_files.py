"""Files of whole runs: what is in them, their size, and who loads them."""

import copy
import io
import logging
import subprocess
import sys

import pytest
import torch
from mmdet.apis import init_detector
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmpretrain import get_model

from era_mm.core import extras_of
from era_mm.hosts import PROFILES, find_profile
from era_mm.testing import (
    classifier_config,
    classifier_loader,
    detector_config,
    distillation_config,
    run_config,
    save_teacher,
    write_class_folders,
)

ERA = dict(type='era_mm.ERADistiller')
#: Bytes for the distillation's config, which a file's meta data have.
CONFIG = 10_000
#: Bytes of a zip archive for the name and the alignment of one tensor.
ENTRY = 500


def size_of(tensors):
    return sum(t.numel() * t.element_size() + ENTRY for t in tensors)


def size_of_log(file):
    """Bytes of what a file keeps of the losses that were logged."""
    buffer = io.BytesIO()
    torch.save(torch.load(file, weights_only=False)['message_hub'], buffer)
    return buffer.tell()


def detection_run(coco, work_dir, model):
    """A run with every hook that saves; its files by kind."""
    config = run_config(
        model,
        coco,
        work_dir,
        custom_hooks=[dict(type='EMAHook', momentum=0.1)],
        train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=2),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook',
                interval=3,
                by_epoch=False,
                save_best='coco/bbox_mAP',
                rule='greater',
                save_last=True,
                published_keys=['meta', 'state_dict'],
            )
        ),
    )
    Runner.from_cfg(Config(config)).train()
    files = {}
    for file in sorted(work_dir.glob('*.pth')):
        kind = 'best' if file.name.startswith('best') else 'iter'
        if '-' in file.name:
            kind += ' published'
        files.setdefault(kind, []).append(file)
    return files


@pytest.fixture(scope='module')
def runs(coco, teacher_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    return {
        name: detection_run(coco, folder / name, model)
        for name, model in (
            ('plain', detector_config()),
            ('era', distillation_config(ERA, checkpoint=teacher_file)),
        )
    }


def test_files__of_every_kind_are_written(runs):
    for files in runs.values():
        # Iterations 3, 6 and, the last, 8; published: the last and the best.
        assert {kind: len(found) for kind, found in files.items()} == {
            'iter': 3,
            'iter published': 1,
            'best': 1,
            'best published': 1,
        }


def test_files__are_no_larger_than_the_plain_runs_and_the_extras(runs):
    model = MODELS.build(distillation_config(ERA))
    extras = size_of(model.distillers.state_dict().values())
    momentum = size_of(model.distillers.parameters())
    teacher = size_of(model.teachers['teacher'].model.parameters())
    assert teacher > 2 * CONFIG
    for kind, files in runs['era'].items():
        for plain, era in zip(runs['plain'][kind], files, strict=True):
            more = extras if 'published' in kind else extras + momentum
            limit = plain.stat().st_size + more + CONFIG
            if 'published' not in kind:
                # More losses have more of a history.
                limit += size_of_log(era) - size_of_log(plain)
            assert era.stat().st_size <= limit, era.name
            if 'published' not in kind:
                continue
            content = torch.load(era, weights_only=False)
            assert set(content) == {'meta', 'state_dict'}
            assert extras_of(content['state_dict'])


def test_files__published_ones_are_plain_students_to_mmdet(
    runs, coco, tmp_path, caplog
):
    config = Config(run_config(detector_config(), coco, tmp_path))
    for kind in ('iter published', 'best published'):
        (file,) = runs['era'][kind]
        with caplog.at_level(logging.WARNING):
            model = init_detector(config, str(file), device='cpu')
        assert 'do not match' not in caplog.text
        state = torch.load(file, weights_only=False)['state_dict']
        own = model.state_dict()
        assert list(own) == list(state)
        assert all(
            torch.equal(own[key], value) for key, value in state.items()
        )
        # The names of the classes came along.
        assert tuple(model.dataset_meta['classes']) == (
            'square',
            'bar',
            'cross',
        )


@pytest.mark.slow
def test_files__are_tested_by_mim_as_they_lie(runs, coco, tmp_path):
    pytest.importorskip('mim')
    (file,) = runs['era']['best']
    config = run_config(
        detector_config(), coco, tmp_path / 'stock', log_level='INFO'
    )
    del config['custom_imports']
    Config(config.to_dict()).dump(tmp_path / 'stock.py')
    host = next(h for h in PROFILES[find_profile()] if h.module == 'mmdet')
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'mim', 'test', host.distribution),
            *('stock.py', '--checkpoint', str(file)),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert 'coco/bbox_mAP' in output
    assert 'unexpected key' not in output
    assert 'missing keys' not in output


# -- classifiers ------------------------------------------------------------


def test_files__of_a_classifier_are_what_get_model_loads(tmp_path, caplog):
    data = write_class_folders(tmp_path / 'data')
    teacher = classifier_config(width=16)
    model = dict(
        type='era_mm.Distillation',
        student=classifier_config(),
        teacher=dict(
            config=teacher,
            checkpoint=save_teacher(teacher, tmp_path / 't.pth', 'mmpretrain'),
        ),
        distiller=ERA,
    )
    loader = classifier_loader(data, batch_size=3, shuffle=False)
    config = run_config(
        model,
        '',
        tmp_path / 'run',
        default_scope='mmpretrain',
        train_dataloader=loader,
        val_dataloader=copy.deepcopy(loader),
        val_evaluator=dict(type='Accuracy', topk=(1,)),
        test_cfg=None,
        test_dataloader=None,
        test_evaluator=None,
        train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=1),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook',
                interval=1,
                save_best='accuracy/top1',
                published_keys=['meta', 'state_dict'],
            )
        ),
    )
    Runner.from_cfg(Config(config)).train()
    files = sorted((tmp_path / 'run').glob('*.pth'))
    assert len(files) == 4
    stock = Config(
        dict(
            default_scope='mmpretrain',
            model=classifier_config(),
            test_dataloader=loader,
        )
    )
    for file in files:
        with caplog.at_level(logging.WARNING):
            found = get_model(
                copy.deepcopy(stock), pretrained=str(file), device='cpu'
            )
        assert 'do not match' not in caplog.text
        state = torch.load(file, weights_only=False)['state_dict']
        own = found.state_dict()
        assert list(own) == list(state)
        assert all(
            torch.equal(own[key], value) for key, value in state.items()
        )
