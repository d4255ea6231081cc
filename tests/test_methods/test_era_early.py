"""ERA's losses before the student's head runs: the same, in less memory."""

import copy

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.engine.peak_memory import peak_of
from era_mm.methods.era import ERADistiller
from era_mm.testing import (
    detection_batch,
    detector_config,
    distillation_config,
    era_model,
    give_opinions,
    two_stage_config,
)

NEVER = property(lambda self: False)


def build(head='RetinaHead', student=None, teacher=None, **kwargs):
    model = era_model(
        student=detector_config(head=head, **(student or {})),
        teacher=detector_config(head=head, **(teacher or {})),
        **kwargs,
    ).double()
    return seasoned(model)


def seasoned(model):
    """As after some steps: estimates count, and branches are not zero."""
    model.init_weights()
    give_opinions(model.teachers['teacher'].model.bbox_head)
    for era in model.distillers.values():
        era.explained.fill_(0.5)
        with torch.no_grad():
            for parameter in era.mbrnet.parameters():
                parameter.add_(0.1)
    return model


def step_of(model, size=64):
    """Losses and gradients of a training step."""
    data = model.data_preprocessor(detection_batch(4, size=size), True)
    for key in ('inputs', 'teacher_inputs'):
        if isinstance(data.get(key), torch.Tensor):
            data[key] = data[key].to(next(model.student.parameters()).dtype)
        elif data.get(key):
            data[key] = {k: v.double() for k, v in data[key].items()}
    losses = model(**data, mode='loss')
    total, _ = model.parse_losses(losses)
    total.backward()
    modules = dict(student=model.student, extras=model.distillers)
    gradients = {
        f'{owner}.{name}': parameter.grad
        for owner, module in modules.items()
        for name, parameter in module.named_parameters()
    }
    return losses, gradients


def copy_of(model):
    """A copy with distillers of its own; copies share them otherwise."""
    other = copy.deepcopy(model)
    other.distillers = copy.deepcopy(model.distillers)
    other.wiring._distillers = other.distillers
    return other


def check_alike(model, monkeypatch, size=64):
    """A step is the one in which TWI waits for the backward pass."""
    assert all(era.early_sources for era in model.distillers.values())
    other = copy_of(model)
    losses, gradients = step_of(model, size)
    monkeypatch.setattr(ERADistiller, '_settles', NEVER)
    expected, reference = step_of(other, size)
    assert list(losses) == list(expected)
    for key, value in expected.items():
        found = losses[key]
        if isinstance(value, list):
            value, found = sum(value), sum(found)
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)
    judged = [key for key in losses if key.endswith('era_twi_logit')]
    assert judged
    assert all(losses[key] > 0 for key in judged)
    for key, value in reference.items():
        if value is None:
            assert gradients[key] is None, key
        else:
            torch.testing.assert_close(
                gradients[key], value, rtol=1e-8, atol=1e-12
            )
    for own, theirs in zip(
        model.distillers.buffers(), other.distillers.buffers(), strict=True
    ):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ('head', 'kwargs'),
    [
        ('RetinaHead', dict()),
        ('RetinaHead', dict(twi_steps='last', detach=True)),
        ('FCOSHead', dict()),
        ('GFLHead', dict(twi_steps='last')),
    ],
)
def test_early__is_the_step_that_waits(monkeypatch, head, kwargs):
    check_alike(build(head, **kwargs), monkeypatch)


def test_early__maps_are_cropped_where_padding_differs(monkeypatch):
    padded = detector_config()['data_preprocessor'] | dict(pad_size_divisor=64)
    model = build(teacher=dict(data_preprocessor=padded))
    check_alike(model, monkeypatch, size=96)


def test_early__two_of_them_in_one_model(monkeypatch):
    config = distillation_config({})
    config['distiller'] = {
        name: dict(type='era_mm.ERADistiller', twi_steps='last')
        for name in ('a', 'b')
    }
    check_alike(seasoned(MODELS.build(config).double()), monkeypatch)


def test_early__teachers_judgement_reaches_every_level():
    model = build(
        twi_steps='last',
        schedules={
            f'loss_era_{term}': dict(scale=0.0)
            for term in ('align', 'residual', 'logit', 'box')
        },
    )
    feats = []
    model.student.neck.register_forward_hook(
        lambda module, args, outputs: feats.extend(outputs)
    )
    data = model.data_preprocessor(detection_batch(4), True)
    losses = model(data['inputs'].double(), data['data_samples'], mode='loss')
    judged = sum(v for k, v in losses.items() if 'loss_era' in k)
    gradients = torch.autograd.grad(judged, feats)
    assert len(gradients) == 2
    assert all(gradient.any() for gradient in gradients)


def test_early__frozen_student_is_left_to_the_check():
    model = build()
    for module in (model.student.backbone, model.student.neck):
        module.requires_grad_(False)
    with pytest.raises(RuntimeError, match="'neck' has no gradient"):
        step_of(model)
    assert not int(
        model.distillers['distiller'].mbrnet.space.first_batches.seen
    )


def test_early__half_of_a_failed_step_is_dropped_by_the_next():
    model = build()
    era = model.distillers['distiller']

    def fail(*_):
        raise ArithmeticError

    model.student.bbox_head.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        step_of(model)
    assert era._said is not None
    era.begin_step(1)
    assert era._said is None


def test_early__has_judged_before_the_head_runs():
    model = build()
    era = model.distillers['distiller']
    seen = []
    model.student.bbox_head.register_forward_pre_hook(
        lambda *_: seen.append(era._said is not None)
    )
    losses, _ = step_of(model)
    assert seen == [True]
    # Their gradients are known, so the head's graph is free.
    for name in ('logit', 'box'):
        made = losses[f'loss_era_twi_{name}'].grad_fn
        assert type(made).__name__ == '_SettledBackward'
    # And it holds nothing between steps.
    assert era._said is None


def test_early__peak_memory_is_lower(monkeypatch):
    model = build().float()
    step_of(model, size=256)
    device = torch.device('cpu')
    early = peak_of(lambda: step_of(model, size=256), device)
    monkeypatch.setattr(ERADistiller, '_settles', NEVER)
    late = peak_of(lambda: step_of(model, size=256), device)
    # The maps of the teacher's two towers, float32, of 4 images: a level of
    # 32 x 32 and one of 16 x 16.
    head = model.teachers['teacher'].model.bbox_head
    maps = 2 * head.stacked_convs * head.feat_channels
    assert late - early > 4 * 4 * maps * (32**2 + 16**2) / 2


@pytest.mark.parametrize(
    'options',
    [
        dict(twi_targets='labels'),
        dict(twi_steps='none'),
        dict(twi_steps='all'),
        dict(twi_place='predictors'),
        dict(student=two_stage_config(), teacher=two_stage_config()),
    ],
)
def test_early__is_for_one_estimate_by_a_whole_dense_head(options):
    assert not era_model(**options).distillers['distiller'].early_sources


def test_early__is_left_out_without_gradients():
    model = build()
    called = []
    era = model.distillers['distiller']
    era.early_loss = lambda **_: called.append(1)
    data = model.data_preprocessor(detection_batch(4), True)
    data['inputs'] = data['inputs'].double()
    with torch.no_grad():
        losses = model(**data, mode='loss')
    assert not called
    assert 'loss_era_twi_logit' in losses


def test_early__schedule_counts_for_values_and_gradients():
    plain, none = (
        build(
            twi_steps='last',
            schedules={
                f'loss_era_{term}': dict(scale=scale)
                for term in ('twi_*', 'align', 'residual', 'logit', 'box')
            },
        )
        for scale in (1.0, 0.0)
    )
    assert step_of(plain)[0]['loss_era_twi_logit'] > 0
    losses, gradients = step_of(none)
    assert losses['loss_era_twi_logit'] == 0
    extras = [v for k, v in gradients.items() if k.startswith('extras.')]
    assert all(v is None or not v.any() for v in extras)
