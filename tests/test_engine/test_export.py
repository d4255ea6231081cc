"""What is exported is what was measured, for the stock hosts."""

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmdet.apis import init_detector
from mmdet.models.detectors import RetinaNet
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmpretrain import get_model
from mmpretrain.structures import DataSample
from torch import nn

from era_mm import cli
from era_mm.core import extras_of
from era_mm.engine.export import export_student
from era_mm.errors import UserError
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
    run_config,
    two_stage_config,
)

ERA = dict(type='era_mm.ERADistiller', mbrnet=dict(num_branches=2))


FORMS = ('released', 'normalised')


CHANNELS = 16


def detector(head='RetinaHead', width=8, channels=CHANNELS, **neck):
    """A toy detector with as many strides as its neck has outputs."""
    config = copy.deepcopy(detector_config(width, channels, head))
    config['neck'] |= neck
    levels = config['neck']['num_outs']
    strides = [8 * 2**level for level in range(levels)]
    if head == 'FCOSHead':
        edges = [-1, *strides[1:], 1e8]
        config['bbox_head'] |= dict(
            strides=strides,
            regress_ranges=tuple(itertools.pairwise(edges)),
        )
    else:
        config['bbox_head']['anchor_generator']['strides'] = strides
    return config


def faster_rcnn(width=8):
    """A toy two-stage detector with a subsampled last level."""
    config = two_stage_config(width)
    config['neck'] |= dict(num_outs=3)
    config['rpn_head']['anchor_generator'] |= dict(strides=[8, 16, 32])
    return config


def season(model, forward):
    """Random weights as a training leaves them: nothing is 0, 1 or equal."""
    generator = torch.Generator().manual_seed(7)

    def draw(shape, low, high):
        return torch.rand(shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == 'weight':
                    parameter *= draw(parameter.shape, 0.8, 1.25)
                elif name == 'bias':
                    parameter += draw(parameter.shape, -0.2, 0.2)
        for name, parameter in model.named_parameters():
            # Heads start with nearly the same low score everywhere.
            if 'cls' in name or name == 'head.fc.weight':
                parameter.mul_(3 if name.endswith('weight') else 0.2)
        norms = [
            module
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        for norm in norms:
            norm.momentum = 1.0
        model.train()
        forward()
        model.eval()
        for norm in norms:
            norm.running_mean += draw(norm.running_mean.shape, -0.1, 0.1)
            norm.running_var *= draw(norm.running_var.shape, 0.8, 1.25)


class Run:
    """A finished distillation: its config, its model and its file."""

    def __init__(self, folder, student, teacher, distiller=ERA, **config):
        self.folder, self.teacher = folder, teacher
        scope = config.get('default_scope', 'mmdet')
        init_default_scope(scope)
        noise = torch.randn(4, 3, 64, 64)
        reference = MODELS.build(ConfigDict(copy.deepcopy(teacher)))
        season(reference, lambda: reference.extract_feat(noise))
        torch.save({'state_dict': reference.state_dict()}, folder / 't.pth')
        model = distillation_config(
            distiller, student, teacher, str(folder / 't.pth')
        )
        self.cfg = Config(
            run_config(
                copy.deepcopy(model),
                'data',
                folder / 'work',
                custom_hooks=[dict(type='era_mm.TWIHook')],
                **config,
            )
        )
        self.model = MODELS.build(model)
        student = self.model.student
        season(student, lambda: student.extract_feat(noise))
        with torch.no_grad():
            feats = student.extract_feat(noise)
        for method in self.model.distillers.values():
            if method.student_sources[0] in ('backbone', 'neck'):
                season(
                    method,
                    lambda method=method: method.mbrnet(
                        method.connections.connected(feats)
                    ),
                )
                self.measure(method.mbrnet.space)
        self.model.load_teachers()
        self.model.eval()
        self.file = str(folder / 'epoch_1.pth')
        self.save()

    @staticmethod
    def measure(space):
        """Statistics of a teacher, of a scale of its own by channel."""
        generator = torch.Generator().manual_seed(8)
        for level in range(space.num_levels if space else 0):
            mean, std = space.statistics(level)
            mean.copy_(torch.randn(mean.shape, generator=generator) / 4)
            std.copy_(0.5 + torch.rand(std.shape, generator=generator))

    @property
    def has_space(self):
        return any(
            method.mbrnet.space is not None
            for method in self.model.distillers.values()
        )

    def save(self):
        torch.save(
            {
                'meta': {'dataset_meta': {'classes': ('a', 'b', 'c')}},
                'state_dict': self.model.state_dict(),
                'optimizer': {'state': torch.zeros(1000)},
            },
            self.file,
        )

    def export(self, mode, **kwargs):
        prefix = self.folder / 'out' / f'{mode}_export'
        return export_student(
            self.cfg, self.file, str(prefix), mode=mode, **kwargs
        )

    def predict(self, mode, batch):
        """What the mode predicts inside ``Distillation``."""
        self.model.inference_mode = None if mode == 'S' else mode
        return self.model.test_step(batch)


def stock_keys(exported):
    """The file's keys, which must be the model's own."""
    state = torch.load(exported.checkpoint, weights_only=True)['state_dict']
    assert list(state) == list(exported.model.state_dict())
    assert extras_of(state) is None
    return list(state)


def assert_same_boxes(run, mode, exported, exact):
    stock = init_detector(
        str(exported.config), str(exported.checkpoint), device='cpu'
    )
    assert stock.dataset_meta['classes'] == ('a', 'b', 'c')
    assert set(stock.state_dict()) == set(stock_keys(exported))
    with torch.no_grad():
        found = stock.test_step(detection_batch())
        wanted = run.predict(mode, detection_batch())
    for ours, theirs in zip(found, wanted, strict=True):
        ours, theirs = ours.pred_instances, theirs.pred_instances
        assert len(ours) == len(theirs) >= 3
        assert torch.equal(ours.labels, theirs.labels)
        for key in ('bboxes', 'scores'):
            # Statistics of a space are folded into layers: but for rounding.
            if exact and (mode == 'S' or not run.has_space):
                assert torch.equal(ours[key], theirs[key])
            else:
                torch.testing.assert_close(
                    ours[key], theirs[key], rtol=1e-4, atol=1e-3
                )
    return stock


@pytest.fixture
def run(tmp_path):
    """RetinaNet, two levels, a teacher twice as wide below the neck."""
    return Run(tmp_path, detector(), detector(width=16))


# -- detectors --------------------------------------------------------------


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('mode', ['S', 'E0', 'T'])
@pytest.mark.parametrize(
    ('head', 'neck'),
    [
        ('RetinaHead', dict()),
        ('RetinaHead', dict(add_extra_convs='on_input', num_outs=3)),
        ('RetinaHead', dict(norm_cfg=dict(type='BN', eps=1e-2))),
        ('FCOSHead', dict(add_extra_convs='on_lateral', num_outs=3)),
    ],
    ids=['plain', 'extra', 'norm', 'fcos'],
)
def test_detector__predicts_what_the_mode_predicts(
    tmp_path, head, neck, mode, form
):
    run = Run(
        tmp_path,
        detector(head, **neck),
        detector(head, width=16, **neck),
        ERA | dict(form=form),
    )
    assert run.has_space == (form == 'normalised')
    exported = run.export(mode)
    stock = assert_same_boxes(run, mode, exported, exact=mode != 'E0')

    text = exported.config.read_text()
    assert ('era_mm' in text) == (mode == 'T')
    assert exported.needs_era_mm == (('model.neck[1]',) if mode == 'T' else ())
    # At no extra cost: the student's own layers, and one head for another.
    if mode != 'T':
        assert {k: v.shape for k, v in stock.state_dict().items()} == {
            k: v.shape for k, v in run.model.student.state_dict().items()
        }
    cfg = Config.fromfile(exported.config)
    imports = dict(imports=['era_mm'], allow_failed_imports=False)
    assert cfg.get('custom_imports') == (imports if mode == 'T' else None)
    model = cfg.model
    whole = run.cfg.model.student if mode == 'S' else run.teacher
    assert model.bbox_head.to_dict() == whole['bbox_head']
    assert model.backbone == run.cfg.model.student.backbone
    # The modes differ, or the comparison would say nothing.
    inputs = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = run.model.student(inputs)[0][0]
        assert torch.equal(stock(inputs)[0][0], plain) == (mode == 'S')


@pytest.mark.parametrize('form', FORMS)
def test_detector__takes_its_connector_along(tmp_path, form):
    resample = dict(student=dict(levels=[0, 1, 1], scales=[1, 1, 0.5]))
    source = dict(student='neck', teacher='neck', resample=resample)
    teacher = detector(add_extra_convs='on_input', num_outs=3, width=16)
    era = ERA | dict(source=source, form=form)
    run = Run(tmp_path, detector(), teacher, era)
    exported = run.export('T')
    assert_same_boxes(run, 'T', exported, exact=True)
    neck = Config.fromfile(exported.config).model.neck
    kinds = ['FPN', 'era_mm.Resampler', 'era_mm.MBRNet']
    assert [part.type for part in neck] == kinds
    with pytest.raises(UserError, match='are resampled or chosen'):
        run.export('E0')
    assert_same_boxes(run, 'E0', run.export('E0', keep_align=True), exact=True)


@pytest.mark.parametrize(
    ('head', 'neck', 'reason'),
    [
        (
            'RetinaHead',
            dict(add_extra_convs='on_input', num_outs=4),
            r'fpn_convs\.3 computes level 3 from the output of level 2',
        ),
        (
            'RetinaHead',
            dict(add_extra_convs='on_output', num_outs=3),
            r'fpn_convs\.2 computes level 2 from the output of level 1',
        ),
        (
            'FCOSHead',
            dict(
                add_extra_convs='on_output',
                num_outs=4,
                relu_before_extra_convs=True,
            ),
            r'fpn_convs\.2 computes level 2 from the output of level 1',
        ),
        (
            'RetinaHead',
            dict(num_outs=3),
            'level 2 is level 1 subsampled, but their align layers differ',
        ),
        ('RetinaHead', dict(type='PAFPN'), 'it is a PAFPN, and only FPN'),
        (
            'RetinaHead',
            dict(act_cfg=dict(type='ReLU')),
            r'an activation follows neck\.fpn_convs\.0',
        ),
        (
            'RetinaHead',
            dict(norm_cfg=dict(type='GN', num_groups=4)),
            r'fpn_convs\.0 is followed by a GroupNorm',
        ),
        (
            'RetinaHead',
            dict(conv_cfg=dict(type='ConvWS')),
            r'fpn_convs\.0 is a ConvWS2d, not a plain convolution',
        ),
    ],
    ids=[
        *('on_input', 'on_output', 'fcos', 'pool'),
        *('pafpn', 'act', 'group_norm', 'conv_ws'),
    ],
)
def test_fold__is_refused_by_name_and_the_align_layer_can_stay(
    tmp_path, head, neck, reason
):
    run = Run(
        tmp_path, detector(head, **neck), detector(head, width=16, **neck)
    )
    with pytest.raises(UserError, match=reason) as caught:
        run.export('E0')
    assert 'Add --keep-align' in str(caught.value)
    assert not list(tmp_path.glob('out/*'))
    exported = run.export('E0', keep_align=True)
    assert exported.needs_era_mm == ()
    assert_same_boxes(run, 'E0', exported, exact=True)


def test_fold__needs_one_width(tmp_path):
    run = Run(tmp_path, detector(), detector(width=16, channels=24))
    with pytest.raises(UserError, match=r'have 16 channels and .* 24'):
        run.export('E0')
    exported = run.export('E0', keep_align=True)
    assert_same_boxes(run, 'E0', exported, exact=True)
    extra = sum(p.numel() for p in exported.model.neck[1].parameters())
    assert extra == 2 * (16 * 24 + 24)


def test_export__of_another_head_brings_detector_and_settings(tmp_path):
    student = detector() | dict(test_cfg=dict(score_thr=0.9))
    run = Run(tmp_path, student, detector('FCOSHead', width=16))
    exported = run.export('E0')
    assert type(exported.model).__name__ == 'FCOS'
    assert_same_boxes(run, 'E0', exported, exact=False)


def test_export__keeps_the_student_s_preprocessing(tmp_path):
    teacher = detector(width=16)
    teacher['data_preprocessor']['mean'] = [0.0, 0.0, 0.0]
    run = Run(tmp_path, detector(), teacher)
    assert_same_boxes(run, 'T', run.export('T'), exact=True)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(
    'settings',
    [
        dict(
            num_branches=3,
            num_blocks=1,
            share_levels=True,
            norm_cfg=dict(type='GN', num_groups=4),
        ),
        dict(num_branches=3, reduction='mean', share_projection=True),
        dict(num_branches=3, branch='bottleneck', branch_width=8),
    ],
    ids=['levels', 'projection', 'bottleneck'],
)
def test_export__takes_the_settings_of_mbrnet_along(tmp_path, settings, form):
    run = Run(
        tmp_path,
        detector(),
        detector(width=16),
        dict(type='era_mm.ERADistiller', form=form, mbrnet=settings),
    )
    exported = run.export('T')
    assert_same_boxes(run, 'T', exported, exact=True)
    neck = Config.fromfile(exported.config).model.neck[1].to_dict()
    if form == 'normalised':
        # Levels of another scale share nothing once it is folded in.
        settings = {k: v for k, v in settings.items() if k != 'share_levels'}
        assert not {'normalize', 'num_batches', 'share_levels'} & set(neck)
    assert {key: neck[key] for key in settings} == settings


def test_export__takes_a_neck_of_several_parts(tmp_path):
    student = detector()
    student['neck'] = [
        student['neck'],
        dict(type='BFP', in_channels=CHANNELS, num_levels=2, refine_level=1),
    ]
    run = Run(tmp_path, student, detector(width=16))
    with pytest.raises(UserError, match='it is a BFP'):
        run.export('E0')
    exported = run.export('T')
    assert len(exported.model.neck) == 3
    assert_same_boxes(run, 'T', exported, exact=True)


@MMDET_MODELS.register_module()
class SquaringRetinaNet(RetinaNet):
    """Does more between neck and head than its config says."""

    def extract_feat(self, inputs):
        return tuple(feat**2 for feat in super().extract_feat(inputs))


@pytest.mark.parametrize('mode', ['E0', 'T'])
def test_export__tries_out_what_it_has_made(tmp_path, mode):
    student = detector() | dict(type='mmdet.SquaringRetinaNet')
    run = Run(tmp_path, student, detector(width=16))
    with pytest.raises(UserError, match='at level 0 the exported RetinaNet'):
        run.export(mode)
    assert not list(tmp_path.glob('out/*'))
    assert_same_boxes(run, 'S', run.export('S'), exact=True)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('mode', ['S', 'E0', 'T'])
@pytest.mark.parametrize('mask', [False, True], ids=['boxes', 'masks'])
def test_export__of_a_two_stage_pair(tmp_path, mode, mask, form):
    """The teacher's RPN and RoI head; without masks that nobody has."""
    teacher = faster_rcnn(width=16)
    if mask:
        teacher['type'] = 'mmdet.MaskRCNN'
        teacher['roi_head'] |= dict(
            mask_roi_extractor=teacher['roi_head']['bbox_roi_extractor'],
            mask_head=dict(
                type='FCNMaskHead',
                num_convs=1,
                in_channels=CHANNELS,
                conv_out_channels=8,
                num_classes=3,
                loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
            ),
        )
        teacher['train_cfg']['rcnn'] |= dict(mask_size=6)
        teacher['test_cfg']['rcnn'] |= dict(mask_thr_binary=0.5)
    run = Run(tmp_path, faster_rcnn(), teacher, ERA | dict(form=form))
    exported = run.export(mode, keep_align=mode == 'E0')
    assert_same_boxes(run, mode, exported, exact=True)
    assert not exported.model.with_mask


# -- classifiers ------------------------------------------------------------


@pytest.fixture
def classifiers(tmp_path):
    def make(student=None, **kwargs):
        return Run(
            tmp_path,
            student or classifier_config(),
            classifier_config(width=16),
            default_scope='mmpretrain',
            **kwargs,
        )

    return make


def assert_same_scores(run, mode, exported, exact):
    stock = get_model(
        str(exported.config),
        pretrained=str(exported.checkpoint),
        device='cpu',
    )
    assert set(stock.state_dict()) == set(stock_keys(exported))
    images = torch.randn(4, 3, 64, 64)
    batch = dict(inputs=images, data_samples=[DataSample() for _ in images])
    with torch.no_grad():
        found = stock.test_step(copy.deepcopy(batch))
        wanted = run.predict(mode, batch)
    found, wanted = (
        torch.stack([sample.pred_score for sample in samples])
        for samples in (found, wanted)
    )
    assert wanted.std(0).max() > 1e-3
    if exact and (mode == 'S' or not run.has_space):
        assert torch.equal(found, wanted)
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('mode', ['S', 'E0', 'T'])
def test_classifier__predicts_what_the_mode_predicts(classifiers, mode, form):
    run = classifiers(distiller=ERA | dict(form=form))
    assert run.has_space == (form == 'normalised')
    exported = run.export(mode)
    assert_same_scores(run, mode, exported, exact=mode != 'E0')
    if mode != 'T':
        assert 'era_mm' not in exported.config.read_text()
        # The head on the student's width: 64 features.
        assert exported.model.head.fc.weight.shape == (3, 64)


def test_classifier__can_keep_the_align_layer(classifiers):
    run = classifiers()
    exported = run.export('E0', keep_align=True)
    assert_same_scores(run, 'E0', exported, exact=True)
    assert exported.model.head.fc.weight.shape == (3, 128)


def test_classifier__takes_the_preprocessor_beside_the_model(classifiers):
    # As the configs of mmpretrain have it.
    student = classifier_config()
    beside = student.pop('data_preprocessor') | dict(
        mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0]
    )
    run = classifiers(student, data_preprocessor=beside)
    for mode in ('S', 'E0', 'T'):
        exported = run.export(mode)
        preprocessor = exported.model.data_preprocessor
        assert preprocessor.mean.flatten().tolist() == [100, 110, 120]


def test_classifier__another_head_is_refused_by_name(tmp_path):
    teacher = classifier_config(width=16)
    teacher['head'] = dict(
        type='mmpretrain.StackedLinearClsHead',
        num_classes=3,
        in_channels=128,
        mid_channels=[8],
    )
    run = Run(
        tmp_path, classifier_config(), teacher, default_scope='mmpretrain'
    )
    with pytest.raises(UserError, match='it is a StackedLinearClsHead'):
        run.export('E0')
    exported = run.export('E0', keep_align=True)
    assert_same_scores(run, 'E0', exported, exact=True)


@pytest.mark.parametrize('mode', ['S', 'E0', 'T'])
def test_classifier__without_a_neck(tmp_path, mode):
    def transformer(width):
        return dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(
                type='mmpretrain.VisionTransformer',
                arch=dict(
                    embed_dims=width,
                    num_layers=1,
                    num_heads=2,
                    feedforward_channels=width,
                ),
                img_size=64,
                patch_size=16,
            ),
            head=dict(
                type='mmpretrain.LinearClsHead',
                num_classes=3,
                in_channels=width,
            ),
        )

    run = Run(
        tmp_path,
        transformer(8),
        transformer(16),
        ERA | dict(source='backbone'),
        default_scope='mmpretrain',
    )
    assert_same_scores(run, mode, run.export(mode), exact=mode != 'E0')


def test_detector__without_a_neck(tmp_path):
    models = []
    for width in (8, 16):
        model = detector(width=width, channels=4 * width)
        model['neck'] = None
        model['backbone'] |= dict(out_indices=(2,))
        generator = model['bbox_head']['anchor_generator']
        generator['strides'] = [16]
        models.append(model)
    run = Run(tmp_path, *models, ERA | dict(source='backbone'))
    with pytest.raises(UserError, match='a neck: the student has none'):
        run.export('E0')
    exported = run.export('E0', keep_align=True)
    assert_same_boxes(run, 'E0', exported, exact=True)


# -- files ------------------------------------------------------------------


def test_files__are_a_host_s_own(run):
    """Optimiser and extras are out, and classes and schedule are in."""
    exported = run.export('S')
    file = torch.load(exported.checkpoint, weights_only=True)
    assert set(file) == {'meta', 'state_dict'}
    for key, value in run.model.student.state_dict().items():
        assert torch.equal(file['state_dict'][key], value)
    # Of the same name, because a file holds its own name in every entry.
    plain = run.folder / exported.checkpoint.name
    torch.save(
        {
            'meta': file['meta'],
            'state_dict': run.model.student.state_dict(),
        },
        plain,
    )
    assert exported.checkpoint.stat().st_size <= plain.stat().st_size
    assert file['meta']['cfg'] == exported.config.read_text()

    cfg = Config.fromfile(exported.config)
    for key in ('custom_hooks', 'custom_imports', 'work_dir'):
        assert key not in cfg
    for key in ('train_dataloader', 'test_evaluator', 'optim_wrapper'):
        assert cfg[key] == run.cfg[key]
    student = run.cfg.model.student
    assert cfg.model.to_dict() == student.to_dict()


def test_files__drop_what_the_command_line_had_added(run):
    other = dict(type='EarlyStoppingHook', monitor='coco/bbox_mAP')
    run.cfg.custom_hooks = [
        dict(type='era_mm.EMAHook', momentum=0.1),
        dict(type='era_mm.TWIHook'),
        other,
    ]
    run.cfg.custom_imports.imports = ['era_mm', 'json', 'era_mm.testing']
    run.cfg.model_wrapper_cfg = dict(type='era_mm.DistillationDataParallel')
    run.cfg.optim_wrapper.type = 'CPUAmpOptimWrapper'
    run.cfg.load_from = run.file
    run.cfg.resume = True
    run.cfg.launcher = 'pytorch'
    cfg = Config.fromfile(run.export('S').config)
    # The host averages the student alone.
    assert cfg.custom_hooks == [dict(type='EMAHook', momentum=0.1), other]
    assert cfg.custom_imports.imports == ['json']
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    for key in ('model_wrapper_cfg', 'load_from', 'resume', 'launcher'):
        assert key not in cfg


def test_files__of_a_student_given_by_reference(tmp_path):
    own = tmp_path / 'student.py'
    Config(
        dict(
            model=detector(),
            default_scope='mmdet',
            custom_imports=dict(imports=['json']),
        )
    ).dump(own)
    run = Run(tmp_path, detector(), detector(width=16))
    run.cfg.model.student = str(own)
    run.cfg.default_scope = None
    exported = run.export('S')
    cfg = Config.fromfile(exported.config)
    assert cfg.default_scope == 'mmdet'
    assert cfg.custom_imports.imports == ['json']
    assert_same_boxes(run, 'S', exported, exact=True)


def test_files__nothing_is_left_of_an_export_that_fails(run, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError('no space left')

    monkeypatch.setattr('era_mm.engine.export.torch.save', fail)
    with pytest.raises(OSError, match='no space left'):
        run.export('S')
    assert list((run.folder / 'out').iterdir()) == []


@pytest.mark.slow
def test_files__load_without_era_mm(run):
    pairs = [
        [str(path) for path in (exported.config, exported.checkpoint)]
        for exported in (run.export('S'), run.export('E0'))
    ]
    code = (
        'import json, sys, torch\n'
        'torch.set_num_threads(1)\n'
        'from mmdet.apis import init_detector\n'
        'for pair in json.loads(sys.argv[1]):\n'
        "    model = init_detector(*pair, device='cpu')\n"
        "    assert 'era_mm' not in sys.modules\n"
        '    print(type(model).__name__)\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, json.dumps(pairs)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('RetinaNet') == 2
    for word in ('missing keys', 'unexpected key', 'size mismatch'):
        assert word not in done.stdout + done.stderr


# -- what is refused --------------------------------------------------------


def test_refused__no_distillation(run):
    run.cfg.model = run.cfg.model.student
    with pytest.raises(UserError, match=r'era_mm\.Distillation, but .*Retina'):
        run.export('S')


@pytest.mark.parametrize('mode', ['E0', 'T'])
def test_refused__a_plain_file(run, mode):
    plain = run.model.student.state_dict()
    torch.save({'state_dict': plain}, run.file)
    with pytest.raises(UserError, match='holds only a plain student'):
        run.export(mode)
    run.export('S')


def test_refused__another_run_s_file(run):
    run.cfg.model.distiller = dict(mine=run.cfg.model.distiller)
    with pytest.raises(UserError, match="extras of distiller 'mine'"):
        run.export('T')


def test_refused__a_teacher_with_random_weights(run):
    run.cfg.model.teacher.checkpoint = 'random'
    with pytest.raises(UserError, match='differs in every run'):
        run.export('T')
    run.export('S')


def test_refused__a_mode_that_the_distiller_does_not_have(tmp_path):
    teacher = detector(width=16)
    teacher['bbox_head']['num_classes'] = 5
    run = Run(tmp_path, detector(), teacher)
    with pytest.raises(UserError, match=r"'distiller' \(ERADistiller\) does"):
        run.export('E0')


def test_refused__a_source_that_does_not_feed_the_head(tmp_path):
    student = detector()
    refine = dict(
        type='BFP', in_channels=CHANNELS, num_levels=2, refine_level=1
    )
    student['neck'] = [student['neck'], refine]
    run = Run(
        tmp_path,
        student,
        detector(width=16),
        ERA | dict(source=dict(student='neck.0', teacher='neck')),
    )
    with pytest.raises(UserError, match=r"'neck', but .* 'neck\.0'"):
        run.export('T')


def test_refused__files_that_are_there(run):
    exported = run.export('S')
    exported.config.unlink()
    before = exported.checkpoint.read_bytes()
    with pytest.raises(UserError, match=r'S_export\.pth exists already'):
        run.export('S')
    assert exported.checkpoint.read_bytes() == before
    assert not exported.config.exists()


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(mode='S', keep_align=True), '--keep-align: mode S is'),
        (dict(mode='T', keep_align=True), '--keep-align: it is for mode E0'),
        (dict(mode='S', distiller='x'), '--distiller: mode S is the student'),
        (dict(mode='ST'), r"exports 'E0' and 'T', but got 'ST'"),
        (dict(mode='X'), r"'distiller' .* not offer X, but E0, .*T, ST\."),
        (dict(mode='T', distiller='x'), r"\['distiller'\], but got 'x'"),
    ],
)
def test_refused__flags_that_do_not_fit(run, kwargs, message):
    with pytest.raises(UserError, match=message):
        run.export(**kwargs)


def test_refused__a_name_with_an_extension(run):
    with pytest.raises(UserError, match='without extension'):
        export_student(run.cfg, run.file, str(run.folder / 'student.pth'))


def test_distillers__are_chosen_by_name(tmp_path):
    both = dict(first=ERA, second=copy.deepcopy(ERA))
    run = Run(tmp_path, detector(), detector(width=16), both)
    with torch.no_grad():
        run.model.distillers['second'].mbrnet.aligns[0].weight.mul_(2)
    run.save()
    with pytest.raises(UserError, match=r"\['first', 'second'\] all offer T"):
        run.export('T')
    exported = run.export('T', distiller='second')
    aligns = exported.model.neck[1].aligns
    wanted = run.model.distillers['second'].mbrnet.folded().aligns
    assert torch.equal(aligns[0].weight, wanted[0].weight)
    assert_same_boxes(run, 'second.T', exported, exact=True)


# -- the command ------------------------------------------------------------


@pytest.mark.smoke
def test_command__exports_what_training_reported(
    make_runner, tmp_path, teacher_file, capsys
):
    class Last(Hook):
        priority = 'LOWEST'

        def after_val_epoch(self, runner, metrics=None):
            self.found = dict(metrics)

    last = Last()
    runner = make_runner(
        distillation_config(ERA, checkpoint=teacher_file),
        custom_hooks=[dict(type='era_mm.TWIHook', modes=['E0', 'T'])],
        optim_wrapper=dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=0.003),
            clip_grad=dict(max_norm=5.0),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=6, val_interval=6),
    )
    config = tmp_path / 'toy.py'
    runner.cfg.dump(config)
    runner.register_hook(last)
    runner.train()
    checkpoint = str(tmp_path / 'run' / 'epoch_6.pth')
    values = set()
    flags = {'S': [], 'E0': ['--keep-align'], 'T': []}
    for mode, more in flags.items():
        prefix = tmp_path / mode
        arguments = [str(config), checkpoint, '--mode', mode, *more]
        assert (
            cli.run_export_student([*arguments, '--out', str(prefix)]) == 0
        ), capsys.readouterr().err
        printed = capsys.readouterr().out
        assert f'{prefix}.py\n{prefix}.pth\n{mode}: RetinaNet' in printed
        assert ('needs no era_mm' in printed) == (mode != 'T')
        cfg = Config.fromfile(f'{prefix}.py')
        cfg.work_dir = str(tmp_path / f'test_{mode}')
        cfg.load_from = f'{prefix}.pth'
        measured = Runner.from_cfg(cfg).test()
        start = '' if mode == 'S' else f'{mode}/'
        reported = {
            key.removeprefix(start): value
            for key, value in last.found.items()
            if key.startswith(f'{start}coco')
        }
        assert measured == reported
        values.add(reported['coco/bbox_mAP_50'])
    assert len(values) > 1


def test_command__says_errors_in_one_message(run, capsys):
    config = run.folder / 'toy.py'
    run.cfg.dump(config)
    out = ['--out', str(run.folder / 'x')]
    assert cli.run_export_student([str(config), 'no.pth', *out]) == 1
    assert "Checkpoint 'no.pth' does not exist" in capsys.readouterr().err
    options = ['--cfg-options', 'model.teacher.checkpoint=random']
    arguments = [str(config), run.file, '--mode', 'E0', *options, *out]
    assert cli.run_export_student(arguments) == 1
    assert "is 'random'" in capsys.readouterr().err
    assert not list(run.folder.glob('x.*'))


def test_command__is_the_tool():
    root = Path(__file__).resolve().parents[2]
    tool = (root / 'tools' / 'export_student.py').read_text()
    assert 'sys.exit(run_export_student())' in tool
    assert cli.COMMANDS['export_student'] is cli.run_export_student
