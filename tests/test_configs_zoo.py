"""The configs of the standard pairs: facts, teachers, one training step.

Steps run on two tiny images with narrow backbones where the real ones are
heavy; heads, necks, losses and optimisers are the configs' own.
"""

import copy
import functools
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    DATASETS,
    MODELS,
    PARAM_SCHEDULERS,
    DefaultScope,
    init_default_scope,
)
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from PIL import Image

from era_mm.core import extras_of
from era_mm.core.host_models import resolve_model_config
from era_mm.methods.era import MBRNet
from era_mm.testing import detection_batch

ROOT = Path(__file__).resolve().parent.parent
#: Those on the data that this project makes have tests of their own.
MADE = re.compile('_(digits|digit_crops|letters)')
FILES = {
    file.stem: file
    for file in sorted((ROOT / 'configs').rglob('*.py'))
    if '_base_' not in file.parts and not MADE.search(file.stem)
}
ERA = [stem for stem in FILES if stem.startswith('era_')]
PLAIN = [stem for stem in FILES if stem.startswith('plain_')]

COCO = {
    'era_retinanet_r101_r50',
    'era_retinanet_x101_r50',
    'era_faster_rcnn_r101_r50',
    'era_faster_rcnn_cascade_mask_x101_r50',
    'era_fcos_r101_r50',
    'era_gfl_r101_r50',
    'era_atss_r101_r50',
    'era_reppoints_x101_r50',
    'era_rtmdet_l_s',
}
IMAGENET = {
    'era_resnet34_resnet18_imagenet',
    'era_resnet50_mobilenet_v1_imagenet',
    'era_swin_l_resnet50_imagenet',
}
CIFAR = {
    'era_wrn_40_2_wrn_16_2_cifar100',
    'era_wrn_40_2_wrn_40_1_cifar100',
    'era_resnet56_resnet20_cifar100',
    'era_resnet110_resnet32_cifar100',
    'era_resnet32x4_resnet8x4_cifar100',
    'era_vgg13_vgg8_cifar100',
    'era_vgg13_mobilenet_v2_cifar100',
    'era_resnet50_mobilenet_v2_cifar100',
    'era_resnet32x4_shufflenet_v1_cifar100',
    'era_resnet32x4_shufflenet_v2_cifar100',
}


@functools.cache
def parsed(stem):
    return Config.fromfile(FILES[stem])


def load(stem):
    cfg = copy.deepcopy(parsed(stem))
    init_default_scope(cfg.default_scope)
    return cfg


def test_zoo__has_the_standard_pairs():
    assert COCO | IMAGENET | CIFAR <= set(ERA)


def test_docs__list_every_pair_with_its_twin():
    text = (ROOT / 'docs/model_zoo.md').read_text()
    rows = {
        re.search(r'`(era_\w+)`', line)[1]: line
        for line in text.splitlines()
        if line.startswith('| `era_') and not MADE.search(line)
    }
    assert set(rows) == set(ERA)
    for stem, row in rows.items():
        named = re.search(r'Plain twin: (\w+)\.py', FILES[stem].read_text())
        assert f'`{named[1]}`' in row
        teacher = parsed(stem).model.teacher.config
        assert '::' in teacher or f'`{Path(teacher).stem}`' in row
        recorded = (ROOT / 'results' / f'{stem}.json').exists()
        assert recorded or row.endswith('| not run |')


# -- schedules ------------------------------------------------------------

WARM_UP = 1000


@pytest.mark.parametrize(
    ('stem', 'lr', 'epochs', 'milestones'),
    [
        ('plain_retinanet_r50', 0.01, 24, [16, 22]),
        ('plain_faster_rcnn_r50', 0.02, 24, [16, 22]),
        ('plain_fcos_r50', 0.01, 24, [16, 22]),
        ('plain_reppoints_r50', 0.01, 24, [16, 22]),
        ('plain_gfl_r50', 0.01, 12, [8, 11]),
        ('plain_atss_r50', 0.01, 12, [8, 11]),
    ],
)
def test_coco__schedule_is_the_fields(stem, lr, epochs, milestones):
    cfg = load(stem)
    warm_up, steps = cfg.param_scheduler
    assert warm_up.end == WARM_UP
    assert not warm_up.by_epoch
    assert (steps.milestones, steps.gamma) == (milestones, 0.1)
    assert cfg.train_cfg.max_epochs == epochs
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr) == ('SGD', lr)
    assert cfg.optim_wrapper.clip_grad.max_norm == 35
    # Batch 16 on 8 GPUs.
    assert cfg.train_dataloader.batch_size == 2


def test_rtmdet__keeps_its_hooks_beside_ours():
    plain, era = load('plain_rtmdet_s'), load('era_rtmdet_l_s')
    assert plain.train_cfg.max_epochs == 300
    own = [hook.type for hook in plain.custom_hooks]
    assert own == ['EMAHook', 'PipelineSwitchHook']
    assert [hook.type for hook in era.custom_hooks] == [
        'era_mm.EMAHook',
        'PipelineSwitchHook',
        'era_mm.TWIHook',
    ]
    for mine, theirs in zip(
        era.custom_hooks[:2], plain.custom_hooks, strict=True
    ):
        assert dict(mine, type=theirs.type) == theirs


@pytest.mark.parametrize(
    'stem',
    # Transformers and ConvNeXts have a schedule of their own.
    [
        s
        for s in PLAIN
        if s.endswith('imagenet') and not re.search('cswin|convnext', s)
    ],
)
def test_imagenet__schedule_is_the_released_scripts(stem):
    cfg = load(stem)
    assert cfg.optim_wrapper.optimizer.to_dict() | {'_scope_': ''} == dict(
        type='SGD',
        lr=0.1,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        _scope_='',
    )
    assert cfg.param_scheduler.milestones == [30, 60, 90]
    assert cfg.param_scheduler.gamma == 0.1
    assert cfg.train_cfg.max_epochs == 100
    assert cfg.train_dataloader.batch_size == 32
    # Neither biases nor one-dimensional parameters decay.
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    for group in wrapper.optimizer.param_groups:
        (parameter,) = group['params']
        expected = 1e-4 if parameter.dim() > 1 else 0
        assert group['weight_decay'] == expected


@pytest.mark.parametrize(
    ('stem', 'decay'),
    [
        ('era_resnet34_resnet18_imagenet', 0),
        # The released CIFAR configs decay everything.
        ('era_resnet56_resnet20_cifar100', 5e-4),
    ],
)
def test_classification__slopes_of_branches_decay_as_released(stem, decay):
    cfg = load(stem)
    net = MBRNet(8, 8, spatial_dims=0, act_cfg=dict(type='PReLU'))
    slopes = {
        id(m.weight) for m in net.modules() if isinstance(m, torch.nn.PReLU)
    }
    assert len(slopes) == 4
    wrapper = build_optim_wrapper(net, cfg.optim_wrapper)
    found = [
        group['weight_decay']
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
        if id(parameter) in slopes
    ]
    assert found == [decay] * 4


@pytest.mark.parametrize(
    'stem', [stem for stem in PLAIN if stem.endswith('cifar100')]
)
def test_cifar__schedule_is_the_fields(stem):
    cfg = load(stem)
    small = 'mobilenet' in stem or 'shufflenet' in stem
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.lr == (0.01 if small else 0.05)
    assert (optimizer.momentum, optimizer.weight_decay) == (0.9, 5e-4)
    assert not optimizer.get('nesterov')
    assert cfg.param_scheduler.milestones == [150, 180, 210]
    assert cfg.param_scheduler.gamma == 0.1
    assert cfg.train_cfg.max_epochs == 240
    assert cfg.train_dataloader.batch_size == 64
    # CRD's mean and deviation, as fractions; mmpretrain's differ by 2e-4.
    for found, published in (
        (cfg.data_preprocessor.mean, [0.5071, 0.4867, 0.4408]),
        (cfg.data_preprocessor.std, [0.2675, 0.2565, 0.2761]),
    ):
        fractions = [value / 255 for value in found]
        assert fractions == pytest.approx(published, abs=3e-4)


@pytest.mark.parametrize(
    'stem', [stem for stem in PLAIN if stem.endswith('cifar10')]
)
def test_cifar10__schedule_is_ie_kds(stem):
    cfg = load(stem)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (0.1, 5e-4)
    assert (optimizer.momentum, optimizer.nesterov) == (0.9, True)
    assert cfg.param_scheduler.milestones == [80, 120]
    assert cfg.param_scheduler.gamma == 0.1
    assert cfg.train_cfg.max_epochs == 160
    assert cfg.train_dataloader.batch_size == 128


@pytest.mark.parametrize('stem', sorted(IMAGENET | CIFAR))
def test_classification__logits_are_distilled_as_released(stem):
    distiller = load(stem).model.distiller
    if stem in CIFAR:
        assert distiller.logit == dict(weight=1.0, temperature=4.0)
    else:
        # By default.
        assert 'logit' not in distiller
    model = MODELS.build(narrow_pair(load(stem)))
    term = model.distillers['distiller'].logit
    weights = (1.0, 4.0) if stem in CIFAR else (2.0, 1.0)
    assert (term.kind, term.weight, term.temperature) == ('kl', *weights)


# -- teachers -------------------------------------------------------------


def zoo_entry(teacher):
    """What the host's metafile lists for a teacher's config and weights."""
    host, _, name = teacher.config.partition('::')
    package = Path(importlib.util.find_spec(host).origin).parent
    metafile = package / '.mim/configs' / Path(name).parent / 'metafile.yml'
    for entry in yaml.safe_load(metafile.read_text())['Models']:
        # The hosts' forks serve the same files from another address.
        path = re.sub(r'https://[^/]+/', '/', teacher.checkpoint)
        if entry['Config'] == f'configs/{name}' and (
            entry.get('Weights', '').endswith(path)
        ):
            return entry
    return None


#: Besides those of ERA's configs.
OTHER_TEACHERS = ['mgd_faster_rcnn_cascade_mask_x101_dcn_r50']


@pytest.mark.parametrize('stem', [*ERA, *OTHER_TEACHERS])
def test_teacher__is_in_the_hosts_zoo_or_trained_by_a_config_here(stem):
    cfg = load(stem)
    teacher = cfg.model.teacher
    if '::' not in teacher.config:
        trained = Path(teacher.config).resolve()
        assert trained.parent == ROOT / 'configs/plain'
        plain = Config.fromfile(trained)
        assert teacher.checkpoint == (
            f'work_dirs/{trained.stem}/epoch_{plain.train_cfg.max_epochs}.pth'
        )
        assert f'mim train era_mm configs/plain/{trained.name}' in (
            FILES[stem].read_text()
        )
        assert plain.train_dataloader == cfg.train_dataloader
        return
    entry = zoo_entry(teacher)
    assert entry, f'{teacher.config} has no {teacher.checkpoint}'
    # The comment quotes the teacher's metric; the metafile has it.
    quoted = re.search(
        r'\(([\d.]+) (AP|top-1)',
        FILES[stem].read_text().partition('_base_')[0],
    )
    metrics = entry['Results'][0]['Metrics']
    metric = metrics.get('box AP', metrics.get('Top 1 Accuracy'))
    assert float(quoted[1]) == pytest.approx(metric, abs=0.0501)


def test_teachers__of_other_methods_are_checked_too():
    def teachers(stems):
        for stem in stems:
            text = FILES[stem].read_text()
            yield from re.findall(r'teacher=(dict\(.*?\n    \)),', text, re.S)

    checked = set(teachers([*ERA, *OTHER_TEACHERS]))
    # Trained with the schedule of CIFAR-10, which no ERA config has.
    others = [stem for stem in FILES if not stem.endswith('cifar10')]
    assert set(teachers(others)) == checked


def on_meta(config):
    """A model of the hosts without memory for its weights."""
    config, scope = resolve_model_config(config)
    with torch.device('meta'), DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(config)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ('stem', 'backbone'),
    [
        ('era_retinanet_r101_r50', 'resnet101'),
        ('era_retinanet_x101_r50', 'resnext101_64x4d'),
        ('era_faster_rcnn_r101_r50', 'resnet101'),
        ('era_faster_rcnn_cascade_mask_x101_r50', 'resnext101_64x4d'),
        ('era_fcos_r101_r50', 'resnet101'),
        ('era_gfl_r101_r50', 'resnet101'),
        ('era_atss_r101_r50', 'resnet101'),
    ],
)
def test_teacher__has_the_backbone_that_its_name_says(stem, backbone):
    teacher = on_meta(load(stem).model.teacher.config)
    with torch.device('meta'):
        published = getattr(torchvision.models, backbone)()
    assert count(teacher.backbone) == count(published) - count(published.fc)


def test_teacher__reppoints_has_x101_with_deformable_convolutions():
    backbone = load('era_reppoints_x101_r50')
    backbone, _ = resolve_model_config(backbone.model.teacher.config)
    backbone = backbone.backbone
    assert (backbone.type, backbone.depth) == ('ResNeXt', 101)
    assert (backbone.groups, backbone.base_width) == (32, 4)
    assert backbone.dcn.type == 'DCN'
    assert backbone.stage_with_dcn == (False, True, True, True)


def test_rtmdet__sizes_are_those_of_the_hosts_readme():
    # mmdet's RTMDet table: l 52.3 M, s 8.89 M parameters.
    cfg = load('era_rtmdet_l_s')
    teacher = on_meta(cfg.model.teacher.config)
    assert round(count(teacher) / 1e6, 1) == 52.3
    assert round(count(on_meta(cfg.model.student)) / 1e6, 2) == 8.89


@pytest.mark.parametrize(
    'stem', [stem for stem in ERA if stem.endswith('cifar100')]
)
def test_cifar__terms_are_weighed_as_released(stem):
    """Labels 0.9, KL 1 at temperature 4; else the student is the twin's."""
    cfg = load(stem)
    assert cfg.model.student.head.loss.loss_weight == 0.9
    assert cfg.model.distiller.logit == dict(weight=1.0, temperature=4.0)
    student = copy.deepcopy(cfg.model.student)
    student.head.loss.loss_weight = 1.0
    named = re.search(r'Plain twin: (\w+)\.py', FILES[stem].read_text())
    assert student == load(named[1]).model


# -- one training step ----------------------------------------------------


def narrow(model):
    """The model with a backbone that a slow core runs in no time."""
    backbone = model.backbone
    kind = backbone.type.rpartition('.')[2]
    if kind in ('ResNet', 'ResNeXt') and 'in_channels' in model.neck:
        for key in ('groups', 'base_width', 'dcn', 'stage_with_dcn'):
            backbone.pop(key, None)
        backbone.update(
            type='ResNet', depth=50, base_channels=8, stem_channels=8
        )
        model.neck.in_channels = [c // 8 for c in model.neck.in_channels]
    elif kind == 'SwinTransformer':
        backbone.arch = dict(
            embed_dims=12, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2]
        )
        model.head.in_channels = 96
    # Nothing is fetched.
    backbone.pop('init_cfg', None)
    return model


def narrow_pair(cfg):
    """A model config as mmengine's Runner would build it, but small."""
    model = copy.deepcopy(cfg.model)
    if 'data_preprocessor' in cfg:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if 'student' not in model:
        return narrow(model)
    teacher, scope = resolve_model_config(model.teacher.config)
    teacher.type = f'{scope}.{teacher.type}'
    model.student = narrow(model.student)
    model.teacher = dict(config=narrow(teacher), checkpoint='random')
    return model


def batch_of(cfg, size):
    if cfg.default_scope == 'mmdet':
        return detection_batch(2, size=size)
    return dict(
        inputs=[
            torch.randint(0, 256, (3, size, size)).byte() for _ in range(2)
        ],
        data_samples=[DataSample().set_gt_label(label) for label in (1, 7)],
    )


def size_of(stem):
    if '_cifar10' in stem:
        return 32
    return 224 if 'swin' in stem else 64


@pytest.mark.parametrize('stem', [*ERA, *PLAIN])
def test_config__trains_a_step(stem):
    cfg = load(stem)
    # Data set, pipeline and schedule: their types and keys exist.
    for split in ('train', 'val'):
        dataset = cfg[f'{split}_dataloader'].dataset
        DATASETS.build(ConfigDict(dataset, lazy_init=True))
    model = MODELS.build(narrow_pair(cfg))
    model.init_weights()
    model.train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    schedules = cfg.param_scheduler
    for schedule in schedules if isinstance(schedules, list) else [schedules]:
        PARAM_SCHEDULERS.build(
            schedule, default_args=dict(optimizer=wrapper, epoch_length=10)
        )
    for group in wrapper.optimizer.param_groups:
        group['lr'] = 1e-4
    before = {k: v.clone() for k, v in model.state_dict().items()}
    extras = {}
    if stem in ERA:
        extras = copy.deepcopy(model.distillers.state_dict())
    losses = model.train_step(batch_of(cfg, size_of(stem)), wrapper)
    assert all(torch.isfinite(value).all() for value in losses.values())
    after = model.state_dict()
    # Head and backbone have learnt; frozen first stages have not.
    for part in ('backbone', 'head'):
        assert any(
            part in name and not torch.equal(before[name], after[name])
            for name, _ in model.named_parameters()
            if name in after
        )
    if stem in PLAIN:
        return
    assert {'loss_era_align', 'loss_era_residual'} <= set(losses)
    assert any('loss_era_twi' in name for name in losses)
    # A cascade has no one RoI head to compare with, RepPoints no sides.
    logit = 'cascade' not in stem
    box = logit and cfg.default_scope == 'mmdet' and 'reppoints' not in stem
    assert ('loss_era_logit' in losses) == logit
    assert ('loss_era_box' in losses) == box
    # The branches have learnt, and the modes that the config asks for exist.
    assert any(
        not torch.equal(value, extras[name])
        for name, value in model.distillers.named_parameters()
        if 'aligns' not in name
    )
    model.check_modes(cfg.custom_hooks[-1].modes)
    MODELS.build(narrow_pair(cfg).student).load_state_dict(after, strict=True)


#: Of the baselines with configs for these data a config of each form, and
#: what it adds to the student's losses. Those for digits are in
#: `test_methods/test_baseline_configs.py`.
BASELINES = {
    'at_resnet34_resnet18_imagenet': ['loss_at'],
    'crosskd_atss_r101_r50': ['loss_crosskd_score', 'loss_crosskd_box'],
    'crosskd_pkd_fcos_r101_r50': [
        'crosskd.loss_crosskd_score',
        'crosskd.loss_crosskd_box',
        'pkd.loss_imitation',
    ],
    'crosskd_gfl_r101_r50': ['loss_crosskd_score', 'loss_crosskd_box'],
    'cwd_gfl_r101_r50': ['loss_cwd'],
    'dist_resnet34_resnet18_imagenet': ['loss_logit_score'],
    'dkd_wrn_40_2_wrn_40_1_cifar100': ['loss_logit_score'],
    'lskd_resnet56_resnet20_cifar100': ['loss_logit_score'],
    'mgd_faster_rcnn_cascade_mask_x101_dcn_r50': ['loss_mgd'],
    'mgd_resnet50_mobilenet_v1_imagenet': ['loss_mgd'],
    'mgd_retinanet_x101_r50': ['loss_mgd'],
    'pkd_reppoints_x101_r50': ['loss_imitation'],
    'residual_kd_at_resnet34_resnet18_imagenet': [
        'at.loss_at',
        'residual.loss_residual_kd_student',
        'residual.loss_residual_kd_assistant',
    ],
    'reviewkd_resnet50_mobilenet_v1_imagenet': ['loss_reviewkd'],
    'simkd_resnet32x4_resnet8x4_cifar100': ['loss_simkd'],
}


@pytest.mark.parametrize('stem', BASELINES)
def test_baseline__trains_a_step(stem):
    cfg = load(stem)
    model = MODELS.build(narrow_pair(cfg))
    model.init_weights()
    model.train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    # After the ramps, which are 0 at the first step.
    MessageHub.get_current_instance().update_info('iter', 100_000)
    losses = model.train_step(batch_of(cfg, size_of(stem)), wrapper)
    assert all(torch.isfinite(value).all() for value in losses.values())
    terms = {
        key: value
        for key, value in losses.items()
        if key.rpartition('.')[2].startswith(
            (
                *('loss_at', 'loss_crosskd', 'loss_cwd', 'loss_imitation'),
                *('loss_logit', 'loss_mgd', 'loss_residual_kd'),
                *('loss_reviewkd', 'loss_simkd'),
            )
        )
    }
    assert sorted(terms) == sorted(BASELINES[stem])
    # AT trains the student of the pair instead of its own distance.
    off = {'residual.loss_residual_kd_student'}
    assert all((value > 0) == (key not in off) for key, value in terms.items())


@pytest.mark.parametrize(
    ('stem', 'kind', 'weight', 'temperature', 'labels'),
    [
        ('logit_resnet56_resnet20_cifar100', 'kl', 0.9, 4.0, 0.1),
        ('lskd_resnet56_resnet20_cifar100', 'kl', 9.0, 2.0, 0.1),
        ('lskd_vgg13_vgg8_cifar100', 'kl', 9.0, 3.0, 0.1),
        ('lskd_resnet50_mobilenet_v2_cifar100', 'kl', 1.0, 3.0, 0.1),
        ('dist_resnet56_resnet20_cifar100', 'dist', 2.0, 4.0, 1.0),
        ('dkd_resnet56_resnet20_cifar100', 'dkd', 1.0, 4.0, 1.0),
        ('logit_resnet34_resnet18_imagenet', 'kl', 0.5, 1.0, 0.5),
        ('logit_mmrazor_resnet34_resnet18_imagenet', 'kl', 3.0, 1.0, 1.0),
        ('dist_resnet50_mobilenet_v1_imagenet', 'dist', 2.0, 1.0, 1.0),
        ('dkd_resnet50_mobilenet_v1_imagenet', 'dkd', 1.0, 1.0, 1.0),
    ],
)
def test_logits__have_the_published_weights(
    stem, kind, weight, temperature, labels
):
    cfg = load(stem)
    distiller = MODELS.build(cfg.model.distiller)
    # Its kind and its weights depend on the kind of the teacher's head alone.
    model = MODELS.build(cfg.model.student)
    distiller.choose_sources(student=model, teacher=model)
    term = distiller.term
    assert (term.kind, term.weight, term.temperature) == (
        kind,
        weight,
        temperature,
    )
    assert term.standardise == stem.startswith('lskd')
    student = distiller.student_config(cfg.model.student)
    assert student.head.loss.loss_weight == pytest.approx(labels)


def test_baselines__use_the_published_levels():
    def built(stem):
        return MODELS.build(narrow_pair(load(stem))).distillers

    pair = built('crosskd_pkd_gfl_r101_r50')
    assert pair['crosskd'].loss_weights() == {
        'loss_crosskd_score': 1.0,
        'loss_crosskd_box': 4.0,
    }
    assert (pair['pkd'].num_levels, pair['pkd'].loss_weight) == (5, 6.0)
    (pkd,) = built('pkd_faster_rcnn_r101_r50').values()
    assert (pkd.num_levels, pkd.loss_weight) == (4, 6.0)
    (scores,) = built('cwd_gfl_r101_r50').values()
    # 80 classes on both sides, so nothing is aligned.
    assert scores.loss_weight == 5.0
    assert not list(scores.parameters())
    (mgd,) = built('mgd_faster_rcnn_cascade_mask_x101_dcn_r50').values()
    assert len(mgd.generators) == 4


def write_folders(folder):
    """Two classes of 32 x 32 images, one folder each."""
    rng = np.random.default_rng(0)
    for name in ('a', 'b'):
        (folder / name).mkdir(parents=True)
        for index in range(4):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f'{index}.png')
    return str(folder)


def test_cifar__runs_from_the_teachers_training_to_the_modes(
    tmp_path, monkeypatch
):
    """Both commands that the config's comment names, on eight images."""
    monkeypatch.chdir(tmp_path)
    data = write_folders(tmp_path / 'data')

    def run(stem, epochs):
        cfg = load(stem)
        for split in ('train', 'val', 'test'):
            loader = cfg[f'{split}_dataloader']
            loader.update(
                batch_size=4, num_workers=0, persistent_workers=False
            )
            loader.dataset = dict(
                type='CustomDataset',
                data_root=data,
                pipeline=[
                    dict(type='LoadImageFromFile'),
                    *loader.dataset.pipeline,
                ],
            )
        cfg.train_cfg.max_epochs = epochs
        cfg.work_dir = f'work_dirs/{stem}'
        cfg.visualizer.vis_backends = []
        runner = Runner.from_cfg(cfg)
        runner.train()
        return runner

    trained = run('plain_resnet20_cifar100', epochs=1)
    assert list(Path(trained.work_dir).glob('best_accuracy_top1_*.pth'))
    # The pair's teacher, under the name that 240 epochs would give its file.
    teacher = 'plain_resnet56_cifar100'
    run(teacher, epochs=1)
    Path(f'work_dirs/{teacher}/epoch_1.pth').rename(
        f'work_dirs/{teacher}/epoch_240.pth'
    )
    era = run('era_resnet56_resnet20_cifar100', epochs=1)
    scalars = era.message_hub.log_scalars
    for mode in ('', 'E0/', 'T/', 'ST/'):
        assert f'val/{mode}accuracy/top1' in scalars
    state = torch.load(Path(era.work_dir, 'epoch_1.pth'), weights_only=False)
    assert extras_of(state['state_dict'])['distiller']['type'] == (
        'ERADistiller'
    )
