"""The first seven things that must always hold (docs/architecture.md)."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from mmdet.apis import init_detector
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_checkpoint

from era_mm.core import BaseDistiller, extras_of
from era_mm.registry import MODELS as ERA_MODELS
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
    run_config,
    save_teacher,
)

ERA = dict(type='era_mm.ERADistiller')
ERA_OFF = dict(
    type='era_mm.ERADistiller',
    loss=dict(align_weight=0.0, residual_weight=0.0, twi_weight=0.0),
    logit=dict(weight=0.0, box_weight=0.0),
)


class LossRecorder(Hook):
    """Keeps the student's own losses of every iteration."""

    def __init__(self):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.losses.append(
            {
                key: outputs[key].item()
                for key in outputs
                if key.startswith('loss_') and 'era' not in key
            }
        )


def train(make_runner, model, **kwargs):
    runner = make_runner(model, **kwargs)
    recorder = LossRecorder()
    runner.register_hook(recorder)
    runner.train()
    return runner, recorder.losses


# -- 1. weights 0 are the plain model ---------------------------------------


@pytest.mark.parametrize(
    'options',
    [dict(), dict(form='released'), dict(form='released', logit=None)],
    ids=['default', 'released', 'released-without-logits'],
)
def test_zero_weights__ten_steps_are_the_plain_run_bit_for_bit(
    options, make_runner, teacher_file, tmp_path
):
    # No clipping: the norm over more tensors sums in another order.
    kwargs = dict(
        train_cfg=dict(by_epoch=True, max_epochs=3, val_interval=9),
        optim_wrapper=dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=0.001, momentum=0.9),
        ),
    )
    plain, plain_losses = train(
        make_runner, detector_config(), work_dir=tmp_path / 'a', **kwargs
    )
    off, off_losses = train(
        make_runner,
        distillation_config(ERA_OFF | options, checkpoint=teacher_file),
        work_dir=tmp_path / 'b',
        **kwargs,
    )

    assert len(plain_losses) == 12
    # Building teacher and branches moved no random state: initial weights,
    # data order and flips are the plain run's, without any seed reset.
    assert off_losses == plain_losses
    plain_state = plain.model.state_dict()
    off_state = off.model.state_dict()
    assert list(off_state) == list(plain_state)
    for key in plain_state:
        assert torch.equal(off_state[key], plain_state[key]), key


def test_nonzero_weights__change_the_student(
    make_runner, teacher_file, tmp_path
):
    _, plain = train(make_runner, detector_config(), work_dir=tmp_path / 'a')
    _, era = train(
        make_runner,
        distillation_config(ERA, checkpoint=teacher_file),
        work_dir=tmp_path / 'b',
    )
    assert era[0] == plain[0]
    assert era[1] != plain[1]


# -- 2. files hold a plain student ------------------------------------------


@pytest.mark.parametrize('update_buffers', [False, True])
def test_files__every_one_is_a_plain_student(
    make_runner, teacher_file, tmp_path, coco, update_buffers, caplog
):
    train(
        make_runner,
        distillation_config(ERA, checkpoint=teacher_file),
        custom_hooks=[
            dict(
                type='EMAHook',
                ema_type='ExponentialMovingAverage',
                update_buffers=update_buffers,
                momentum=0.1,
            )
        ],
        train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(
                type='CheckpointHook',
                interval=3,
                by_epoch=False,
                save_best='coco/bbox_mAP',
                rule='greater',
                save_last=True,
            ),
        ),
    )
    files = sorted((tmp_path / 'run').glob('*.pth'))
    names = [file.name for file in files]
    assert any(name.startswith('iter_') for name in names)
    assert any(name.startswith('best_') for name in names)

    config = Config(run_config(detector_config(), coco, tmp_path / 'stock'))
    reference = MODELS.build(detector_config())
    for file in files:
        state = torch.load(file, weights_only=False)['state_dict']
        assert list(state) == list(reference.state_dict()), file.name
        # Strict: no missing, no unexpected key.
        load_checkpoint(reference, str(file), strict=True)
        with caplog.at_level(logging.WARNING):
            init_detector(config, str(file), device='cpu')
        assert 'do not match' not in caplog.text, file.name
        extras = extras_of(state)['distiller']['state_dict']
        assert all(value.device.type == 'cpu' for value in extras.values())


def test_files__ema_averages_the_student_and_shares_the_rest(teacher_file):
    model = MODELS.build(distillation_config(ERA, checkpoint=teacher_file))
    averaged = ExponentialMovingAverage(model)
    assert averaged.module.teachers['teacher'] is model.teachers['teacher']
    assert averaged.module.distillers is model.distillers
    assert (
        averaged.module.student.backbone.conv1.weight
        is not model.student.backbone.conv1.weight
    )
    assert [k for k in averaged.state_dict() if k != 'steps'] == [
        f'module.{k}' for k in model.student.state_dict()
    ]


@pytest.mark.parametrize('update_buffers', [False, True])
def test_files__ema_does_not_touch_the_extras(
    make_runner, teacher_file, tmp_path, update_buffers
):
    model = distillation_config(ERA, checkpoint=teacher_file)
    ema = dict(
        type='EMAHook',
        ema_type='mmdet.ExpMomentumEMA',
        momentum=0.3,
        update_buffers=update_buffers,
    )
    val = dict(by_epoch=True, max_epochs=2, val_interval=1)
    plain, _ = train(
        make_runner,
        copy.deepcopy(model),
        work_dir=tmp_path / 'a',
        train_cfg=val,
    )
    averaged, _ = train(
        make_runner,
        copy.deepcopy(model),
        work_dir=tmp_path / 'b',
        train_cfg=val,
        custom_hooks=[ema],
    )
    expected = plain.model.distillers.state_dict()
    for key, value in averaged.model.distillers.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_resume__continues_as_if_never_stopped(
    make_runner, teacher_file, tmp_path
):
    model = distillation_config(ERA, checkpoint=teacher_file)
    kwargs = dict(custom_hooks=[dict(type='EMAHook', momentum=0.1)])
    whole, _ = train(
        make_runner, copy.deepcopy(model), work_dir=tmp_path / 'a', **kwargs
    )
    # Resumed from the first epoch's file, into fresh random extras.
    runner = make_runner(
        copy.deepcopy(model),
        work_dir=tmp_path / 'b',
        resume=True,
        load_from=str(tmp_path / 'a' / 'epoch_1.pth'),
        **kwargs,
    )
    recorder = LossRecorder()
    runner.register_hook(recorder)
    runner.train()
    assert len(recorder.losses) == 4
    first, last = (
        torch.load(tmp_path / name / 'epoch_2.pth', weights_only=False)
        for name in ('a', 'b')
    )
    for key, value in extras_of(first['state_dict'])['distiller'][
        'state_dict'
    ].items():
        other = extras_of(last['state_dict'])['distiller']['state_dict'][key]
        assert value.shape == other.shape
    # The loader shuffles by epoch and seed, but flips are drawn anew, so the
    # losses are close and not equal; the restored state is exact, below.
    model_b = make_runner(
        copy.deepcopy(model), work_dir=tmp_path / 'c', **kwargs
    )
    model_b.call_hook('before_run')
    model_b.load_checkpoint(str(tmp_path / 'a' / 'epoch_2.pth'))
    extras = model_b.model.distillers.state_dict()
    for key, value in whole.model.distillers.state_dict().items():
        assert torch.equal(extras[key], value), key


def test_load__plain_student_file_fits_and_leaves_the_extras(
    tmp_path, teacher_file
):
    plain = MODELS.build(detector_config())
    torch.save({'state_dict': plain.state_dict()}, tmp_path / 'plain.pth')
    model = MODELS.build(distillation_config(ERA, checkpoint=teacher_file))
    before = copy.deepcopy(model.distillers.state_dict())
    load_checkpoint(model, str(tmp_path / 'plain.pth'), strict=True)
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    for key, value in model.distillers.state_dict().items():
        assert torch.equal(before[key], value)
    # Messages name keys as the file has them.
    state = plain.state_dict()
    del state['neck.fpn_convs.0.conv.weight']
    state['neck.other'] = torch.zeros(1)
    torch.save({'state_dict': state}, tmp_path / 'broken.pth')
    with pytest.raises(RuntimeError) as error:
        load_checkpoint(model, str(tmp_path / 'broken.pth'), strict=True)
    assert 'student.' not in str(error.value)
    assert 'distillers.' not in str(error.value)
    assert 'neck.fpn_convs.0.conv.weight' in str(error.value)


# -- 3. the teacher stays out ------------------------------------------------


def test_teacher__is_in_no_list_of_the_model(teacher_file):
    model = MODELS.build(distillation_config(ERA, checkpoint=teacher_file))
    teacher = model.teachers['teacher'].model
    own = {id(t) for t in (*teacher.parameters(), *teacher.buffers())}
    assert not own & {id(t) for t in (*model.parameters(), *model.buffers())}
    assert not own & {id(t) for t in model.state_dict(keep_vars=True).values()}
    assert not set(teacher.modules()) & set(model.modules())
    wrapper = build_optim_wrapper(
        model, dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    )
    optimised = {
        id(p) for g in wrapper.optimizer.param_groups for p in g['params']
    }
    assert not own & optimised
    assert optimised == {id(p) for p in model.parameters()}
    assert not any(p.requires_grad for p in teacher.parameters())


def test_teacher__stays_in_eval_and_follows_every_move(teacher_file):
    model = MODELS.build(distillation_config(ERA, checkpoint=teacher_file))
    teacher = model.teachers['teacher'].model
    model.train()
    model.student.train()
    assert not any(module.training for module in teacher.modules())
    parameter = next(teacher.parameters())
    model.half()
    assert parameter.dtype == torch.float16
    model.float()
    assert parameter.dtype == torch.float32
    model.to(torch.float64)
    assert parameter.dtype == torch.float64
    model.to('meta')
    assert next(teacher.parameters()).device.type == 'meta'
    assert teacher.data_preprocessor.device.type == 'meta'


def test_teacher__is_shared_by_deepcopy(teacher_file):
    model = MODELS.build(distillation_config(ERA, checkpoint=teacher_file))
    clone = copy.deepcopy(model)
    assert clone.teachers['teacher'] is model.teachers['teacher']
    assert clone.student is not model.student
    # The copy records its own modules, not the original's.
    assert clone.wiring.recorder.model is clone.student


def test_teacher__is_bit_identical_after_training(make_runner, teacher_file):
    before = torch.load(teacher_file, weights_only=False)['state_dict']
    runner, _ = train(
        make_runner, distillation_config(ERA, checkpoint=teacher_file)
    )
    after = runner.model.teachers['teacher'].model.state_dict()
    assert list(after) == list(before)
    for key in before:
        assert torch.equal(after[key], before[key]), key


# -- 4. the teacher sees its own preprocessing -------------------------------


def test_teacher__sees_what_its_own_preprocessor_gives(teacher_file):
    other = detector_config(
        width=16,
        channels=24,
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[0.0, 10.0, 20.0],
            std=[1.0, 2.0, 4.0],
            bgr_to_rgb=False,
            pad_size_divisor=32,
        ),
    )
    model = MODELS.build(
        distillation_config(ERA, teacher=other, checkpoint=teacher_file)
    )
    batch = detection_batch(size=60)
    teacher = model.teachers['teacher']
    expected = teacher.model.data_preprocessor(copy.deepcopy(batch), False)[
        'inputs'
    ]
    plain = model.student.data_preprocessor(copy.deepcopy(batch), True)

    seen = []
    handle = teacher.model.backbone.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    data = model.data_preprocessor(batch, True)
    model(**data, mode='loss')
    handle.remove()

    assert torch.equal(seen[0], expected)
    assert torch.equal(data['inputs'], plain['inputs'])
    assert not torch.equal(expected, plain['inputs'])
    # By hand: pixel 100, mean 10, std 2 in the second channel.
    batch['inputs'][0][1, 0, 0] = 100
    value = teacher.model.data_preprocessor(batch, False)['inputs'][0, 1, 0, 0]
    assert value.item() == 45.0


def test_teacher__equal_preprocessor_shares_the_students_tensors(teacher_file):
    model = MODELS.build(distillation_config(ERA, checkpoint=teacher_file))
    data = model.data_preprocessor(detection_batch(), True)
    assert 'teacher_inputs' not in data


# -- 5. everything declared takes part ---------------------------------------


@ERA_MODELS.register_module(name='_UnreachedDistiller', force=True)
class UnreachedDistiller(BaseDistiller):
    """Makes a parameter that its loss does not use."""

    def prepare(self, **kwargs):
        self.used = torch.nn.Parameter(torch.ones(()))
        self.unused = torch.nn.Parameter(torch.ones(()))

    def loss(self, *, student_feats, teacher_feats, data_samples):
        return {'loss_toy': self.used * student_feats['neck'][0].mean()}


def step(model, optimizer, seed=0):
    data = model.data_preprocessor(detection_batch(seed=seed), True)
    losses = model(**data, mode='loss')
    total, _ = model.parse_losses(losses)
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return losses


def test_extras__without_gradient_stop_the_run_after_the_first_step():
    model = MODELS.build(
        distillation_config(dict(type='era_mm._UnreachedDistiller'))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step(model, optimizer)
    with pytest.raises(RuntimeError, match=r'distillers\.distiller\.unused'):
        step(model, optimizer)


def test_extras__all_of_era_get_a_gradient(teacher_file):
    model = MODELS.build(distillation_config(ERA, checkpoint=teacher_file))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        step(model, optimizer)
    assert not model._gradients.unreached


def test_source__that_never_fires_is_named():
    config = distillation_config(
        dict(type='era_mm.ERADistiller', source='neck.fpn_convs')
    )
    with pytest.raises(RuntimeError, match=r"'neck.fpn_convs'.*never called"):
        MODELS.build(config)


# -- 7. nothing recorded is kept ---------------------------------------------


def test_recorded__tensors_are_gone_after_the_step(teacher_file):
    model = MODELS.build(distillation_config(ERA, checkpoint=teacher_file))
    seen = []
    handles = [
        module.register_forward_hook(
            lambda m, args, output: seen.extend(
                weakref.ref(feat) for feat in output
            )
        )
        for module in (
            model.student.neck,
            model.teachers['teacher'].model.neck,
        )
    ]
    step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    gc.collect()
    assert len(seen) == 4
    assert all(ref() is None for ref in seen)
    for handle in handles:
        handle.remove()


# -- the wrapped model is the student to the hosts ---------------------------


def test_hosts__reach_through_to_the_student(teacher_file):
    model = MODELS.build(distillation_config(ERA, checkpoint=teacher_file))
    assert model.bbox_head is model.student.bbox_head
    assert model.with_neck
    with pytest.raises(AttributeError):
        _ = model.no_such_thing


def test_predict__is_the_students_own(teacher_file):
    model = MODELS.build(distillation_config(ERA, checkpoint=teacher_file))
    model.eval()
    data = model.data_preprocessor(detection_batch(), False)
    with torch.no_grad():
        own = model.student(
            data['inputs'], copy.deepcopy(data['data_samples']), mode='predict'
        )
        through = model(**data, mode='predict')
    for a, b in zip(own, through, strict=True):
        assert torch.equal(a.pred_instances.bboxes, b.pred_instances.bboxes)
        assert torch.equal(a.pred_instances.scores, b.pred_instances.scores)


def test_classifier__the_same_distiller_serves_it(tmp_path):
    from mmpretrain.structures import DataSample

    teacher = classifier_config(width=16)
    config = dict(
        type='era_mm.Distillation',
        student=classifier_config(),
        teacher=dict(
            config=teacher,
            checkpoint=save_teacher(
                teacher, tmp_path / 't.pth', scope='mmpretrain'
            ),
        ),
        distiller=ERA,
    )
    model = MODELS.build(config)
    assert model.distillers['distiller'].mbrnet.spatial_dims == 0
    inputs = torch.rand(4, 3, 32, 32)
    samples = [DataSample().set_gt_label(i % 3) for i in range(4)]
    losses = model(inputs, samples, mode='loss')
    assert {'loss', 'loss_era_align', 'loss_era_twi_cls'} <= set(losses)
    model.parse_losses(losses)[0].backward()
    model.eval()
    model.active_modes = ('T', 'ST', 'E0')
    with torch.no_grad():
        model(inputs, samples, mode='predict')
    assert set(model.mode_predictions) == {'T', 'ST', 'E0'}
    scores = model.mode_predictions['ST'][0].pred_score
    assert scores.sum().item() == pytest.approx(1.0, abs=1e-5)
