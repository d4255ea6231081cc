"""The classification demo's configs: one recipe, and a step of ERA."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmpretrain.structures import DataSample

from demo import models
from demo.classification import ClassificationDemo
from era_mm.core import extras_of
from era_mm.datasets.digit_crops import CropParams, make_digit_crops
from era_mm.testing import save_teacher

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
(ERA,) = CONFIGS.rglob('era_resnet18w16_resnet18w8_digit_crops.py')
(NORMALISED,) = CONFIGS.rglob('era_normalised_*_digit_crops.py')


@pytest.fixture
def era():
    return Config.fromfile(ERA)


@pytest.fixture
def teacher(era):
    return Config.fromfile(era.model.teacher.config)


def num_parameters(cfg):
    init_default_scope('mmpretrain')
    return sum(p.numel() for p in MODELS.build(cfg).parameters())


def test_teacher__differs_from_the_student_in_size_alone(era, teacher):
    assert not {
        key
        for key in set(era) | set(teacher)
        if key not in ('model', 'custom_hooks', 'custom_imports')
        and era.get(key) != teacher.get(key)
    }
    student, large = era.model.student.to_dict(), teacher.model.to_dict()
    for key in ('base_channels', 'stem_channels', 'strides'):
        student['backbone'].pop(key, None)
        large['backbone'].pop(key, None)
    student['head'].pop('in_channels')
    large['head'].pop('in_channels')
    assert student == large
    assert num_parameters(teacher.model) > 3 * num_parameters(
        era.model.student
    )


def test_normalised__differs_from_era_in_form_and_own_logits_alone(era):
    other = Config.fromfile(NORMALISED)
    assert ClassificationDemo.configs['era'] == f'era/{NORMALISED.stem}'
    distiller = other.model.distiller
    assert distiller.pop('form') == 'normalised'
    assert distiller.pop('schedules') == {'loss_era_logit': dict(scale=0.0)}
    assert other.to_dict() == era.to_dict()


def test_schedule__decays_over_the_whole_run(era):
    warm_up, cosine = era.param_scheduler
    assert (cosine.begin, cosine.end) == (0, era.train_cfg.max_epochs)
    assert cosine.T_max == era.train_cfg.max_epochs
    per_epoch = CropParams().num_train / era.train_dataloader.batch_size
    assert warm_up.end < 0.1 * per_epoch * era.train_cfg.max_epochs


def test_student__is_stock_mmpretrain(era):
    """The demo loads it where era_mm is not imported."""
    (plain,) = CONFIGS.rglob('plain_resnet18w8_digit_crops.py')
    assert 'era_mm' not in Config.fromfile(plain).pretty_text
    assert Config.fromfile(plain).model == era.model.student


def run_on_crops(cfg, tmp_path):
    """Train for one epoch; returns the scalars and the saved file."""
    make_digit_crops(tmp_path / 'crops', CropParams(0, 20, 10, 10))
    for name in ('train', 'val', 'test'):
        loader = cfg[f'{name}_dataloader']
        loader.update(num_workers=0, persistent_workers=False, batch_size=10)
        loader.dataset.data_root = str(tmp_path / 'crops')
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.work_dir = str(tmp_path / 'run')
    cfg.visualizer.vis_backends = []
    runner = Runner.from_cfg(cfg)
    runner.train()
    state = torch.load(tmp_path / 'run/epoch_1.pth', weights_only=False)
    plain = MODELS.build(cfg.model.student)
    plain.load_state_dict(state['state_dict'], strict=True)
    return runner.message_hub.log_scalars, state['state_dict']


def test_era__trains_on_crops_into_a_plain_student(era, teacher, tmp_path):
    init_default_scope('mmpretrain')
    era.model.teacher.checkpoint = save_teacher(
        teacher.model.to_dict(), tmp_path / 'teacher.pth', 'mmpretrain'
    )
    scalars, state = run_on_crops(era, tmp_path)
    for term in ('align', 'residual', 'twi_cls', 'logit'):
        assert scalars[f'train/loss_era_{term}'].current() > 0
    for mode in ('', 'E0/', 'T/', 'ST/'):
        assert f'val/{mode}accuracy/top1' in scalars
    assert extras_of(state)['distiller']['type'] == 'ERADistiller'


def test_t2b__trains_on_crops_into_a_plain_student(tmp_path):
    init_default_scope('mmpretrain')
    cfg = Config.fromfile(
        CONFIGS / 'trunk_to_branch/t2b_resnet18w8_digit_crops.py'
    )
    scalars, state = run_on_crops(cfg, tmp_path)
    assert scalars['train/loss_t2b_peers'].current() > 0
    assert scalars['train/loss_t2b_decorrelation'].current() > 0
    assert 'val/accuracy/top1' in scalars
    assert extras_of(state)['distiller']['type'] == 'TrunkToBranchDistiller'


def test_measure_variants__counts_what_each_mode_runs(
    era, teacher, monkeypatch
):
    monkeypatch.setattr(models, 'WARM_UP', 0)
    monkeypatch.setattr(models, 'TIMED', 2)
    init_default_scope('mmpretrain')
    plain = MODELS.build(era.model.student).eval()
    large = MODELS.build(teacher.model).eval()
    era.model.teacher.checkpoint = 'random'
    threads = torch.get_num_threads()
    found = models.measure_variants(
        teacher=large,
        plain=plain,
        era_student=plain,
        era=MODELS.build(era.model).eval(),
        modes=('T', 'ST'),
        files=['a', 'b'],
        read=lambda file: {
            'inputs': [torch.zeros(3, 32, 32, dtype=torch.uint8)],
            'data_samples': [DataSample()],
        },
        tell=lambda share: None,
    )
    torch.set_num_threads(threads)
    small = num_parameters(era.model.student)
    align = 64 * 128 + 128
    block = 64 * 64 + 64 + 2 * 64
    heads = 128 * 10 - 64 * 10
    counts = {
        name: variant['parameters']
        for name, variant in found['variants'].items()
    }
    assert counts == {
        'teacher': num_parameters(teacher.model),
        'plain': small,
        'era_S': small,
        'era_T': small + heads + align + 4 * (2 * block + align),
        'era_ST': 1290 + small + align + 4 * (2 * block + align),
    }
    assert found['timed_images'] == 2
    assert all(v['ms_per_image'] > 0 for v in found['variants'].values())
