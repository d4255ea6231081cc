"""Whatever of the hosts walks a model meets the plain student.

The registries are walked: a constructor or hook that touches a model and has
no test here fails ``test_registries__...``.
"""

import copy
import inspect
import types
from types import SimpleNamespace

import mmdet.registry
import mmengine.registry
import mmpretrain.registry
import pytest
import torch
from mmcv.cnn.rfsearch import RFSearchHook
from mmdet.engine.hooks import (
    CheckInvalidLossHook,
    MeanTeacherHook,
    NumClassCheckHook,
    SetEpochInfoHook,
    SyncNormHook,
    YOLOXModeSwitchHook,
)
from mmdet.engine.hooks import sync_norm_hook as sync_norm
from mmdet.models.test_time_augs import DetTTAModel
from mmengine.config import ConfigDict
from mmengine.dist import master_only
from mmengine.hooks import (
    EMAHook,
    Hook,
    NaiveVisualizationHook,
    PrepareTTAHook,
    RuntimeInfoHook,
    SyncBuffersHook,
)
from mmengine.hooks import sync_buffer_hook as sync_buffer
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import load_state_dict
from mmpretrain.engine import EMAHook as PretrainEMAHook
from mmpretrain.engine.hooks import (
    ClassNumCheckHook,
    DenseCLHook,
    PrepareProtoBeforeValLoopHook,
    SetAdaptiveMarginsHook,
    SimSiamHook,
    SwAVHook,
    SwitchRecipeHook,
    WarmupParamHook,
)
from mmpretrain.engine.hooks.precise_bn_hook import update_bn_stats
from mmpretrain.structures import DataSample
from torch import nn

from era_mm.core import Distillation, extras_of
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
    two_stage_config,
)
from era_mm.testing.toy import CLASSES

ERA = dict(type='era_mm.ERADistiller')


def vit(dim):
    return dict(
        type='ImageClassifier',
        data_preprocessor=dict(num_classes=3),
        backbone=dict(
            type='VisionTransformer',
            img_size=32,
            patch_size=8,
            out_type='avg_featmap',
            arch=dict(
                embed_dims=dim,
                num_layers=4,
                num_heads=4,
                feedforward_channels=2 * dim,
            ),
        ),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=dim),
    )


def convnext(width):
    backbone = dict(
        type='mmpretrain.ConvNeXt',
        arch=dict(depths=[1, 1, 2, 1], channels=[width] * 4),
        out_indices=(1, 2),
        gap_before_final_norm=False,
    )
    config = detector_config(backbone=backbone)
    config['neck']['in_channels'] = [width, width]
    return config


def both(student, teacher, scope, **options):
    """The plain model and a distillation of it, equal weights."""
    with DefaultScope.overwrite_default_scope(scope):
        torch.manual_seed(0)
        plain = MODELS.build(ConfigDict(copy.deepcopy(student)))
        torch.manual_seed(0)
        pair = MODELS.build(
            ConfigDict(
                distillation_config(ERA | options, student, teacher)
                | dict(input_size=32 if 'img_size' in str(student) else 64)
            )
        )
    assert isinstance(pair, Distillation)
    return plain, pair


def detectors(head='RetinaHead'):
    return both(
        detector_config(head=head),
        detector_config(width=16, channels=24, head=head),
        'mmdet',
    )


def classifiers(**preprocessor):
    student = classifier_config()
    student['data_preprocessor'].update(preprocessor)
    return both(student, classifier_config(16), 'mmpretrain')


def class_batch(num=6):
    generator = torch.Generator().manual_seed(0)
    return dict(
        inputs=[
            torch.randint(0, 255, (3, 64, 64), generator=generator).byte()
            for _ in range(num)
        ],
        data_samples=[DataSample().set_gt_label(i % 3) for i in range(num)],
    )


def two(config, second, scope, **distiller):
    """Two students that teach each other."""
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(
            ConfigDict(
                type='era_mm.MutualDistillation',
                students=dict(first=config, second=second),
                distiller=dict(type='era_mm.IEKDDistiller', **distiller),
            )
        )


def two_detectors():
    return two(detector_config(), detector_config(width=12), 'mmdet')


def two_classifiers(head=None, **preprocessor):
    students = classifier_config(), classifier_config(12)
    for student in students:
        student['data_preprocessor'].update(preprocessor)
        student['head'].update(head or {})
    return two(*students, 'mmpretrain', source='backbone')


def hosts_of(mutual):
    return [half.student for half in mutual.students.values()]


def runner(model, **entries):
    logger = SimpleNamespace(info=lambda *args: None, warning=print)
    return SimpleNamespace(model=model, logger=logger, **entries)


def equal(one, other):
    assert list(one) == list(other)
    return all(torch.equal(one[key], other[key]) for key in one)


# -- names -------------------------------------------------------------------


def test_walks__children_parameters_and_modules_are_the_plain_models():
    plain, pair = detectors()

    def names(model, walk):
        return [
            name
            for name, _ in getattr(model, walk)()
            if not name.startswith(('distillers', 'data_preprocessor'))
        ]

    for walk in (
        'named_children',
        'named_modules',
        'named_parameters',
        'named_buffers',
    ):
        assert names(pair, walk) == names(plain, walk), walk
    assert [name for name, _ in pair.named_children()][-1] == 'distillers'


def test_walks__what_is_deleted_is_gone_from_both():
    _, pair = detectors()
    del pair.neck
    assert not hasattr(pair, 'neck')
    assert not hasattr(pair.student, 'neck')
    assert 'neck' not in dict(pair.named_children())
    del pair.test_cfg
    assert not hasattr(pair.student, 'test_cfg')


def test_walks__a_hook_on_the_model_is_called_where_the_student_loads():
    plain, pair = detectors()
    called = []
    for model in (plain, pair):
        model._register_load_state_dict_pre_hook(
            lambda state_dict, *arguments: called.append(len(state_dict))
        )
        model.load_state_dict(plain.state_dict())
    assert len(called) == 2


def test_walks__what_is_set_or_replaced_is_the_students():
    _, pair = detectors()
    neck = copy.deepcopy(pair.student.neck)
    pair.neck = neck
    pair.test_cfg = dict(max_per_img=1)
    assert pair.student.neck is neck
    assert pair.neck is neck
    assert dict(pair.named_children())['neck'] is neck
    assert pair.student.test_cfg == dict(max_per_img=1)

    pair.train(False)
    assert not pair.student.training
    pair.training = True
    assert pair.student.training
    pair.mine = 1
    assert not hasattr(pair.student, 'mine')


def test_walks__synchronised_norms_are_the_students():
    _, pair = detectors()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(pair)
    assert converted is pair
    assert isinstance(pair.student.backbone.bn1, nn.SyncBatchNorm)
    assert pair.backbone is pair.student.backbone


# -- constructors ------------------------------------------------------------


def groups(model, config):
    """Settings of each of the student's parameters, in their order."""
    wrapper = build_optim_wrapper(
        model, ConfigDict(copy.deepcopy(config) | dict(type='OptimWrapper'))
    )
    found = {
        id(parameter): {k: v for k, v in group.items() if k != 'params'}
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }
    student = getattr(model, 'student', model)
    for settings in found.values():
        # A group lists the extras as well.
        settings.pop('param_names', None)
    extras = [p for p in model.parameters() if id(p) not in found]
    assert not extras
    return {n: found[id(p)] for n, p in student.named_parameters()}


ADAM = dict(type='AdamW', lr=1e-3, weight_decay=0.05)
CONSTRUCTORS = {
    'DefaultOptimWrapperConstructor': (
        dict(
            paramwise_cfg=dict(
                custom_keys={
                    'backbone.layer2': dict(lr_mult=0.1),
                    '.neck': dict(lr_mult=0.3),
                    'student': dict(lr_mult=0.7),
                },
                norm_decay_mult=0.0,
                bias_lr_mult=2.0,
            )
        ),
        lambda: detectors(),
    ),
    'LearningRateDecayOptimizerConstructor': (
        dict(
            constructor='mmdet.LearningRateDecayOptimizerConstructor',
            paramwise_cfg=dict(
                decay_rate=0.5, decay_type='layer_wise', num_layers=6
            ),
        ),
        lambda: both(convnext(8), convnext(16), 'mmdet'),
    ),
    'LearningRateDecayOptimWrapperConstructor': (
        dict(
            constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor',
            paramwise_cfg=dict(
                layer_decay_rate=0.5,
                norm_decay_mult=0.0,
                custom_keys={'.cls_token': dict(decay_mult=0.0)},
            ),
        ),
        lambda: both(vit(16), vit(32), 'mmpretrain', source='backbone'),
    ),
}


@pytest.mark.parametrize('name', CONSTRUCTORS)
def test_constructors__every_setting_is_the_plain_runs(name):
    config, make = CONSTRUCTORS[name]
    plain, pair = make()
    expected = groups(plain, config | dict(optimizer=ADAM))
    assert len({entry['lr'] for entry in expected.values()}) > 1
    assert groups(pair, config | dict(optimizer=ADAM)) == expected


def test_constructors__layer_decay_lowers_the_patch_embedding_as_published():
    config, make = CONSTRUCTORS['LearningRateDecayOptimWrapperConstructor']
    found = groups(make()[1], config | dict(optimizer=ADAM))
    # Four layers: the stem is five below the head.
    assert found['backbone.patch_embed.projection.weight']['lr'] == 1e-3 / 32
    assert found['head.fc.weight']['lr'] == 1e-3


# -- hooks -------------------------------------------------------------------


def mixed(model):
    samples = model.data_preprocessor(class_batch(), True)['data_samples']
    scores = torch.stack([sample.gt_score for sample in samples])
    return bool(((scores > 0) & (scores < 1)).any())


MIXUP = dict(augments=[dict(type='Mixup', alpha=1.0)])


def check_switch_recipe():
    for start, then in ((MIXUP, None), (None, MIXUP)):
        for model in classifiers(batch_augments=start, to_onehot=True):
            assert mixed(model) is (start is not None)
            hook = SwitchRecipeHook(
                [
                    dict(
                        action_epoch=1,
                        batch_augments=copy.deepcopy(then),
                        loss=dict(
                            type='mmpretrain.LabelSmoothLoss',
                            label_smooth_val=0.1,
                        ),
                    )
                ]
            )
            hook._do_switch(runner(model), hook.schedule[1])
            assert mixed(model) is (then is not None)
            head = getattr(model, 'student', model).head
            assert type(head.loss_module).__name__ == 'LabelSmoothLoss'


def check_ema():
    for hook_type in (EMAHook, PretrainEMAHook):
        states = []
        for model in detectors():
            hook = hook_type(momentum=0.5)
            hook.before_run(runner(model))
            student = getattr(model, 'student', model)
            for step in (1, 2):
                with torch.no_grad():
                    for parameter in student.parameters():
                        parameter.add_(step)
                hook.after_train_iter(runner(model, iter=step), 0)
            hook._swap_ema_parameters()
            states.append(student.state_dict())
        assert equal(*states)


def check_graph():
    seen = []
    visualizer = SimpleNamespace(add_graph=lambda model, _: seen.append(model))
    model = detectors()[1]
    NaiveVisualizationHook().before_train(runner(model, visualizer=visualizer))
    assert seen == [model]


def check_sync_buffers(monkeypatch):
    def double(tensors, op):
        for tensor in tensors:
            tensor.mul_(2)

    monkeypatch.setattr(sync_buffer, 'all_reduce_params', double)
    states = []
    for model in detectors():
        hook = SyncBuffersHook()
        hook.distributed = True
        hook.after_train_epoch(runner(model))
        states.append(getattr(model, 'student', model).state_dict())
    assert equal(*states)
    assert states[1]['backbone.bn1.running_var'].eq(2).all()


def check_tta():
    batch = detection_batch(1)
    found = []
    for model in detectors():
        model.eval()
        state = runner(model)
        PrepareTTAHook(
            dict(
                type=DetTTAModel,
                tta_cfg=ConfigDict(
                    nms=dict(type='nms', iou_threshold=0.5), max_per_img=20
                ),
            )
        ).before_test(state)
        views = {
            'inputs': [batch['inputs']] * 2,
            'data_samples': [copy.deepcopy(batch['data_samples'])] * 2,
        }
        for view in views['data_samples']:
            for sample in view:
                sample.set_metainfo(dict(flip=False, flip_direction=None))
        found.append(state.model.test_step(views)[0].pred_instances)
    assert torch.equal(found[0].bboxes, found[1].bboxes)


def rf_config():
    return dict(
        search=dict(
            step=0,
            max_step=3,
            search_interval=1,
            exp_rate=0.5,
            init_alphas=0.01,
            mmin=1,
            mmax=6,
            num_branches=2,
            # The extras are no part of the student's search.
            skip_layer=['distillers'],
        )
    )


def check_rf_search(tmp_path):
    found = []
    for model in detectors():
        hook = RFSearchHook('search', rf_config(), verbose=False)
        hook.init_model(model)
        hook.step(model, str(tmp_path))
        found.append(hook.config['structure'])
    assert found[0] == found[1]
    assert 'neck.fpn_convs.0.conv' in found[0]


def check_invalid_loss():
    hook = CheckInvalidLossHook(interval=1)
    model = classifiers()[1]
    _, logged = model.parse_losses(
        dict(loss=torch.tensor(1.0), loss_era_align=torch.tensor(torch.nan))
    )
    with pytest.raises(AssertionError):
        hook.after_train_iter(runner(model, iter=0), 0, outputs=logged)


def check_mean_teacher():
    # Of mmdet's semi-supervised detectors, which cannot be a student.
    with pytest.raises(AssertionError):
        MeanTeacherHook().before_train(runner(detectors()[1], iter=0))


def check_num_classes():
    for hook, models in (
        (NumClassCheckHook(), detectors()),
        (ClassNumCheckHook(), classifiers()),
    ):
        for model in models:
            for classes in (CLASSES, CLASSES[:2]):
                dataset = SimpleNamespace(
                    metainfo=dict(classes=classes), CLASSES=classes
                )
                loader = SimpleNamespace(dataset=dataset)
                state = runner(model, train_dataloader=loader)
                check = (
                    hook.before_train_epoch
                    if isinstance(hook, NumClassCheckHook)
                    else hook.before_train
                )
                if classes == CLASSES:
                    check(state)
                    continue
                with pytest.raises(AssertionError, match='does not match'):
                    check(state)


def check_epoch():
    for model in detectors():
        student = getattr(model, 'student', model)
        student.set_epoch = lambda epoch, own=student: setattr(
            own, 'epoch', epoch
        )
        SetEpochInfoHook().before_train_epoch(runner(model, epoch=3))
        assert student.epoch == 3


def check_sync_norm(monkeypatch):
    monkeypatch.setattr(sync_norm, 'get_dist_info', lambda: (0, 2))
    monkeypatch.setattr(
        sync_norm,
        'all_reduce_dict',
        lambda states, op: {key: value * 3 for key, value in states.items()},
    )
    found = []
    for model in detectors():
        SyncNormHook().before_val_epoch(runner(model))
        found.append(getattr(model, 'student', model).state_dict())
    assert equal(*found)
    assert found[1]['backbone.bn1.running_var'].eq(3).all()
    # Norms are no file without extras.
    assert model.has_extras


def check_yolox_l1():
    for model in detectors():
        student = getattr(model, 'student', model)
        student.bbox_head.use_l1 = False
        dataset = SimpleNamespace(update_skip_type_keys=lambda keys: None)
        YOLOXModeSwitchHook(1).before_train_epoch(
            runner(
                model,
                epoch=1,
                max_epochs=2,
                train_dataloader=SimpleNamespace(dataset=dataset),
            )
        )
        assert student.bbox_head.use_l1


def check_dense_cl():
    for model in classifiers():
        student = getattr(model, 'student', model)
        student.loss_lambda = 0.5
        hook = DenseCLHook(start_iters=2)
        hook.before_train(runner(model))
        for iteration, expected in ((0, 0.0), (2, 0.5)):
            hook.before_train_iter(runner(model, iter=iteration), 0)
            assert student.loss_lambda == expected


def check_margins():
    heads = []
    student = classifier_config()
    student['head'] = dict(
        type='mmpretrain.ArcFaceClsHead', num_classes=3, in_channels=64
    )
    for model in both(student, classifier_config(16), 'mmpretrain'):
        dataset = SimpleNamespace(get_gt_labels=lambda: [0, 0, 0, 0, 1, 2, 2])
        loader = SimpleNamespace(dataset=dataset)
        SetAdaptiveMarginsHook().before_train(
            runner(model, train_dataloader=loader)
        )
        heads.append(getattr(model, 'student', model).head)
    assert torch.equal(heads[0].margins, heads[1].margins)
    assert len(set(heads[1].margins.tolist())) == 3


def check_precise_bn():
    states = []
    for model in classifiers():
        model.train()
        loader = torch.utils.data.DataLoader(
            [0] * 12, batch_size=6, collate_fn=lambda _: class_batch()
        )
        update_bn_stats(model, loader, 12, logger='silent')
        states.append(getattr(model, 'student', model).state_dict())
    assert equal(*states)
    assert not states[1]['backbone.bn1.running_mean'].eq(0).all()


def check_prototypes():
    """The hook looks for its own class, so such a student is refused."""
    student = dict(
        type='mmpretrain.ImageToImageRetriever',
        image_encoder=[
            classifier_config()['backbone'],
            classifier_config()['neck'],
        ],
        head=classifier_config()['head'],
        prototype=torch.zeros(3, 64),
    )
    with pytest.raises(ValueError, match='prototypes'):
        both(student, classifier_config(16), 'mmpretrain')
    with pytest.warns(UserWarning, match='BaseRetriever'):
        PrepareProtoBeforeValLoopHook().before_val(runner(classifiers()[1]))


def check_fixed_rates():
    config = dict(
        optimizer=dict(type='SGD', lr=0.1),
        paramwise_cfg=dict(custom_keys={'neck': dict(fix_lr=True)}),
    )
    for model in detectors():
        wrapper = build_optim_wrapper(model, ConfigDict(config))
        SimSiamHook(fix_pred_lr=True, lr=0.5).before_train_epoch(
            runner(model, optim_wrapper=wrapper)
        )
        student = getattr(model, 'student', model)
        fixed = {id(p) for p in student.neck.parameters()}
        for group in wrapper.optimizer.param_groups:
            if id(group['params'][0]) in fixed:
                assert group['lr'] == 0.5


def check_logged_rate():
    rates = []
    for model in detectors():
        wrapper = build_optim_wrapper(
            model,
            ConfigDict(
                optimizer=dict(type='SGD', lr=0.1),
                paramwise_cfg=dict(
                    custom_keys={'backbone.conv1': dict(lr_mult=0.5)}
                ),
            ),
        )
        # `RuntimeInfoHook` logs the first group's.
        rates.append(wrapper.get_lr()['lr'][0])
    assert rates == [0.05, 0.05]


def check_swav(tmp_path):
    for model in classifiers():
        student = getattr(model, 'student', model)
        hook = SwAVHook(2, frozen_layers_cfg=dict(fc=2))
        state = runner(model, iter=0, epoch=0, work_dir=str(tmp_path))
        hook.before_run(state)
        hook.before_train_epoch(state)
        hook.before_train_iter(state, 0)
        assert student.head.loss_module.use_queue is False
        frozen = [
            name
            for name, parameter in student.named_parameters()
            if not parameter.requires_grad
        ]
        assert frozen == ['head.fc.weight', 'head.fc.bias']


def check_warmup_param():
    for model in classifiers():
        student = getattr(model, 'student', model)
        student.head.loss_module.scale = 1.0
        hook = WarmupParamHook('scale', 'head.loss_module', 2)
        hook.before_train(runner(model))
        hook.before_train_iter(
            runner(model, iter=1, max_iters=8, max_epochs=4), 0
        )
        assert student.head.loss_module.scale == 0.25


HOOKS = {
    'CheckInvalidLossHook': check_invalid_loss,
    'ClassNumCheckHook': check_num_classes,
    'DenseCLHook': check_dense_cl,
    'EMAHook': check_ema,
    'MeanTeacherHook': check_mean_teacher,
    'NaiveVisualizationHook': check_graph,
    'NumClassCheckHook': check_num_classes,
    'PreciseBNHook': check_precise_bn,
    'PrepareProtoBeforeValLoopHook': check_prototypes,
    'PrepareTTAHook': check_tta,
    'RFSearchHook': check_rf_search,
    'RuntimeInfoHook': check_logged_rate,
    'SetAdaptiveMarginsHook': check_margins,
    'SetEpochInfoHook': check_epoch,
    'SimSiamHook': check_fixed_rates,
    'SwAVHook': check_swav,
    'SwitchRecipeHook': check_switch_recipe,
    'SyncBuffersHook': check_sync_buffers,
    'SyncNormHook': check_sync_norm,
    'WarmupParamHook': check_warmup_param,
    'YOLOXModeSwitchHook': check_yolox_l1,
}


@pytest.mark.parametrize(
    'check', dict.fromkeys(HOOKS.values()), ids=lambda check: check.__name__
)
def test_hooks__do_to_the_student_what_they_do_to_the_plain_model(
    check, request
):
    with DefaultScope.overwrite_default_scope(
        'mmpretrain' if 'mixed' in check.__code__.co_names else 'mmdet'
    ):
        check(
            **{
                name: request.getfixturevalue(name)
                for name in inspect.signature(check).parameters
            }
        )


# -- two students ------------------------------------------------------------


def two_switch_recipes():
    for start, then in ((MIXUP, None), (None, MIXUP)):
        model = two_classifiers(batch_augments=start, to_onehot=True)
        hook = SwitchRecipeHook(
            [
                dict(
                    action_epoch=1,
                    batch_augments=copy.deepcopy(then),
                    loss=dict(
                        type='mmpretrain.LabelSmoothLoss', label_smooth_val=0.1
                    ),
                )
            ]
        )
        hook._do_switch(runner(model), hook.schedule[1])
        for half in model.students.values():
            assert mixed(half) is (then is not None)
        losses = [host.head.loss_module for host in hosts_of(model)]
        assert [type(loss).__name__ for loss in losses] == [
            'LabelSmoothLoss'
        ] * 2
        assert losses[0] is not losses[1]


def two_ema():
    for hook_type in (EMAHook, PretrainEMAHook):
        model = two_detectors()
        plain = copy.deepcopy(hosts_of(model))
        states = []
        for own in (model, *plain):
            hook = hook_type(momentum=0.5)
            hook.before_run(runner(own))
            with torch.no_grad():
                for parameter in own.parameters():
                    parameter.add_(1)
            hook.after_train_iter(runner(own, iter=1), 0)
            hook._swap_ema_parameters()
            states.append(own.state_dict())
        for name, state in zip(model.students, states[1:], strict=True):
            own = {
                key.removeprefix(f'students.{name}.'): value
                for key, value in states[0].items()
                if key.startswith(f'students.{name}.')
            }
            assert equal(own, state)


def two_graphs():
    seen = []
    visualizer = SimpleNamespace(add_graph=lambda model, _: seen.append(model))
    model = two_detectors()
    NaiveVisualizationHook().before_train(runner(model, visualizer=visualizer))
    assert seen == [model]


def two_sync_buffers(monkeypatch):
    def double(tensors, op):
        for tensor in tensors:
            tensor.mul_(2)

    monkeypatch.setattr(sync_buffer, 'all_reduce_params', double)
    model = two_detectors()
    hook = SyncBuffersHook()
    hook.distributed = True
    hook.after_train_epoch(runner(model))
    for host in hosts_of(model):
        assert host.backbone.bn1.running_var.eq(2).all()


def two_sync_norms(monkeypatch):
    monkeypatch.setattr(sync_norm, 'get_dist_info', lambda: (0, 2))
    monkeypatch.setattr(
        sync_norm,
        'all_reduce_dict',
        lambda states, op: {key: value * 3 for key, value in states.items()},
    )
    model = two_detectors()
    SyncNormHook().before_val_epoch(runner(model))
    for half in model.students.values():
        assert half.student.backbone.bn1.running_var.eq(3).all()
        assert half.has_extras


def two_tta():
    """The first student's, as in every test of two."""
    model = two_detectors().eval()
    batch = detection_batch(1)
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(flip=False, flip_direction=None))
    config = dict(
        type=DetTTAModel,
        tta_cfg=ConfigDict(
            nms=dict(type='nms', iou_threshold=0.5), max_per_img=20
        ),
    )
    found = []
    for own in (model, hosts_of(model)[0]):
        state = runner(own)
        PrepareTTAHook(copy.copy(config)).before_test(state)
        views = {
            key: [copy.deepcopy(value)] * 2 for key, value in batch.items()
        }
        found.append(state.model.test_step(views)[0].pred_instances)
    assert torch.equal(found[0].bboxes, found[1].bboxes)


def two_searches(tmp_path):
    model = two_detectors()
    hook = RFSearchHook('search', rf_config(), verbose=False)
    hook.init_model(model)
    hook.step(model, str(tmp_path))
    for name in model.students:
        key = f'students.{name}.neck.fpn_convs.0.conv'
        assert key in hook.config['structure']


def two_optimisers(model, **settings):
    return build_optim_wrapper(
        model,
        ConfigDict(
            constructor='era_mm.MutualOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=0.1),
            **settings,
        ),
    )


def two_invalid_losses():
    model = two_classifiers()
    with torch.no_grad():
        hosts_of(model)[1].head.fc.bias.fill_(torch.nan)
    logged = model.train_step(class_batch(), two_optimisers(model))
    assert logged['first.student_loss'].isfinite()
    with pytest.raises(AssertionError):
        CheckInvalidLossHook(interval=1).after_train_iter(
            runner(model, iter=0), 0, outputs=logged
        )


def two_mean_teachers():
    with pytest.raises(AssertionError):
        MeanTeacherHook().before_train(runner(two_detectors(), iter=0))


def two_numbers_of_classes():
    wrong = detector_config()
    wrong['bbox_head']['num_classes'] = 5
    dataset = SimpleNamespace(metainfo=dict(classes=CLASSES))
    loader = SimpleNamespace(dataset=dataset)
    state = runner(two_detectors(), train_dataloader=loader)
    NumClassCheckHook().before_train_epoch(state)
    state.model = two(detector_config(), wrong, 'mmdet')
    with pytest.raises(AssertionError, match='does not match'):
        NumClassCheckHook().before_train_epoch(state)


def two_epochs():
    model = two_detectors()
    for host in hosts_of(model):
        host.set_epoch = lambda epoch, own=host: setattr(own, 'epoch', epoch)
    SetEpochInfoHook().before_train_epoch(runner(model, epoch=3))
    assert [host.epoch for host in hosts_of(model)] == [3, 3]


def two_l1():
    model = two_detectors()
    dataset = SimpleNamespace(update_skip_type_keys=lambda keys: None)
    state = runner(
        model,
        epoch=1,
        max_epochs=2,
        train_dataloader=SimpleNamespace(dataset=dataset),
    )
    YOLOXModeSwitchHook(1).before_train_epoch(state)
    assert all(host.bbox_head.use_l1 for host in hosts_of(model))
    # A part that only one has is no part of both.
    state.model = two(detector_config(), two_stage_config(), 'mmdet')
    with pytest.raises(AttributeError, match='bbox_head'):
        YOLOXModeSwitchHook(1).before_train_epoch(state)


def two_lambdas():
    model = two_classifiers()
    hook = DenseCLHook(start_iters=2)
    for host in hosts_of(model):
        host.loss_lambda = 0.5
    hook.before_train(runner(model))
    for iteration, expected in ((0, 0.0), (2, 0.5)):
        hook.before_train_iter(runner(model, iter=iteration), 0)
        assert [host.loss_lambda for host in hosts_of(model)] == [expected] * 2


def two_margins():
    dataset = SimpleNamespace(get_gt_labels=lambda: [0, 0, 0, 0, 1, 2, 2])
    state = runner(
        two_classifiers(dict(type='mmpretrain.ArcFaceClsHead')),
        train_dataloader=SimpleNamespace(dataset=dataset),
    )
    SetAdaptiveMarginsHook().before_train(state)
    margins = [host.head.margins for host in hosts_of(state.model)]
    assert torch.equal(*margins)
    assert len(set(margins[1].tolist())) == 3
    state.model = two_classifiers()
    with pytest.raises(ValueError, match='only be used for ``ArcFace'):
        SetAdaptiveMarginsHook().before_train(state)


def two_precise_norms():
    loader = torch.utils.data.DataLoader(
        [0] * 12, batch_size=6, collate_fn=lambda _: class_batch()
    )
    with pytest.raises(RuntimeError, match='leave out the second'):
        update_bn_stats(two_classifiers().train(), loader, 12, logger='silent')


def two_prototypes():
    with pytest.warns(UserWarning, match='BaseRetriever'):
        PrepareProtoBeforeValLoopHook().before_val(runner(two_classifiers()))


def two_rates():
    model = two_detectors()
    wrapper = two_optimisers(
        model, second=dict(optimizer=dict(type='SGD', lr=0.2))
    )
    state = runner(model, optim_wrapper=wrapper, iter=0, epoch=0)
    state.message_hub = MessageHub.get_current_instance()
    RuntimeInfoHook().before_train_iter(state, 0)
    found = state.message_hub.log_scalars
    assert found['train/first.lr'].current() == 0.1
    assert found['train/second.lr'].current() == 0.2
    # Its optimiser is one; the config is refused before.
    with pytest.raises(AttributeError):
        SimSiamHook(fix_pred_lr=True, lr=0.5).before_train_epoch(state)


def two_frozen(tmp_path):
    model = two_classifiers()
    hook = SwAVHook(2, frozen_layers_cfg=dict(fc=2))
    state = runner(model, iter=0, epoch=0, work_dir=str(tmp_path))
    hook.before_run(state)
    hook.before_train_epoch(state)
    hook.before_train_iter(state, 0)
    for host in hosts_of(model):
        assert host.head.loss_module.use_queue is False
        assert not host.head.fc.weight.requires_grad


def two_warmups():
    model = two_classifiers()
    for host in hosts_of(model):
        host.head.loss_module.scale = 1.0
    hook = WarmupParamHook('scale', 'head.loss_module', 2)
    hook.before_train(runner(model))
    hook.before_train_iter(runner(model, iter=1, max_iters=8, max_epochs=4), 0)
    assert [h.head.loss_module.scale for h in hosts_of(model)] == [0.25] * 2
    hosts_of(model)[0].head.loss_module.scale = 2.0
    with pytest.raises(RuntimeError, match="different values of 'scale'"):
        hook.before_train(runner(model))


OF_TWO = {
    'CheckInvalidLossHook': two_invalid_losses,
    'ClassNumCheckHook': two_numbers_of_classes,
    'DenseCLHook': two_lambdas,
    'EMAHook': two_ema,
    'MeanTeacherHook': two_mean_teachers,
    'NaiveVisualizationHook': two_graphs,
    'NumClassCheckHook': two_numbers_of_classes,
    'PreciseBNHook': two_precise_norms,
    'PrepareProtoBeforeValLoopHook': two_prototypes,
    'PrepareTTAHook': two_tta,
    'RFSearchHook': two_searches,
    'RuntimeInfoHook': two_rates,
    'SetAdaptiveMarginsHook': two_margins,
    'SetEpochInfoHook': two_epochs,
    'SimSiamHook': two_rates,
    'SwAVHook': two_frozen,
    'SwitchRecipeHook': two_switch_recipes,
    'SyncBuffersHook': two_sync_buffers,
    'SyncNormHook': two_sync_norms,
    'WarmupParamHook': two_warmups,
    'YOLOXModeSwitchHook': two_l1,
}


@pytest.mark.parametrize(
    'check', dict.fromkeys(OF_TWO.values()), ids=lambda check: check.__name__
)
def test_hooks__reach_both_of_two_students_or_are_refused(check, request):
    assert set(OF_TWO) == set(HOOKS)
    with DefaultScope.overwrite_default_scope(
        'mmpretrain' if 'mixed' in check.__code__.co_names else 'mmdet'
    ):
        check(
            **{
                name: request.getfixturevalue(name)
                for name in inspect.signature(check).parameters
            }
        )


# -- registries --------------------------------------------------------------


def _used(code):
    """Names that a function uses, those of functions inside included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _used(constant)


def _touches_model(cls):
    """Whether one of its methods does, inherited and wrapped ones included."""
    functions = (
        inspect.unwrap(getattr(member, '__func__', member))
        for owner in cls.__mro__
        for member in vars(owner).values()
    )
    return any(
        {'model', 'optim_wrapper'} & set(_used(function.__code__))
        for function in functions
        if isinstance(function, types.FunctionType)
    )


def test_touches_model__also_behind_a_wrapper_or_in_a_base():
    class Reading(Hook):
        @master_only
        def before_train(self, runner):
            runner.model.eval()

    class Inheriting(Reading):
        pass

    class Static(Hook):
        @staticmethod
        def before_train(runner):
            return [rate for rate in runner.optim_wrapper.get_lr()]

    class Other(Hook):
        @master_only
        def before_train(self, runner):
            runner.logger.info('')

    for cls, expected in (
        (Reading, True),
        (Inheriting, True),
        (Static, True),
        (Other, False),
        (Hook, False),
    ):
        assert _touches_model(cls) is expected, cls


def test_registries__every_constructor_and_hook_that_touches_a_model_is_here():
    hosts = (mmengine.registry, mmdet.registry, mmpretrain.registry)

    def registered(name):
        found = {}
        for host in hosts:
            registry = getattr(host, name)
            registry.import_from_location()
            found |= {
                key: cls
                for key, cls in registry.module_dict.items()
                if cls.__module__.split('.')[0]
                in ('mmcv', 'mmdet', 'mmengine', 'mmpretrain')
            }
        return found

    assert set(registered('OPTIM_WRAPPER_CONSTRUCTORS')) == set(CONSTRUCTORS)
    hooks = {k for k, v in registered('HOOKS').items() if _touches_model(v)}
    # This one looks at what the model's step returns.
    assert hooks | {'CheckInvalidLossHook'} == set(HOOKS)


# -- files and logs ----------------------------------------------------------


@pytest.mark.parametrize('load', ['mmengine', 'torch'])
def test_load_from__older_names_reach_the_predictors(load, caplog):
    plain, pair = detectors('FCOSHead')
    old = {
        key.replace('.conv_', '.fcos_'): value + 1
        for key, value in plain.state_dict().items()
    }
    assert 'bbox_head.fcos_cls.weight' in old
    for model in (plain, pair):
        if load == 'mmengine':
            load_state_dict(model, copy.copy(old), strict=True)
        else:
            model.load_state_dict(copy.copy(old))
    assert equal(plain.state_dict(), pair.state_dict())
    key = 'bbox_head.conv_cls.weight'
    assert torch.equal(
        pair.state_dict()[key], old['bbox_head.fcos_cls.weight']
    )


def test_files__extras_and_versions_ride_in_the_plain_metadata():
    plain, pair = detectors()
    metadata = pair.state_dict()._metadata
    assert list(metadata) == list(plain.state_dict()._metadata)
    assert set(extras_of(pair.state_dict())) == {'distiller'}


def test_logs__loss_is_the_total_and_the_own_loss_has_another_name():
    _, model = classifiers()
    model.init_weights()
    data = model.data_preprocessor(class_batch(), True)
    losses = model(**data, mode='loss')
    total, logged = model.parse_losses(losses)
    expected = sum(v for k, v in losses.items() if 'loss' in k)
    assert total == expected
    assert logged['loss'] == expected
    assert logged['student_loss'] == losses['loss'] != expected


def test_switched_augmentation__a_teacher_of_other_preprocessing_sees_it():
    student, teacher = classifier_config(), classifier_config(16)
    student['data_preprocessor'].update(to_onehot=True)
    teacher['data_preprocessor'].update(mean=[10.0] * 3, std=[50.0] * 3)
    _, model = both(student, teacher, 'mmpretrain')
    preprocessor = model.data_preprocessor
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        hook = SwitchRecipeHook(
            [dict(action_epoch=1, batch_augments=copy.deepcopy(MIXUP))]
        )
    raw = torch.stack(class_batch()['inputs']).float()

    data = preprocessor(class_batch(), True)
    assert torch.allclose(data['teacher_inputs']['teacher'], (raw - 10) / 50)
    hook._do_switch(runner(model), hook.schedule[1])
    data = preprocessor(class_batch(), True)
    found = data['teacher_inputs']['teacher']
    assert not torch.allclose(found, (raw - 10) / 50)
    assert torch.allclose(found, (data['inputs'] - 10) / 50, atol=1e-5)
