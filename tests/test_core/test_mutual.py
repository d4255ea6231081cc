"""MutualDistillation: two students in turns; with IE-KD it is IE-DML."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

from era_mm.core import extras_of, students_of
from era_mm.engine.export import export_student
from era_mm.errors import UserError
from era_mm.hooks.student_files import write_students
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    run_config,
    run_ranks,
)

OPTIM = dict(
    type='OptimWrapper',
    constructor='era_mm.MutualOptimWrapperConstructor',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9),
    clip_grad=dict(max_norm=1.0),
)


def mutual_config(**kwargs):
    """Two toy detectors of other widths, IE-DML."""
    config = dict(
        type='era_mm.MutualDistillation',
        students=dict(
            first=detector_config(),
            second=detector_config(width=12, channels=24),
        ),
        distiller=dict(type='era_mm.IEKDDistiller'),
    )
    return {**config, **kwargs}


def build(**kwargs):
    model = MODELS.build(mutual_config(**kwargs))
    model.init_weights()
    return model


def same(first, second):
    return all(torch.equal(v, second[k]) for k, v in first.items())


def snapshot(model):
    return {
        name: copy.deepcopy(half.student.state_dict())
        for name, half in model.students.items()
    }


# -- as one model ----------------------------------------------------------


def test_dry_run__leaves_the_statistics_of_norms():
    norm = dict(norm_cfg=dict(type='BN'))
    students = {
        name: detector_config(**options)
        for name, options in (('first', {}), ('second', dict(width=12)))
    }
    for student in students.values():
        student['bbox_head'] |= norm
    model = build(
        students=students,
        distiller=dict(type='era_mm.FeatureImitationDistiller'),
    )
    norms = [m for m in model.modules() if hasattr(m, 'num_batches_tracked')]
    assert any('bbox_head' in name for name, _ in model.named_modules())
    for module in norms:
        assert not module.num_batches_tracked


def test_hooks__read_what_both_students_have_or_are_told():
    model = build()
    assert model.bbox_head.num_classes == 3
    strides = model.students['first'].student.bbox_head.prior_generator.strides
    assert model.bbox_head.prior_generator.strides == strides
    for ask in (len, list, float, lambda x: x == 1):
        with pytest.raises(TypeError, match='has no common value'):
            ask(model.bbox_head)
    # A forward pass of both would need two results.
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(RuntimeError, match='PreciseBNHook'):
        model(images, mode='tensor')
    model.eval()
    found = model(images, mode='tensor')
    expected = model.students['first'](images, mode='tensor')
    for one, other in zip(found[0], expected[0], strict=True):
        assert torch.equal(one, other)
    new = copy.deepcopy(model.students['first'].data_preprocessor)
    new.marked = True
    model.data_preprocessor = new
    assert all(h.data_preprocessor.marked for h in model.students.values())
    assert model.data_preprocessor.marked


# -- turns -----------------------------------------------------------------


def test_turns__a_turn_changes_its_student_alone():
    model = build()
    wrappers = build_optim_wrapper(model, OPTIM)
    start, seen = snapshot(model), {}
    for name, half in model.students.items():

        def update(loss, name=name, own=wrappers[name]):
            before = snapshot(model)
            OptimWrapper.update_params(own, loss)
            seen[name] = before, snapshot(model)

        wrappers[name].update_params = update
        assert all(p.grad is None for p in half.parameters())
    logged = model.train_step(detection_batch(4), wrappers)

    before, after = seen['first']
    # The second is as it was, norms' statistics included, until its turn.
    assert same(after['second'], start['second'])
    assert not same(after['first'], before['first'])
    before, after = seen['second']
    assert same(before['first'], seen['first'][1]['first'])
    assert same(after['first'], before['first'])
    assert not same(after['second'], start['second'])
    for name in ('first', 'second'):
        assert f'{name}.loss_cls' in logged
        assert f'{name}.loss_iekd_explore' in logged
    total = sum(
        v.item() for k, v in logged.items() if k.split('.')[-1][:5] == 'loss_'
    )
    assert logged['loss'].item() == pytest.approx(total, rel=1e-5)


def test_turns__the_second_learns_from_the_updated_first():
    model = build()
    wrappers = build_optim_wrapper(model, OPTIM)
    batch = detection_batch(4)
    reference = copy.deepcopy(batch)
    first, second = model.students.values()
    heard = []
    encode = second.distillers['distiller']._targets

    def spy(feats):
        heard.append([feat.clone() for feat in feats])
        return encode(feats)

    second.distillers['distiller']._targets = spy
    model.train_step(batch, wrappers)
    # The first has not moved since its own turn.
    with torch.no_grad():
        inputs = first.data_preprocessor(reference, False)['inputs']
        first.student.eval()
        expected = first.student.extract_feat(inputs)
    assert not any(feat.requires_grad for feat in heard[0])
    for mine, theirs in zip(heard[0], expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_turns__each_gets_the_batch_as_it_came():
    """mmdet's batch augmentation scales ground truth in place."""
    MessageHub.get_current_instance().update_info('iter', 0)
    resizing = detector_config()
    resizing['data_preprocessor'] |= dict(
        batch_augments=[
            dict(
                type='BatchSyncRandomResize',
                random_size_range=(96, 96),
                interval=1,
                size_divisor=32,
            )
        ]
    )
    model = build(students=dict(first=resizing, second=detector_config()))
    wrappers = build_optim_wrapper(model, OPTIM)
    # It draws its next size at the end of a step.
    model.train_step(detection_batch(4), wrappers)
    seen = {}
    for name, half in model.students.items():
        half.register_forward_pre_hook(
            lambda module, args, batch, name=name: seen.update({name: batch}),
            with_kwargs=True,
        )
    batch, reference = detection_batch(4), detection_batch(4)
    model.train_step(batch, wrappers)
    boxes = reference['data_samples'][0].gt_instances.bboxes
    for name, scale in (('first', 96 / 64), ('second', 1)):
        found = seen[name]['data_samples'][0].gt_instances.bboxes
        torch.testing.assert_close(found, scale * boxes)
        assert seen[name]['inputs'].shape[-1] == scale * 64
    assert torch.equal(batch['data_samples'][0].gt_instances.bboxes, boxes)


def test_val_step__predicts_by_each_student_apart():
    model = build()
    model.eval()
    model.active_modes = ('second',)
    batch = detection_batch(2)
    with torch.no_grad():
        second = model.students['second'].val_step(copy.deepcopy(batch))
        alone = model.students['first'].val_step(copy.deepcopy(batch))
        first = model.val_step(batch)
    for mine, theirs in (
        (first, alone),
        (model.mode_predictions['second'], second),
    ):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(
                a.pred_instances.bboxes, b.pred_instances.bboxes
            )
    assert not torch.equal(
        first[0].pred_instances.scores, second[0].pred_instances.scores
    )
    with pytest.raises(ValueError, match=r"Known: \['second'\]"):
        model.check_modes(['first'])


def test_turns__gradients_do_not_reach_the_peer():
    model = build()
    first, second = model.students.values()
    data = first.data_preprocessor(detection_batch(4), True)
    first.parse_losses(first(**data, mode='loss'))[0].backward()
    assert first.student.backbone.conv1.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in second.parameters())
    assert all(module.training for module in second.student.modules())


FROZEN = [
    dict(type='era_mm.ERADistiller'),
    dict(type='era_mm.ERADistiller', twi_steps='none'),
    dict(type='era_mm.SoKDDistiller', base=dict(type='era_mm.ERADistiller')),
    dict(type='era_mm.SimKDDistiller', channels=[64, 96]),
]


@pytest.mark.parametrize(
    'distiller', FROZEN, ids=['era', 'features', 'wrapped', 'simkd']
)
def test_methods__that_need_a_frozen_teacher_are_refused(distiller):
    widths = dict(first=8, second=12)
    if distiller['type'] == 'era_mm.SimKDDistiller':
        init_default_scope('mmpretrain')
        models = {k: classifier_config(width=v) for k, v in widths.items()}
    else:
        models = {k: detector_config(width=v) for k, v in widths.items()}
    with pytest.raises(ValueError, match='does not change, but this one'):
        build(students=models, distiller=distiller)


def test_weights_0__each_student_trains_as_a_plain_one():
    """Four steps, bit for bit, without clipping over other tensors."""
    model = build(
        distiller=dict(
            type='era_mm.IEKDDistiller',
            loss=dict(inherit_weight=0.0, explore_weight=0.0),
        )
    )
    optim = {k: v for k, v in OPTIM.items() if k != 'clip_grad'}
    wrappers = build_optim_wrapper(model, optim)
    plain = {
        name: copy.deepcopy(half.student)
        for name, half in model.students.items()
    }
    own = {
        name: build_optim_wrapper(
            student, {k: v for k, v in optim.items() if k != 'constructor'}
        )
        for name, student in plain.items()
    }
    for seed in range(4):
        batch = detection_batch(4, seed=seed)
        for name, student in plain.items():
            student.train_step(copy.deepcopy(batch), own[name])
        model.train_step(batch, wrappers)
    for name, state in snapshot(model).items():
        assert same(state, plain[name].state_dict()), name


def test_students__of_one_architecture_start_differently():
    torch.manual_seed(5)
    plain = MODELS.build(detector_config())
    plain.init_weights()
    then = torch.rand(3)
    torch.manual_seed(5)
    model = build(students=dict(a=detector_config(), b=detector_config()))
    # The first and all that follows are the plain run's.
    assert torch.equal(torch.rand(3), then)
    states = snapshot(model)
    assert same(plain.state_dict(), states['a'])
    assert not torch.equal(
        states['a']['backbone.conv1.weight'],
        states['b']['backbone.conv1.weight'],
    )


def test_classifiers__learn_from_each_other():
    init_default_scope('mmpretrain')
    model = MODELS.build(
        mutual_config(
            students=dict(
                small=classifier_config(), large=classifier_config(width=12)
            ),
            distiller=dict(type='era_mm.IEKDDistiller', source='backbone'),
        )
    )
    model.init_weights()
    wrappers = build_optim_wrapper(
        model, OPTIM | dict(optimizer=dict(type='SGD', lr=0.05))
    )
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (8, 3, 64, 64), generator=generator)
    labels = torch.arange(8) % 3
    values = []
    for _ in range(12):
        data = dict(
            inputs=list(images),
            data_samples=[DataSample().set_gt_label(y) for y in labels],
        )
        values.append(model.train_step(data, wrappers))
    for name in ('small', 'large'):
        first, last = (
            values[i][f'{name}.iekd_cos_inherit'].item() for i in (0, -1)
        )
        assert last > first
    assert values[-1]['loss'].isfinite()


# -- optimisers ------------------------------------------------------------


def test_optimisers__hold_a_student_and_its_extras_each():
    model = build()
    wrappers = build_optim_wrapper(model, OPTIM)
    assert list(wrappers.keys()) == ['first', 'second']
    for name, half in model.students.items():
        held = {
            id(p)
            for group in wrappers[name].optimizer.param_groups
            for p in group['params']
        }
        assert held == {id(p) for p in half.parameters()}
        names = [n for n, _ in half.named_parameters()]
        assert 'backbone.conv1.weight' in names


def test_optimisers__have_settings_of_their_own():
    model = build()
    config = dict(
        type='OptimWrapper',
        constructor='era_mm.MutualOptimWrapperConstructor',
        first=dict(optimizer=dict(type='SGD', lr=0.3)),
        second=dict(
            optimizer=dict(type='Adam', lr=0.2),
            paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}),
        ),
    )
    wrappers = build_optim_wrapper(model, config)
    assert wrappers['first'].optimizer.param_groups[0]['lr'] == 0.3
    rates = {
        round(group['lr'], 9)
        for group in wrappers['second'].optimizer.param_groups
    }
    assert rates == {0.02, 0.2}
    del config['second']
    with pytest.raises(ValueError, match="no `optimizer` for student 'second"):
        build_optim_wrapper(model, config)
    # One for all, where a student has none of its own.
    config['optimizer'] = dict(type='SGD', lr=0.1)
    rates = {
        name: wrapper.optimizer.param_groups[0]['lr']
        for name, wrapper in build_optim_wrapper(model, config).items()
    }
    assert rates == dict(first=0.3, second=0.1)
    with pytest.raises(TypeError, match='but the model is RetinaNet'):
        build_optim_wrapper(MODELS.build(detector_config()), OPTIM)


def test_one_optimiser__is_refused_with_the_remedy():
    model = build()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match='MutualOptimWrapperConstructor'):
        model.train_step(detection_batch(), wrapper)
    data = model.data_preprocessor(detection_batch(), True)
    with pytest.raises(RuntimeError, match='MutualDataParallel'):
        model(**data, mode='loss')


# -- refusals --------------------------------------------------------------


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(students=dict(a=detector_config())), 'dict of two model'),
        (
            dict(students={'a.b': detector_config(), 'c': detector_config()}),
            "must not be named 'a.b'",
        ),
        (
            dict(distiller=dict(first=dict(type='era_mm.IEKDDistiller'))),
            "for each of \\['first', 'second'\\]",
        ),
        (
            dict(
                distiller=dict(type='era_mm.IEKDDistiller', pretrain_iters=5)
            ),
            'changes in every step. Set pretrain_iters=0',
        ),
    ],
)
def test_config__refuses(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


# -- files -----------------------------------------------------------------


def test_state__has_both_students_in_their_own_keys():
    model = build()
    state = model.state_dict()
    students = students_of(state)
    assert list(students) == ['first', 'second']
    for name, config in mutual_config()['students'].items():
        plain = MODELS.build(config)
        plain.load_state_dict(students[name], strict=True)
        assert same(
            plain.state_dict(), model.students[name].student.state_dict()
        )
    assert students_of(plain.state_dict()) == {}
    assert extras_of(state) is None
    names = [name for name, _ in model.named_parameters()]
    assert set(names) > {k for k in state if k.endswith('conv1.weight')}


def test_ema__averages_both_students_and_freezes_nothing():
    model = build()
    wrappers = build_optim_wrapper(model, OPTIM)
    average = ExponentialMovingAverage(model, momentum=0.5)
    assert all(
        p.requires_grad
        for half in model.students.values()
        for p in half.distillers.parameters()
    )
    start = snapshot(model)
    model.train_step(detection_batch(4), wrappers)
    average.update_parameters(model)
    model.train_step(detection_batch(4), wrappers)
    now = snapshot(model)
    average.update_parameters(model)
    key = 'backbone.conv1.weight'
    for name in start:
        mine = average.module.students[name].student.state_dict()[key]
        assert not torch.equal(mine, now[name][key])
        assert not torch.equal(mine, start[name][key])


@pytest.fixture
def run(make_runner, coco, tmp_path):
    loader = run_config({}, coco, tmp_path).train_dataloader
    # What augmentation draws is not part of a checkpoint.
    loader.dataset.pipeline = [
        step for step in loader.dataset.pipeline if step.type != 'RandomFlip'
    ]

    def train(name, resume=None):
        runner = make_runner(
            mutual_config(),
            work_dir=tmp_path / name,
            experiment_name=name,
            optim_wrapper=OPTIM,
            param_scheduler=[
                dict(type='MultiStepLR', milestones=[1], gamma=0.1)
            ],
            custom_hooks=[
                dict(type='era_mm.ModesHook', modes=['second']),
                dict(type='era_mm.StudentFilesHook'),
            ],
            train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=2),
            resume=resume is not None,
            load_from=resume,
        )
        steps, metrics = {}, {}
        train_step = type(runner.model).train_step

        def spy(model, data, optim_wrapper):
            logged = train_step(model, data, optim_wrapper)
            steps[runner.iter] = {k: v.item() for k, v in logged.items()}
            return logged

        runner.model.train_step = spy.__get__(runner.model)
        hook = next(h for h in runner.hooks if type(h).__name__ == 'ModesHook')
        finish = hook.after_val_epoch

        def listen(runner, **kwargs):
            finish(runner, **kwargs)
            metrics.update(kwargs['metrics'])

        hook.after_val_epoch = listen
        runner.train()
        return runner, steps, metrics

    return train


def test_run__resumes_evaluates_both_and_writes_plain_files(run, tmp_path):
    runner, expected, metrics = run('whole')
    assert 'coco/bbox_mAP' in metrics
    assert 'second/coco/bbox_mAP' in metrics
    # Both rates were dropped by the one schedule.
    rates = [
        w.optimizer.param_groups[0]['lr']
        for w in runner.optim_wrapper.values()
    ]
    assert rates == [pytest.approx(0.001)] * 2

    model, steps, _ = run(
        'resumed', resume=str(tmp_path / 'whole' / 'epoch_1.pth')
    )
    assert list(steps) == list(range(4, 8))
    for step, logged in steps.items():
        assert logged == expected[step], step
    for name, state in snapshot(model.model).items():
        assert same(state, snapshot(runner.model)[name])
    for name, half in model.model.students.items():
        inner = half.distillers['distiller'].inner.state_dict()
        other = runner.model.students[name].distillers['distiller'].inner
        assert same(inner, other.state_dict())

    for name, config in mutual_config()['students'].items():
        file = tmp_path / 'whole' / f'epoch_2_{name}.pth'
        content = torch.load(file, weights_only=False)
        plain = MODELS.build(config)
        plain.load_state_dict(content['state_dict'], strict=True)
        assert same(
            plain.state_dict(),
            runner.model.students[name].student.state_dict(),
        )
        assert content['meta']['dataset_meta']['classes']
    assert not list((tmp_path / 'whole').glob('*.part'))
    with pytest.raises(ValueError, match='holds no `students'):
        write_students(file)


@pytest.fixture
def trained(coco, tmp_path):
    """Config and file of a run, as training leaves them."""
    model = build()
    file = tmp_path / 'epoch_1.pth'
    torch.save({'meta': dict(epoch=1), 'state_dict': model.state_dict()}, file)
    cfg = Config(
        run_config(
            mutual_config(),
            coco,
            tmp_path / 'run',
            optim_wrapper=dict(
                type='OptimWrapper',
                constructor='era_mm.MutualOptimWrapperConstructor',
                first=dict(optimizer=dict(type='SGD', lr=0.3)),
                second=dict(optimizer=dict(type='SGD', lr=0.2)),
            ),
            custom_hooks=[dict(type='era_mm.StudentFilesHook')],
        )
    )
    return model, cfg, str(file)


def test_export__takes_each_student_by_itself(trained, tmp_path):
    model, cfg, file = trained
    for name, lr in (('first', 0.3), ('second', 0.2)):
        exported = export_student(
            cfg, file, str(tmp_path / f'plain_{name}'), student=name
        )
        assert exported.needs_era_mm == ()
        assert 'era_mm' not in exported.config.read_text()
        plain = Config.fromfile(exported.config)
        assert plain.optim_wrapper == dict(
            type='OptimWrapper', optimizer=dict(type='SGD', lr=lr)
        )
        detector = MODELS.build(plain.model)
        state = torch.load(exported.checkpoint, weights_only=False)
        detector.load_state_dict(state['state_dict'], strict=True)
        assert same(
            detector.state_dict(), model.students[name].student.state_dict()
        )


def test_export__refuses_what_two_students_do_not_have(trained, tmp_path):
    model, cfg, file = trained
    prefix = str(tmp_path / 'plain')
    for student in (None, 'third'):
        with pytest.raises(UserError, match=r"\['first', 'second'\], but"):
            export_student(cfg, file, prefix, student=student)
    with pytest.raises(UserError, match='Only S can be exported'):
        export_student(cfg, file, prefix, student='first', mode='T')
    # A plain student's file would load into either half of a like pair.
    plain = tmp_path / 'student.pth'
    torch.save(students_of(model.state_dict())['first'], plain)
    with pytest.raises(UserError, match='has one plain model'):
        export_student(cfg, str(plain), prefix, student='first')
    cfg.model = dict(type='era_mm.Distillation', student=detector_config())
    with pytest.raises(UserError, match='Omit it'):
        export_student(cfg, file, prefix, student='first')


# -- DDP -------------------------------------------------------------------


@pytest.fixture(scope='module')
def ranks(coco, tmp_path_factory):
    """What two ranks have: weights and losses, by the epoch they begin at."""
    out = tmp_path_factory.mktemp('mutual_ddp')
    worker = Path(__file__).with_name('mutual_ddp_worker.py')
    run_ranks(worker, coco, str(out))
    return [
        [torch.load(out / f'from_{b}_rank{r}.pth') for b in (0, 1)]
        for r in (0, 1)
    ]


def test_ddp__two_ranks_end_with_the_same_weights(ranks):
    (first, _), (second, _) = (rank[0] for rank in ranks)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    # Shards differ, so weights that had not been averaged would too.
    assert any('encoders' in key for key in first)
    assert any('inner' in key for key in first)


def test_ddp__two_ranks_resumed_end_as_the_whole_run(ranks):
    for (weights, steps), (resumed, again) in ranks:
        assert list(again) == [2, 3]
        for step, logged in again.items():
            assert logged == pytest.approx(steps[step], rel=1e-5), step
        for key, value in weights.items():
            torch.testing.assert_close(resumed[key], value)
    # Each rank has images of its own.
    assert ranks[0][0][1] != ranks[1][0][1]
