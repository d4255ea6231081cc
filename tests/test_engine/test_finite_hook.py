"""A run whose losses are no numbers names them, and stops or skips."""

import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.structures import BaseDataElement
from torch import nn

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


class NormWithCeiling(nn.BatchNorm1d):
    """Its ``ceiling`` is infinite on purpose."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.register_buffer('ceiling', torch.tensor(float('inf')))


def test_hook__writes_no_file_with_statistics_that_overflowed():
    model = nn.Sequential(NormWithCeiling(2), nn.Linear(2, 1))
    runner = runner_at(7)
    runner.model = model
    hook = FiniteHook()
    hook.before_train(runner)
    model(torch.randn(4, 2))
    hook.before_save_checkpoint(runner, dict(state_dict=model.state_dict()))
    # The variance overflows; the output is 0.
    assert model(1e25 * torch.randn(4, 2)).isfinite().all()
    with pytest.raises(UserError) as caught:
        hook.before_save_checkpoint(
            runner, dict(state_dict=model.state_dict())
        )
    assert (
        'after iteration 7 weights are not finite, though the losses were '
        '(1): 0.running_var. No checkpoint is written.'
    ) in str(caught.value)


def test_hook__knows_what_was_infinite_inside_a_wrapper_for_ranks():
    model = nn.Sequential()
    model.module = nn.Sequential(NormWithCeiling(2))
    runner = runner_at(1)
    runner.model = model
    hook = FiniteHook()
    hook.before_train(runner)
    saved = model.module.state_dict()
    assert not saved['0.ceiling'].isfinite()
    hook.before_save_checkpoint(runner, dict(state_dict=saved))
    saved['0.weight'] = saved['0.weight'] * NAN
    with pytest.raises(UserError, match=r'\(1\): 0\.weight\.'):
        hook.before_save_checkpoint(runner, dict(state_dict=saved))


# -- skipping ----------------------------------------------------------------


class ScaledWrapper(OptimWrapper):
    """As mmengine's AmpOptimWrapper, which refuses a machine without GPU."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=2.0)

    def scale_loss(self, loss):
        return self.loss_scaler.scale(super().scale_loss(loss))

    def step(self, **kwargs):
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer)
        self.loss_scaler.update()


def train_on(
    batches, hook, wrapper=OptimWrapper, optimizer=None, said=None, **options
):
    """Steps as mmengine's loop takes them; what is left in the end."""
    said = [] if said is None else said
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = optimizer or torch.optim.SGD
    arguments = dict(momentum=0.9) if optimizer is torch.optim.SGD else {}
    wrapped = wrapper(
        optimizer(model.parameters(), lr=0.1, weight_decay=0.1, **arguments),
        **options,
    )
    runner = SimpleNamespace(
        model=model,
        optim_wrapper=wrapped,
        message_hub=MessageHub(f'finite{id(model)}'),
        logger=SimpleNamespace(warning=said.append),
    )
    hook.before_train(runner)
    for runner.iter, batch in enumerate(batches):
        hook.before_train_iter(runner, 0)
        loss = model(batch).square().mean()
        wrapped.update_params(loss)
        hook.after_train_iter(runner, 0, batch_of('a.png'), dict(loss=loss))
    runner.iter = len(batches)
    hook.after_train(runner)
    return copy.deepcopy(
        [model.state_dict(), wrapped.optimizer.state_dict()['state']]
    ), runner


def batch(seed, bad=False):
    found = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    if bad:
        found[2, 1] = NAN
    return found


def assert_same(one, other):
    flat, expected = (
        torch.utils._pytree.tree_flatten(part)[0] for part in (one, other)
    )
    assert len(flat) == len(expected)
    for value, wanted in zip(flat, expected, strict=True):
        assert (
            torch.equal(value, wanted)
            if torch.is_tensor(value)
            else (value == wanted)
        )


@pytest.mark.parametrize('optimizer', [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize('wrapper', [OptimWrapper, ScaledWrapper])
@pytest.mark.parametrize('clip', [None, dict(max_norm=1.0)])
def test_skip__leaves_everything_as_if_the_batch_had_not_been(
    optimizer, wrapper, clip
):
    if wrapper is ScaledWrapper and not hasattr(torch.amp, 'GradScaler'):
        pytest.skip('torch before 2.3 scales losses on a GPU alone')
    good = [batch(0), batch(1), batch(2)]
    options = dict(wrapper=wrapper, optimizer=optimizer, clip_grad=clip)
    plain, _ = train_on(good, FiniteHook(), **options)
    said = []
    skipped, runner = train_on(
        [batch(0), batch(9, bad=True), batch(1), batch(2)],
        FiniteHook(interval=2, action='skip'),
        said=said,
        **options,
    )
    if wrapper is ScaledWrapper:
        # The scale is halved; 2 and 1 are both exact.
        assert runner.optim_wrapper.loss_scaler.get_scale() == 1.0
    assert_same(skipped, plain)
    assert runner.message_hub.get_info('era_mm_left_out') == 1
    assert 'in iteration 2 loss is nan' in said[0]
    assert 'a.png' in said[0]
    assert '1 of 4 steps were left out' in said[1]


def test_skip__leaves_out_all_batches_of_an_accumulated_step():
    options = dict(accumulative_counts=2)
    plain, _ = train_on([batch(1), batch(2)], FiniteHook(), **options)
    skipped, runner = train_on(
        [batch(8, bad=True), batch(0), batch(1), batch(2)],
        FiniteHook(interval=1, action='skip'),
        **options,
    )
    assert_same(skipped, plain)
    assert runner.message_hub.get_info('era_mm_left_out') == 1


def test_skip__stops_after_too_many_in_a_row():
    bad, good = batch(1, bad=True), batch(2)
    hook = FiniteHook(action='skip', max_skipped=2)
    _, runner = train_on([bad, good, bad, good, bad], hook)
    assert runner.message_hub.get_info('era_mm_left_out') == 3
    hook = FiniteHook(action='skip', max_skipped=2)
    with pytest.raises(UserError, match='2 steps in a row were left out'):
        train_on([good, bad, bad, good], hook)


def test_skip__stops_where_only_the_loss_is_no_number():
    """Its gradients are, so leaving the step out would not help."""
    hook = FiniteHook(interval=1, action='skip')
    with pytest.raises(UserError, match='no longer finite'):
        feed(
            hook,
            0,
            runner=SimpleNamespace(iter=0, optim_wrapper=SimpleNamespace()),
            loss=NAN,
        )


def test_hook__refuses_another_action():
    with pytest.raises(ValueError, match='action'):
        FiniteHook(action='ignore')
    with pytest.raises(ValueError, match='max_skipped'):
        FiniteHook(max_skipped=0)
