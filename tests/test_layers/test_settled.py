"""Losses whose gradients are computed at once."""

import functools
import gc
import weakref

import pytest
import torch
from mmengine.utils import digit_version
from torch.utils.checkpoint import checkpoint

from era_mm.layers import settled
from era_mm.testing import noise


def two_losses(tensors):
    first, second = tensors
    return dict(a=(first**3).sum(), b=(first * second).sum())


def test_settled__has_the_values_and_gradients_by_hand():
    # a = x^3, b = x * y at x = 2, y = 5:
    # d(3a + 7b) / dx = 3 * 12 + 7 * 5 = 71,  / dy = 7 * 2 = 14
    x, y = (torch.tensor([v], requires_grad=True) for v in (2.0, 5.0))
    found = settled(two_losses, [x, y])
    assert [found[key].item() for key in ('a', 'b')] == [8, 10]
    (3 * found['a'] + 7 * found['b']).backward()
    assert (x.grad.item(), y.grad.item()) == (71, 14)


def test_settled__is_the_loss_behind_other_layers():
    weight = noise(4, 4).requires_grad_()
    inputs = noise(3, 4, seed=1)

    def gradient(of):
        maps = [inputs @ weight, (inputs @ weight).tanh()]
        losses = of(maps)
        (losses['a'] - 2 * losses['b']).backward()
        found, weight.grad = weight.grad, None
        return found

    torch.testing.assert_close(
        gradient(lambda maps: settled(two_losses, maps)),
        gradient(two_losses),
        rtol=1e-12,
        atol=1e-12,
    )


def test_settled__input_without_graph_gets_no_gradient():
    x = torch.tensor([2.0], requires_grad=True)
    found = settled(two_losses, [x, torch.tensor([5.0])])
    (found['a'] + found['b']).backward()
    assert x.grad.item() == 12 + 5
    constants = [torch.tensor([2.0]), torch.tensor([5.0])]
    assert not settled(two_losses, constants)['a'].requires_grad


def test_settled__loss_that_depends_on_nothing_stays_a_constant():
    x = torch.tensor([2.0], requires_grad=True)
    found = settled(lambda t: dict(a=t[0].sum(), b=torch.ones(())), [x])
    assert found['a'].requires_grad
    assert not found['b'].requires_grad


@pytest.mark.parametrize('settles', [True, False])
def test_settled__keeps_nothing_in_between(settles):
    kept = []

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            kept.append(weakref.ref(self))

    def losses(tensors):
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(Saved, lambda saved: saved.tensor):
            return dict(a=tensors[0].exp().sum())

    x = noise(3).requires_grad_()
    found = settled(losses, [x]) if settles else losses([x])
    gc.collect()
    (saved,) = kept
    assert (saved() is None) is settles
    assert found['a'].requires_grad


@pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.4'),
    reason='torch before 2.4 has no autocast to float16 on a CPU',
)
def test_settled__in_float16_the_scale_of_the_loss_comes_first():
    # 1e-9 is 0 in float16; times the scale it is not.
    x = torch.ones(8, 8, requires_grad=True)
    layer = torch.full((8, 8), 0.5)

    def losses(tensors):
        return dict(a=(tensors[0] @ layer).float().sum() * 1e-9)

    with torch.autocast('cpu', dtype=torch.float16):
        loss = settled(losses, [x])['a']
    (loss * 2.0**20).backward()
    torch.testing.assert_close(
        x.grad / 2.0**20, torch.full((8, 8), 4e-9), rtol=1e-2, atol=0
    )


def test_settled__in_bfloat16_is_settled():
    with torch.autocast('cpu', dtype=torch.bfloat16):
        x = torch.ones(8, 8, requires_grad=True)
        loss = settled(lambda t: dict(a=(t[0] @ t[0]).sum()), [x])['a']
    assert type(loss.grad_fn).__name__ == '_SettledBackward'


def test_settled__second_derivatives_count_as_zero():
    # x^3 + x^2 at 2: 16, then 2 of the second alone.
    x = torch.tensor([2.0], requires_grad=True)
    loss = settled(lambda t: dict(a=(t[0] ** 3).sum()), [x])['a']
    total = loss + (x**2).sum()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    assert gradient.item() == 16
    assert torch.autograd.grad(gradient, x)[0].item() == 2


def test_settled__first_layer_may_work_in_place():
    x = torch.tensor([2.0, -1.0], requires_grad=True)
    before = x * 1
    loss = settled(lambda t: dict(a=(3 * t[0].relu_()).sum()), [before])['a']
    loss.backward()
    assert x.grad.tolist() == [3, 0]
    assert before.tolist() == [2, -1]


@pytest.mark.parametrize('reentrant', [True, False])
def test_settled__parts_may_be_checkpointed(reentrant):
    def losses(tensors):
        found = checkpoint(
            lambda t: t.exp() ** 2, tensors[0], use_reentrant=reentrant
        )
        return dict(a=found.sum(), b=found.mean())

    gradients = []
    for of in (losses, functools.partial(settled, losses)):
        x = noise(3).requires_grad_()
        found = of([x])
        (found['a'] + found['b']).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_settled__backward_pass_is_not_under_autocast():
    # A part in full precision has its gradient in full precision.
    weight = noise(16, 16).float()

    def losses(tensors):
        with torch.autocast('cpu', enabled=False):
            return dict(a=(tensors[0] @ weight).square().sum())

    gradients = []
    for of in (losses, functools.partial(settled, losses)):
        x = noise(4, 16, seed=1).float().requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            found = of([x])
        found['a'].backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
