"""Residual KD: values, routing, phases, and the pair as a host model."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    MODELS,
    PARAM_SCHEDULERS,
    DefaultScope,
    init_default_scope,
)
from mmengine.runner import Runner
from torch import nn

from era_mm.core import BaseDistiller, extras_of, student_config_of
from era_mm.engine.export import export_student
from era_mm.engine.preflight import find_config
from era_mm.methods.residual_kd import (
    FeatureAssistant,
    ResidualPair,
    assistant_loss,
    pair_config,
    student_loss,
)
from era_mm.methods.residual_kd.distiller import phase_at
from era_mm.methods.residual_kd.pair import FeatureExtractor, ResidualAdapter
from era_mm.methods.residual_kd.split import measure, measure_pair
from era_mm.registry import MODELS as ERA_MODELS
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
    run_config,
    run_ranks,
    save_teacher,
)

RKD = dict(type='era_mm.ResidualKDDistiller')
FEATURE = dict(form='feature')
IMAGE = dict(
    form='image',
    backbone=dict(base_channels=4, stem_channels=4),
    neck=dict(out_channels=8),
)
PHASES = dict(student=2, assistant=3, head=None)


def build(**kwargs):
    return MODELS.build(distillation_config(dict(RKD, **kwargs)))


def losses_of(model, step=0, num=2):
    MessageHub.get_current_instance().update_info('iter', step)
    data = model.data_preprocessor(detection_batch(num), True)
    return model(**data, mode='loss')


def wake(model):
    """Take the assistant away from its start at 0."""
    for name, parameter in model.student.backbone.assistant.named_parameters():
        if parameter.dim() == 1 and name.endswith('weight'):
            nn.init.normal_(parameter)


def grads(module):
    return [p.grad for p in module.parameters()]


def no_gradient(module):
    return all(g is None or not g.any() for g in grads(module))


# -- losses -----------------------------------------------------------------


def test_losses__by_hand():
    teacher = torch.tensor([[3.0, 1.0]])
    student = torch.tensor([[1.0, 2.0]])
    assistant = torch.tensor([[1.5, -0.5]])
    # F_T - F_S = [2, -1]: (4 + 1) / 2.
    assert student_loss(student_feat=student, teacher_feat=teacher) == 2.5
    # [2, -1] - [1.5, -0.5] = [0.5, -0.5]: (0.25 + 0.25) / 2.
    loss = assistant_loss(
        student_feat=student, assistant_feat=assistant, teacher_feat=teacher
    )
    assert loss == 0.25
    # F_int = [2.5, 1.5]; 3 - 2.5 = 0.5, 1 - 1.5 = -0.5.
    both = student + assistant
    assert both.tolist() == [[2.5, 1.5]]
    assert (teacher - both).square().mean() == loss


def test_assistant_loss__is_0_where_the_assistant_is_the_residual():
    teacher = torch.randint(-9, 9, (2, 3, 4, 4)).float()
    student = torch.randint(-9, 9, (2, 3, 4, 4)).float()
    assistant = teacher - student
    assert torch.equal(student + assistant, teacher)
    loss = assistant_loss(
        student_feat=student, assistant_feat=assistant, teacher_feat=teacher
    )
    assert loss == 0


def test_losses__equal_a_loop():
    teacher, student, assistant = torch.randn(3, 2, 3, 2, 2).double()
    lacks = missed = 0.0
    for t, s, a in zip(
        teacher.flatten(), student.flatten(), assistant.flatten(), strict=True
    ):
        lacks += float(t - s) ** 2 / 24
        missed += float(t - (s + a)) ** 2 / 24
    found = student_loss(student_feat=student, teacher_feat=teacher)
    assert found.item() == pytest.approx(lacks, rel=1e-12)
    found = assistant_loss(
        student_feat=student, assistant_feat=assistant, teacher_feat=teacher
    )
    assert found.item() == pytest.approx(missed, rel=1e-12)


def test_losses__of_half_precision_keep_a_small_residual():
    # (2^-13)^2 = 2^-26 is 0 in float16, whose smallest number is 2^-24.
    zero = torch.zeros(1, 4, dtype=torch.float16)
    teacher = zero + 2**-13
    loss = student_loss(student_feat=zero, teacher_feat=teacher)
    assert loss.item() == 2**-26
    loss = assistant_loss(
        student_feat=zero, assistant_feat=zero, teacher_feat=teacher
    )
    assert loss.item() == 2**-26


def test_assistant_loss__has_no_gradient_for_the_student():
    student = torch.randn(2, 3, requires_grad=True)
    assistant = torch.randn(2, 3, requires_grad=True)
    teacher = torch.randn(2, 3)
    assistant_loss(
        student_feat=student, assistant_feat=assistant, teacher_feat=teacher
    ).backward()
    assert student.grad is None
    # d/dA mean((D - A)^2) = 2 (A - D) / 6.
    expected = (assistant - (teacher - student)).detach() / 3
    torch.testing.assert_close(assistant.grad, expected)


# -- the pair ---------------------------------------------------------------


@pytest.mark.parametrize(
    'assistant', [FEATURE, IMAGE], ids=['feature', 'image']
)
def test_pair__starts_at_the_plain_detector_of_the_seed(assistant):
    torch.manual_seed(3)
    plain = MODELS.build(detector_config())
    plain.init_weights()
    after_plain = torch.rand(1)
    torch.manual_seed(3)
    model = build(assistant=assistant)
    model.init_weights()
    assert torch.equal(torch.rand(1), after_plain)
    plain.eval()
    model.eval()
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        outs = [m(inputs, mode='tensor') for m in (plain, model)]
        feats = [m.extract_feat(inputs) for m in (plain, model.student)]
    for first, second in zip(*feats, strict=True):
        assert first.shape == second.shape
    for first, second in zip(*outs, strict=True):
        assert all(
            (x - y).abs().max() == 0
            for x, y in zip(first, second, strict=True)
        )


@pytest.mark.parametrize('form', ['feature', 'image'])
def test_pair__starts_at_the_plain_classifier_too(form):
    narrow = dict(backbone=dict(base_channels=4, stem_channels=4))
    config = pair_config(
        classifier_config(),
        source='backbone',
        assistant=dict(form=form, **(narrow if form == 'image' else {})),
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        torch.manual_seed(3)
        plain = MODELS.build(classifier_config()).eval()
        torch.manual_seed(3)
        pair = MODELS.build(config).eval()
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain(inputs), pair(inputs))


@pytest.mark.parametrize(
    'assistant', [FEATURE, IMAGE], ids=['feature', 'image']
)
def test_pair__head_sees_the_sum(assistant):
    model = build(assistant=assistant)
    wake(model)
    pair = model.student.backbone
    seen = {}
    for name in ('adapter', 'assistant'):
        pair.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: seen.update({name: out})
        )
    feats = model.student.extract_feat(torch.randn(2, 3, 64, 64))
    assert len(feats) == len(seen['adapter']) == 2
    for feat, own, residual in zip(
        feats, seen['adapter'], seen['assistant'], strict=True
    ):
        assert residual.abs().max() > 0
        assert torch.equal(feat, own + residual)


def test_pair__of_a_narrow_student_keeps_the_channels_of_the_head():
    narrow = dict(base_channels=4, stem_channels=4)
    model = build(
        student=dict(backbone=narrow, neck=dict(out_channels=8)),
        assistant=IMAGE,
    )
    config = model.student_config.backbone
    # base_channels 4: stages of 4, 8, 16, of which the FPN takes the last
    # two; 8 channels from it, 16 for the head.
    assert config.student.neck.in_channels == [8, 16]
    assert (config.in_channels, config.out_channels) == ([8, 8], [16, 16])
    feats = model.student.extract_feat(torch.randn(2, 3, 64, 64))
    assert [f.shape for f in feats] == [(2, 16, 8, 8), (2, 16, 4, 4)]


def test_pair__cut_anew_is_free_of_what_belongs_to_pretrained_weights():
    given = detector_config()
    given['backbone'] |= dict(
        frozen_stages=1,
        norm_eval=True,
        norm_cfg=dict(type='BN', requires_grad=False),
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18'),
    )
    before = copy.deepcopy(given)
    pair = pair_config(given, assistant=IMAGE).backbone
    assert given == before
    # The student is the given model; the assistant is new.
    assert pair.student.backbone == given['backbone']
    new = pair.assistant.backbone
    assert 'init_cfg' not in new
    assert 'frozen_stages' not in new
    assert new.norm_eval is False
    assert new.norm_cfg.requires_grad is True
    narrow = dict(backbone=dict(base_channels=4))
    student = pair_config(given, student=narrow).backbone.student
    assert 'init_cfg' not in student.backbone
    assert student.backbone.norm_eval is False


def test_pair__cut_anew_keeps_what_is_not_pretraining():
    given = detector_config()
    kaiming = dict(type='Kaiming', layer='Conv2d')
    given['backbone']['init_cfg'] = [
        kaiming,
        dict(type='Pretrained', checkpoint='torchvision://resnet18'),
    ]
    # New even where it is as wide as the given model.
    pair = pair_config(
        given, assistant=dict(form='image'), norm_cfg=dict(type='SyncBN')
    ).backbone
    assert pair.assistant.backbone.init_cfg == [kaiming]
    assert len(pair.student.backbone.init_cfg) == 2
    assert pair.norm_cfg == dict(type='SyncBN')


def test_distiller__says_what_a_student_cut_anew_starts_without(
    monkeypatch,
):
    given = ConfigDict(detector_config())
    given.backbone.update(
        frozen_stages=1,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18'),
    )
    narrow = dict(backbone=dict(base_channels=4))
    said: list[str] = []
    monkeypatch.setattr(
        'era_mm.methods.residual_kd.distiller.print_log',
        lambda message, **_: said.append(message),
    )
    ERA_MODELS.build(RKD).student_config(given)
    assert not said
    ERA_MODELS.build(dict(RKD, student=narrow)).student_config(given)
    assert 'init_cfg, frozen_stages of the given backbone' in said[0]


def test_adapter__does_no_more_than_it_has_to():
    adapter = ResidualAdapter([4, 6], [4, 4])
    assert not list(adapter.levels[0].parameters())
    # 6 * 4 weights, 2 * 4 of the norm.
    assert sum(p.numel() for p in adapter.levels[1].parameters()) == 32
    starts = ResidualAdapter([4, 6], [4, 4], zero_init=True)
    # Where channels agree the norm alone.
    assert sum(p.numel() for p in starts.levels[0].parameters()) == 8
    starts.init_weights()
    feats = [torch.randn(2, 4, 3, 3), torch.randn(2, 6)]
    outs = starts(feats)
    assert [o.shape for o in outs] == [(2, 4, 3, 3), (2, 4)]
    assert not any(o.any() for o in outs)
    # By the norm's scale: a norm of a convolution that outputs 0 would
    # divide its first gradients by the root of eps.
    assert not starts.levels[1].norm.weight.any()
    assert starts.levels[1].conv.weight.any()


def test_feature_assistant__by_hand():
    # One level of one channel, no norm: two 1x1 convolutions on vectors.
    assistant = FeatureAssistant([1], [1], spatial_dims=0, norm_cfg=None)
    for conv, (weight, bias) in zip(
        assistant.levels[0], [(2.0, -1.0), (3.0, 0.5)], strict=True
    ):
        nn.init.constant_(conv.conv.weight, weight)
        nn.init.constant_(conv.conv.bias, bias)
    feats = (torch.tensor([[2.0], [-1.0]]),)
    # 2 * 2 - 1 = 3, 3 * 3 + 0.5 = 9.5; 2 * -1 - 1 < 0, so 0.5.
    assert assistant(None, feats)[0].tolist() == [[9.5], [0.5]]


# -- routing ----------------------------------------------------------------


@pytest.mark.parametrize(
    'assistant', [FEATURE, IMAGE], ids=['feature', 'image']
)
def test_gradients__reach_whom_they_are_for(assistant):
    model = build(assistant=assistant)
    wake(model)
    pair, head = model.student.backbone, model.student.bbox_head
    teacher = model.teachers['teacher'].model
    distiller = model.distillers['distiller']

    losses_of(model)['loss_residual_kd_student'].backward()
    assert no_gradient(pair.assistant)
    assert no_gradient(head)
    assert no_gradient(teacher)
    assert all(g is not None and g.any() for g in grads(distiller))
    assert any(g is not None and g.any() for g in grads(pair.student))

    model.zero_grad()
    losses_of(model)['loss_residual_kd_assistant'].backward()
    assert no_gradient(pair.student)
    assert no_gradient(head)
    assert no_gradient(distiller)
    assert no_gradient(teacher)
    assert any(g is not None and g.any() for g in grads(pair.assistant))

    model.zero_grad()
    sum(losses_of(model)['loss_cls']).backward()
    for module in (pair.student, pair.assistant, head):
        assert any(g is not None and g.any() for g in grads(module))


def test_loss__is_the_weighted_sum_over_levels_in_the_teachers_channels():
    model = build(student_weight=2.0, assistant_weight=3.0)
    wake(model)
    model.train()
    distiller = model.distillers['distiller']
    maps, residuals, targets = (
        tuple(torch.randn(2, c, s, s) for s in (4, 2)) for c in (16, 16, 24)
    )
    losses = distiller.loss(
        student_feats={
            'backbone.adapter': maps,
            'backbone.assistant': residuals,
        },
        teacher_feats={'neck': targets},
        data_samples=[],
    )
    expected = {'student': 0, 'pair': 0}
    for level, (s, a, t) in enumerate(
        zip(maps, residuals, targets, strict=True)
    ):
        weight = distiller.connectors[level].weight[:, :, 0, 0]
        s, a = (torch.einsum('oc,nchw->nohw', weight, x) for x in (s, a))
        expected['student'] += (t - s).square().mean()
        expected['pair'] += (t - s - a).square().mean()
    close = torch.testing.assert_close
    close(losses['loss_residual_kd_student'], 2 * expected['student'])
    close(losses['loss_residual_kd_assistant'], 3 * expected['pair'])
    close(losses['residual_kd_mse_student'], expected['student'].detach())
    close(losses['residual_kd_mse_pair'], expected['pair'].detach())


def test_loss__of_equal_channels_needs_no_connector():
    teacher = detector_config(width=16)
    model = MODELS.build(distillation_config(RKD, teacher=teacher))
    assert not list(model.distillers.parameters())


def with_cuts(cuts=('layer1', 'layer2'), **kwargs):
    """A pair of classifiers with further cuts."""
    init_default_scope('mmpretrain')
    return MODELS.build(
        ConfigDict(
            type='era_mm.Distillation',
            student=classifier_config(),
            teacher=dict(
                config=classifier_config(width=16), checkpoint='random'
            ),
            distiller=dict(
                RKD,
                source='backbone',
                student=dict(backbone=dict(base_channels=6)),
                assistant=dict(
                    form='image',
                    backbone=dict(base_channels=4, stem_channels=4),
                ),
                cuts=cuts,
                **kwargs,
            ),
        )
    )


def random_images():
    from mmpretrain.structures import DataSample

    return dict(
        inputs=torch.randn(4, 3, 64, 64),
        data_samples=[DataSample().set_gt_label(i % 3) for i in range(4)],
    )


def test_cuts__add_their_terms():
    model = with_cuts()
    wake(model)
    distiller = model.distillers['distiller']
    feats = {}
    loss = distiller.loss

    def spy(**found):
        feats.update(found)
        return loss(**found)

    distiller.loss = spy
    losses = model(**random_images(), mode='loss')
    student, teacher = feats['student_feats'], feats['teacher_feats']
    assert list(teacher) == ['backbone', 'backbone.layer1', 'backbone.layer2']
    student_error, pair_error = 0, 0
    for index, name in enumerate(('layer1', 'layer2')):
        own, assistant = (
            torch.einsum(
                'oc,nchw->nohw',
                distiller.cut_convs[2 * index + which].weight[:, :, 0, 0],
                student[f'backbone.{place}.{name}'][0],
            )
            for which, place in enumerate(
                ('student.backbone', 'assistant.extractor.backbone')
            )
        )
        target = teacher[f'backbone.{name}'][0]
        student_error += (target - own).square().mean()
        pair_error += (target - own - assistant).square().mean()
    # Of the last cut, as without the others.
    distiller.cuts = []
    last = loss(**feats)
    for key, error in (('student', student_error), ('pair', pair_error)):
        key = f'residual_kd_mse_{key}'
        torch.testing.assert_close(losses[key] - last[key], error.detach())


def test_cuts__gradients_reach_whom_they_are_for():
    model = with_cuts()
    pair, extras = model.student.backbone, model.distillers['distiller']
    losses = model(**random_images(), mode='loss')
    losses['loss_residual_kd_assistant'].backward(retain_graph=True)
    assert no_gradient(pair.student)
    # The last adapter starts at 0: what reaches the stages is the cuts'.
    first = pair.assistant.extractor.backbone.layer1
    assert all(g is not None for g in grads(first))
    assert not no_gradient(first)
    assert [no_gradient(conv) for conv in extras.cut_convs] == [
        True,
        False,
        True,
        False,
    ]
    model.zero_grad()
    losses['loss_residual_kd_student'].backward()
    assert no_gradient(pair.assistant)
    assert not no_gradient(pair.student.backbone.layer1)
    assert [no_gradient(conv) for conv in extras.cut_convs] == [
        False,
        True,
        False,
        True,
    ]


def test_cuts__rest_with_their_phase():
    model = with_cuts(phases=PHASES)
    model.train()
    convs = model.distillers['distiller'].cut_convs
    for step, moves in ((0, [True, False]), (2, [False, True])):
        MessageHub.get_current_instance().update_info('iter', step)
        model.zero_grad()
        losses = model(**random_images(), mode='loss')
        model.parse_losses(losses)[0].backward()
        assert [not no_gradient(conv) for conv in convs] == 2 * moves


def test_cuts__are_named_apart_where_the_models_differ():
    model = with_cuts(dict(student=['layer2'], teacher=['layer2']))
    assert model.distillers['distiller'].cuts == [
        (
            'backbone.student.backbone.layer2',
            'backbone.assistant.extractor.backbone.layer2',
            'backbone.layer2',
        )
    ]


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(cuts=dict(student=['layer1'])), 'lists of equal length'),
        (dict(cuts=['layer1'], assistant_weight=0.0), 'Give both a weight'),
        (
            dict(cuts=dict(student=['layer1'], teacher=['layer2'])),
            'Choose `cuts` of one stride',
        ),
    ],
)
def test_cuts__that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        with_cuts(**kwargs)


# -- phases -----------------------------------------------------------------


def test_phase_at__by_hand():
    # 0 1 | 2 3 4 | 5 ...
    names = [phase_at(PHASES, step) for step in range(7)]
    assert names == ['student'] * 2 + ['assistant'] * 3 + ['head'] * 2
    assert phase_at({'joint': None}, 10**6) == 'joint'


@pytest.mark.parametrize(
    ('step', 'moves'),
    [
        (0, {'student', 'distiller'}),
        (2, {'assistant'}),
        (5, {'head'}),
    ],
    ids=list(PHASES),
)
@pytest.mark.parametrize(
    'assistant', [FEATURE, IMAGE], ids=['feature', 'image']
)
def test_phase__moves_its_own_part_alone(assistant, step, moves):
    # The neck too, so that the student's adapter has something to learn.
    narrow = dict(
        backbone=dict(base_channels=4, stem_channels=4),
        neck=dict(out_channels=8),
    )
    model = build(phases=PHASES, assistant=assistant, student=narrow)
    assert list(model.student.backbone.adapter.parameters())
    wake(model)
    model.train()
    parts = dict(
        student=nn.ModuleList(
            [model.student.backbone.student, model.student.backbone.adapter]
        ),
        assistant=model.student.backbone.assistant,
        head=model.student.bbox_head,
        distiller=model.distillers,
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1
    )
    # Momentum from before, which must not carry on.
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * 1e-4
    optimizer.step()
    optimizer.zero_grad()
    before = {k: copy.deepcopy(m.state_dict()) for k, m in parts.items()}
    losses = losses_of(model, step=step, num=4)
    model.parse_losses(losses)[0].backward()
    optimizer.step()
    # Norm statistics too: a frozen norm keeps its own.
    moved = {
        name
        for name, module in parts.items()
        if any(
            not torch.equal(before[name][key], value)
            for key, value in module.state_dict().items()
        )
    }
    assert moved == moves
    assert ('loss_cls' in losses) == ('head' in moves)
    # The distiller has nothing to teach the head.
    assert ('loss_residual_kd_student' in losses) == ('head' not in moves)
    assert all(p.requires_grad for p in model.student.parameters())
    assert all(m.training for m in model.student.backbone.assistant.modules())


def train(config, coco, teacher_file, work_dir, **kwargs):
    """Eight iterations with a file after each; phase and losses by step."""
    cfg = run_config(
        config,
        coco,
        work_dir,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=8),
        val_cfg=None,
        val_dataloader=None,
        val_evaluator=None,
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)
        ),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.1)
        ),
        **kwargs,
    )
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    # Resuming restores the order of the data, not the state of augmentation.
    pipeline = cfg.train_dataloader.dataset.pipeline
    next(t for t in pipeline if t['type'] == 'RandomFlip')['prob'] = 0.0
    runner = Runner.from_cfg(Config(cfg))
    seen = {}
    step = type(runner.model).train_step

    def spy(model, data, optim_wrapper):
        logged = step(model, data, optim_wrapper)
        phase = model.distillers['distiller'].phase().name
        seen[model.step] = (phase, {k: float(v) for k, v in logged.items()})
        return logged

    runner.model.train_step = spy.__get__(runner.model)
    runner.train()
    return runner.model, seen


@pytest.fixture(scope='module')
def whole_run(coco, teacher_file, tmp_path_factory):
    torch.set_num_threads(1)
    config = distillation_config(
        dict(RKD, phases=PHASES), checkpoint=teacher_file
    )
    folder = tmp_path_factory.mktemp('whole')
    return config, folder, train(config, coco, teacher_file, folder)


# Files after one iteration of 'student', one of 'assistant', one of 'head'.
@pytest.mark.parametrize('iteration', [1, 3, 6])
def test_run__resumed_in_a_phase_ends_as_the_whole_one(
    whole_run, iteration, coco, teacher_file, tmp_path
):
    config, folder, whole = whole_run
    assert [phase for phase, _ in whole[1].values()] == [
        phase_at(PHASES, step) for step in range(8)
    ]
    file = folder / f'iter_{iteration}.pth'
    check_resumed(config, file, iteration, whole, coco, teacher_file, tmp_path)


def test_run__end_to_end_resumed_ends_as_the_whole_one(
    coco, teacher_file, tmp_path
):
    config = distillation_config(RKD, checkpoint=teacher_file)
    whole = train(config, coco, teacher_file, tmp_path / 'whole')
    for phase, logged in whole[1].values():
        assert phase == 'joint'
        assert {'loss_cls', 'loss_residual_kd_assistant'} < set(logged)
    check_resumed(
        config,
        tmp_path / 'whole/iter_3.pth',
        3,
        whole,
        coco,
        teacher_file,
        tmp_path / 'resumed',
    )


def check_resumed(config, file, iteration, whole, coco, teacher_file, folder):
    """Resume from a file; phases, losses, weights are the whole run's."""
    whole_model, expected = whole
    model, seen = train(
        copy.deepcopy(config),
        coco,
        teacher_file,
        folder,
        resume=True,
        load_from=str(file),
    )
    assert sorted(seen) == list(range(iteration, 8))
    for step, (phase, logged) in seen.items():
        assert phase == expected[step][0]
        assert logged == pytest.approx(expected[step][1], rel=1e-5)
    for mine, theirs in (
        (model, whole_model),
        (model.distillers, whole_model.distillers),
    ):
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[key], value)


def test_run__in_phases_brings_the_pair_nearer_to_the_teacher(whole_run):
    _, _, (_, seen) = whole_run
    first, last = seen[2][1], seen[4][1]
    # The student rests while the assistant learns; the batches differ.
    assert first['residual_kd_mse_pair'] == pytest.approx(
        first['residual_kd_mse_student']
    )
    assert last['residual_kd_mse_pair'] < last['residual_kd_mse_student']


def test_run__file_is_the_pairs_and_loads_into_the_host(whole_run):
    config, folder, (model, _) = whole_run
    state = torch.load(folder / 'iter_8.pth', weights_only=False)['state_dict']
    assert not any(key.startswith('teacher') for key in state)
    assert any(key.startswith('backbone.assistant') for key in state)
    assert extras_of(state)['distiller']['type'] == 'ResidualKDDistiller'
    found, scope = student_config_of(config)
    assert scope is None
    assert found == model.student_config
    host = MODELS.build(found).eval()
    host.load_state_dict(state, strict=True)
    model.eval()
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for first, second in zip(
            host(inputs, mode='tensor'),
            model(inputs, mode='tensor'),
            strict=True,
        ):
            assert all(
                torch.equal(x, y) for x, y in zip(first, second, strict=True)
            )


def test_export__writes_the_pair_as_a_host_model(whole_run, tmp_path):
    model, folder, (trained, _) = whole_run
    cfg = Config(dict(model=model, default_scope='mmdet'))
    out = export_student(
        cfg, str(folder / 'iter_8.pth'), str(tmp_path / 'pair')
    )
    assert out.needs_era_mm == ('model.backbone', 'model.backbone.assistant')
    exported = Config.fromfile(out.config)
    assert exported.custom_imports.imports == ['era_mm']
    host = MODELS.build(exported.model)
    state = torch.load(out.checkpoint, weights_only=False)['state_dict']
    host.load_state_dict(state, strict=True)
    for key, value in trained.state_dict().items():
        assert torch.equal(state[key], value), key


@ERA_MODELS.register_module(name='_MeanDistiller', force=True)
class MeanDistiller(BaseDistiller):
    """Another method that trains the student's features."""

    needs_teacher = False

    def loss(self, *, student_feats, teacher_feats, data_samples):
        feats = next(iter(student_feats.values()))
        return {'loss_mean': sum(f.square().mean() for f in feats)}


def test_phases__another_method_trains_the_student_and_rests_elsewhere():
    config = distillation_config(
        dict(
            residual=dict(RKD, student_weight=0, phases=PHASES),
            mean=dict(type='era_mm._MeanDistiller', source='backbone.adapter'),
        ),
        # Equal channels: without L_S nothing would train the connector.
        teacher=detector_config(width=16),
    )
    model = MODELS.build(config)
    model.train()
    wake(model)
    pair = model.student.backbone
    found = {}
    for step, phase in ((0, 'student'), (2, 'assistant'), (5, 'head')):
        model.zero_grad()
        losses = losses_of(model, step=step, num=4)
        model.parse_losses(losses)[0].backward()
        found[phase] = 'mean.loss_mean' in losses
        assert no_gradient(pair.student) == (phase != 'student')
        assert no_gradient(pair.assistant) == (phase != 'assistant')
    assert found == {'student': True, 'assistant': False, 'head': False}


@pytest.mark.parametrize(('step', 'phase'), [(0, 'student'), (2, 'assistant')])
def test_phase__that_trains_nothing_is_refused(step, phase):
    config = dict(RKD, phases=PHASES, student_weight=0, assistant_weight=0)
    teacher = detector_config(width=16)
    model = MODELS.build(distillation_config(config, teacher=teacher))
    model.train()
    with pytest.raises(RuntimeError, match=f"'{phase}' trains nothing"):
        losses_of(model, step=step)


# -- ERA --------------------------------------------------------------------


@pytest.mark.parametrize('channels', [24, 16], ids=['projected', 'equal'])
def test_feature_form__is_era_of_one_branch_without_head_reuse(channels):
    """align = adapter, branch = assistant, on the same weights.

    ERA's detached profile keeps the branch from the student, as Residual KD
    does, so the gradients agree as well.
    """
    # Pair and teacher have `channels`, the student 16.
    given = detector_config(channels=channels)
    teacher = detector_config(width=16, channels=channels)
    rkd = MODELS.build(
        distillation_config(
            dict(
                RKD,
                student=dict(neck=dict(out_channels=16)),
                assistant=dict(FEATURE, zero_init_last=False),
                norm_cfg=dict(type='BN'),
            ),
            student=given,
            teacher=teacher,
        )
    )
    # ERA's align layer is a convolution with bias and always there.
    pair = rkd.student.backbone
    pair.adapter = ResidualAdapter(
        [16, 16], [channels] * 2, norm_cfg=None, zero_init=True
    )
    for parameter in pair.adapter.parameters():
        nn.init.normal_(parameter)
    era = MODELS.build(
        distillation_config(
            dict(
                type='era_mm.ERADistiller',
                form='released',
                mbrnet=dict(num_branches=1, norm_cfg=dict(type='BN')),
                loss=dict(align_weight=1.0, residual_weight=1.0),
                twi_steps='none',
                detach=True,
            ),
            student=detector_config(channels=16),
            teacher=teacher,
        )
    )
    copy_layers(pair.adapter, era.distillers['distiller'].mbrnet.aligns)
    copy_layers(pair.assistant, era.distillers['distiller'].mbrnet.levels)
    maps = tuple(torch.randn(2, 16, s, s) for s in (8, 4))
    targets = tuple(torch.randn(2, channels, s, s) for s in (8, 4))
    found = []
    for distiller, names in (
        (rkd.distillers['distiller'], ('residual_kd', 'student', 'assistant')),
        (era.distillers['distiller'], ('era', 'align', 'residual')),
    ):
        distiller.train()
        feats = tuple(m.clone().requires_grad_() for m in maps)
        if names[0] == 'era':
            sources = {'neck': feats}
        else:
            sources = {
                'backbone.adapter': pair.adapter(feats),
                'backbone.assistant': pair.assistant(None, feats),
            }
        losses = distiller.loss(
            student_feats=sources,
            teacher_feats={'neck': targets},
            data_samples=[],
        )
        terms = [losses[f'loss_{names[0]}_{name}'] for name in names[1:]]
        sum(terms).backward()
        found.append((terms, [f.grad for f in feats]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    for own, theirs in (
        (pair.adapter, era.distillers['distiller'].mbrnet.aligns),
        (pair.assistant, era.distillers['distiller'].mbrnet.levels),
    ):
        torch.testing.assert_close(
            *[[p.grad for p in layers(m)] for m in (own, theirs)],
            rtol=1e-4,
            atol=1e-6,
        )


def layers(module):
    """Weights and biases of convolutions and norms, in order."""
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    found = [m for m in module.modules() if isinstance(m, kinds)]
    # ERA lists the layers of a branch before its norms.
    found.sort(key=lambda m: (kinds.index(type(m)), m.weight.shape[-1] == 1))
    return [p for m in found for p in m.parameters()]


def copy_layers(target, source):
    with torch.no_grad():
        for own, theirs in zip(layers(target), layers(source), strict=True):
            own.copy_(theirs)


# -- both hosts, many ranks -------------------------------------------------


def test_classifier__trains_in_the_image_form(tmp_path):
    teacher = classifier_config(width=16)
    file = save_teacher(teacher, tmp_path / 'teacher.pth', scope='mmpretrain')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        from mmpretrain.structures import DataSample

        model = MODELS.build(
            ConfigDict(
                type='era_mm.Distillation',
                student=classifier_config(),
                teacher=dict(config=teacher, checkpoint=file),
                distiller=dict(
                    RKD,
                    source='backbone',
                    student=dict(backbone=dict(base_channels=6)),
                    assistant=dict(
                        form='image',
                        backbone=dict(base_channels=4, stem_channels=4),
                    ),
                ),
            )
        )
        samples = [DataSample().set_gt_label(i % 3) for i in range(4)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        inputs = torch.randn(4, 3, 64, 64)
        model.train()
        values = []
        for _ in range(8):
            losses = model(inputs, samples, mode='loss')
            total, log_vars = model.parse_losses(losses)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            values.append({k: float(v) for k, v in log_vars.items()})
    assert 'loss' in values[0]
    # At first the assistant adds nothing.
    first, last = values[0], values[-1]
    assert first['residual_kd_mse_pair'] == first['residual_kd_mse_student']
    assert last['residual_kd_mse_student'] < first['residual_kd_mse_student']
    assert last['residual_kd_mse_pair'] < last['residual_kd_mse_student']


WORKER = Path(__file__).with_name('residual_kd_ddp_worker.py')


@pytest.fixture(scope='module')
def ranks(coco, teacher_file, tmp_path_factory):
    """What two ranks have: weights and losses, by the epoch they begin at."""
    out = tmp_path_factory.mktemp('rkd_ddp')
    run_ranks(WORKER, coco, teacher_file, str(out))
    return [
        {b: torch.load(out / f'from_{b}_rank{r}.pth') for b in (0, 2, 4)}
        for r in (0, 1)
    ]


def test_ddp__two_ranks_in_phases_end_with_the_same_weights(ranks):
    (first, _), (second, _) = (rank[0] for rank in ranks)
    assert any('assistant' in key for key in first)
    # What the assistant, then the head, learns on.
    for phase, name in (('assistant', 'student'), ('head', 'assistant')):
        assert any(
            key.startswith(f'{phase}.backbone')
            and f'{name}.' in key
            and key.endswith('running_mean')
            for key in first
        )
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


# Within 'assistant', and within 'joint'.
@pytest.mark.parametrize('epoch', [2, 4])
def test_ddp__two_ranks_resumed_in_a_phase_end_as_the_whole_run(ranks, epoch):
    for rank in ranks:
        (weights, steps), (resumed, again) = rank[0], rank[epoch]
        assert list(again) == list(range(2 * epoch, 10))
        for step, logged in again.items():
            assert logged == pytest.approx(steps[step], rel=1e-5), step
        for key, value in resumed.items():
            torch.testing.assert_close(value, weights[key])
    # Each rank has images of its own.
    assert ranks[0][0][1] != ranks[1][0][1]


# -- configs ----------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'size', 'expected'),
    [
        ('resnet34_resnet18_imagenet', 64, (0.883, 0.077, 0.967)),
        ('progressive_resnet34_resnet18_imagenet', 64, (0.883, 0.077, 0.967)),
        ('resnet56_resnet20_cifar100', 32, (0.88, 0.068, 0.954)),
        ('resnet18w16_resnet18w8_digit_crops', 32, (0.778, 0.168, 0.947)),
    ],
)
def test_config__pair_costs_less_than_the_given_model(name, size, expected):
    name = f'residual_kd_{name}'
    cfg = Config.fromfile(find_config(name))
    distiller = cfg.model.distiller
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        pair = pair_config(
            cfg.model.student,
            **{k: distiller[k] for k in ('source', 'student', 'assistant')},
        )
        given = FeatureExtractor(cfg.model.student.backbone)
        whole = measure(given, (size, size))[''].flops
        costs = measure_pair(pair, (size, size))
    # As the config's comment has it.
    shares = {k: round(c.flops / whole, 3) for k, c in costs.items()}
    keys = ('student', 'assistant', 'pair')
    assert shares == dict(zip(keys, expected, strict=True))
    assert ('phases' in distiller) == ('progressive' in name)


def test_progressive_config__gives_each_phase_its_own_cycle_of_rates():
    cfg = Config.fromfile(
        find_config('residual_kd_progressive_resnet34_resnet18_imagenet')
    )
    init_default_scope(cfg.default_scope)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = PARAM_SCHEDULERS.build(
        cfg.param_scheduler, default_args=dict(optimizer=optimizer)
    )
    rates = []
    for _ in range(cfg.train_cfg.max_epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    # 1281167 images in batches of 256 are 5005 iterations.
    student, assistant, head = cfg.model.distiller.phases.values()
    assert (student, assistant, head) == (50 * 5005, 20 * 5005, None)
    begins = [epoch for epoch, rate in enumerate(rates) if rate == 0.1]
    assert begins == [0, 50, 70]
    assert all(rates[epoch - 1] < 0.001 for epoch in (50, 70, 100))


@pytest.mark.parametrize(
    'name',
    [
        'resnet56_resnet20_cifar100',
        'resnet18w16_resnet18w8_digit_crops',
    ],
)
def test_classifiers_config__trains_two_steps(name):
    cfg = Config.fromfile(find_config(f'residual_kd_{name}'))
    cfg.model.teacher.checkpoint = 'random'
    if 'data_preprocessor' in cfg:
        cfg.model.data_preprocessor = cfg.data_preprocessor
    batch = random_images()
    batch['inputs'] = list((255 * torch.rand(4, 3, 32, 32)).byte())
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
        model.train()
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        for _ in range(2):
            losses = model.train_step(batch, wrapper)
    assert all(torch.as_tensor(v).isfinite() for v in losses.values())
    assert losses['residual_kd_mse_pair'] != losses['residual_kd_mse_student']


@pytest.mark.parametrize('student', ['r18w16', 'gfl_r18w16'])
def test_digits_config__trains_a_step_and_begins_with_an_idle_assistant(
    student,
):
    cfg = Config.fromfile(
        find_config(f'residual_kd_retinanet_r18w32_{student}_digits')
    )
    cfg.model.teacher.checkpoint = 'random'
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        first, second = (
            model.train_step(detection_batch(2, size=64), wrapper)
            for _ in range(2)
        )
    assert first['residual_kd_mse_pair'] == pytest.approx(
        float(first['residual_kd_mse_student'])
    )
    assert second['residual_kd_mse_pair'] != second['residual_kd_mse_student']


# -- errors -----------------------------------------------------------------


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(phases=dict(student=3)), 'the last one None'),
        (dict(phases=dict(studnet=3, head=None)), 'phases of'),
        (dict(phases=dict(student=0, head=None)), 'lengths in iterations'),
        (dict(source=['neck', 'backbone']), 'cuts at one source'),
        (dict(source='bbox_head'), r"behind one of \('backbone', 'neck'\)"),
        (dict(assistant=dict(form='images')), "but got 'images'"),
        (dict(assistant=dict(in_channels=3)), 'is inferred'),
        (dict(student=dict(head={})), r"changes \['head'\]"),
        (dict(student=dict(neck=dict(num_outs=3))), 'all but the channels'),
        (dict(student_weight=0), 'nothing trains the convolution'),
        (dict(cuts=['layer1']), 'the assistant needs stages of its own'),
        (
            dict(source=dict(student='neck', teacher='backbone.layer1')),
            "the teacher .* at 'backbone.layer1'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_pair__that_cannot_be_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_pair__of_a_model_without_neck_is_refused():
    given = classifier_config()
    del given['neck']
    with pytest.raises(ValueError, match=r"has no neck.*source='backbone'"):
        pair_config(given)


@pytest.mark.parametrize(
    'other',
    [
        dict(type='era_mm.ERADistiller'),
        dict(type='era_mm.FeatureImitationDistiller', source=['neck']),
    ],
    ids=['era', 'fitnet'],
)
@pytest.mark.parametrize('is_wrapped', [False, True])
def test_pair__says_where_the_neck_of_another_distiller_is(other, is_wrapped):
    """What reads the given model's neck is told the pair's name for it."""
    residual = dict(RKD)
    if is_wrapped:
        residual = dict(type='era_mm.SoKDDistiller', base=residual, dam=False)
    config = dict(other=other, residual=residual)
    message = r"'other' .* reads 'neck' .* source=dict\(student='backbone', "
    with pytest.raises(ValueError, match=message):
        MODELS.build(distillation_config(config))
    # And with the source that it names, both learn.
    source = dict(student='backbone', teacher='neck')
    config['other'] = dict(other, source=source)
    losses = losses_of(MODELS.build(distillation_config(config)))
    found = {key.partition('.')[0] for key in losses}
    assert {'other', 'residual'} <= found


def test_pair__of_a_pair_is_refused():
    config = pair_config(detector_config())
    with pytest.raises(ValueError, match='a pair already'):
        pair_config(config)


def test_pair__is_registered():
    assert MODELS.get('era_mm.ResidualPair') is ResidualPair
