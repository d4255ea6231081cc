"""ERA's losses before the student's head runs: the same, in less memory."""

import copy

import pytest
import torch

from era_mm.engine.peak_memory import peak_of
from era_mm.methods.era import ERADistiller
from era_mm.testing import (
    detection_batch,
    detector_config,
    era_model,
    give_opinions,
    two_stage_config,
)

LATE = property(lambda self: ())


def build(head='RetinaHead', **kwargs):
    models = dict(
        student=detector_config(head=head), teacher=detector_config(head=head)
    )
    model = era_model(**models, **kwargs).double()
    model.init_weights()
    give_opinions(model.teachers['teacher'].model.bbox_head)
    era = model.distillers['distiller']
    # As after some steps: estimates count, and branches are not zero.
    era.explained.fill_(0.5)
    with torch.no_grad():
        for parameter in era.mbrnet.parameters():
            parameter.add_(0.1)
    return model


def step_of(model, size=64):
    """Losses and gradients of a training step."""
    data = model.data_preprocessor(detection_batch(4, size=size), True)
    data['inputs'] = data['inputs'].to(next(model.student.parameters()).dtype)
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


@pytest.mark.parametrize(
    ('head', 'kwargs'),
    [
        ('RetinaHead', dict()),
        ('RetinaHead', dict(twi_steps='all')),
        ('RetinaHead', dict(twi_steps='all', detach=True)),
        ('RetinaHead', dict(twi_place='predictors')),
        ('FCOSHead', dict()),
        ('GFLHead', dict(twi_steps='last')),
    ],
)
def test_early__is_the_step_that_waits_for_the_head(monkeypatch, head, kwargs):
    model = build(head, **kwargs)
    assert model.distillers['distiller'].early_sources
    other = copy.deepcopy(model)
    # The copy shares the distillers, with what they measure.
    other.distillers = copy.deepcopy(model.distillers)
    other.wiring._distillers = other.distillers
    losses, gradients = step_of(model)
    monkeypatch.setattr(ERADistiller, 'early_sources', LATE)
    expected, reference = step_of(other)
    assert list(losses) == list(expected)
    for key, value in expected.items():
        value = sum(value) if isinstance(value, list) else value
        found = losses[key]
        found = sum(found) if isinstance(found, list) else found
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)
    assert losses['loss_era_twi_logit'] > 0
    for key, value in reference.items():
        if value is None:
            assert gradients[key] is None, key
        else:
            torch.testing.assert_close(
                gradients[key], value, rtol=1e-8, atol=1e-12
            )


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
    monkeypatch.setattr(ERADistiller, 'early_sources', LATE)
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
        dict(student=two_stage_config(), teacher=two_stage_config()),
    ],
)
def test_early__is_for_dense_heads_that_judge_by_their_outputs(options):
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
    plain = build()
    halved = build(
        schedules={
            'loss_era_twi_*': dict(scale=0.0),
            'loss_era_align': dict(scale=0.0),
            'loss_era_residual': dict(scale=0.0),
            'loss_era_logit': dict(scale=0.0),
            'loss_era_box': dict(scale=0.0),
        }
    )
    losses, _ = step_of(plain)
    none, gradients = step_of(halved)
    assert losses['loss_era_twi_logit'] > 0
    assert none['loss_era_twi_logit'] == 0
    extras = [v for k, v in gradients.items() if k.startswith('extras.')]
    assert all(v is None or not v.any() for v in extras)
