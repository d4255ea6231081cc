"""A run whose losses are no numbers names them and stops."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.structures import BaseDataElement

from era_mm.engine.finite_hook import FiniteHook
from era_mm.errors import UserError

NAN = float('nan')


def runner_at(iteration, **wrapper):
    return SimpleNamespace(
        iter=iteration, optim_wrapper=SimpleNamespace(**wrapper)
    )


def batch_of(*names):
    return dict(
        data_samples=[
            BaseDataElement(metainfo=dict(img_path=name)) for name in names
        ]
    )


def feed(hook, iteration, images=('a.png',), runner=None, **terms):
    outputs = {name: torch.tensor(value) for name, value in terms.items()}
    hook.after_train_iter(
        runner or runner_at(iteration), 0, batch_of(*images), outputs
    )


def test_hook__names_term_iteration_and_images_of_the_first_bad_step():
    hook = FiniteHook(interval=4)
    feed(hook, 0, loss=1.0, loss_cls=1.0)
    feed(hook, 1, ('x.png', 'y.png'), loss=NAN, loss_cls=1.5, loss_era=NAN)
    feed(hook, 2, loss=NAN, loss_cls=NAN, loss_era=NAN)
    with pytest.raises(UserError) as caught:
        feed(hook, 3, loss=NAN, loss_cls=NAN)
    text = str(caught.value)
    assert 'in iteration 2 loss_era is nan (other terms: loss_cls 1.5)' in text
    assert 'x.png' in text
    assert 'y.png' in text
    assert 'a.png' not in text


def test_hook__reads_once_in_an_interval_and_before_a_file():
    hook = FiniteHook(interval=100)
    feed(hook, 0, loss=float('inf'))
    with pytest.raises(UserError, match='iteration 1 loss is inf'):
        hook.before_save_checkpoint(runner_at(0), {})
    # Told once.
    hook.after_train(runner_at(0))


def test_hook__leaves_finite_losses_and_other_quantities_alone():
    hook = FiniteHook(interval=1)
    feed(hook, 0, loss=1.0, loss_a=0.0, share_explained=NAN)
    hook.after_train_iter(runner_at(1), 0, None, {'loss': 3.0})
    hook.after_train(runner_at(1))


def test_hook__lets_loss_scaling_leave_steps_out():
    hook = FiniteHook(interval=2)
    amp = runner_at(0, loss_scaler=None)
    feed(hook, 0, loss=NAN, runner=amp)
    feed(hook, 1, loss=1.0, runner=amp)
    feed(hook, 2, loss=NAN, runner=amp)
    with pytest.raises(UserError, match='no longer finite'):
        feed(hook, 3, loss=NAN, runner=amp)
