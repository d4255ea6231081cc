"""Small helpers of the core."""

import copy
import logging
import random

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from torch import nn

from era_mm.core import utils
from era_mm.core.utils import (
    Unregistered,
    errors_only,
    evaluating,
    preserve_rng,
    random_state,
    take_step,
    to_cpu,
)


def test_random_state__can_be_given_again_and_again():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    restore = random_state()
    first, second = draw(), draw()
    assert first != second
    for _ in range(2):
        restore()
        assert [draw(), draw()] == [first, second]


def test_preserve_rng__gives_every_generator_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    with preserve_rng():
        draw()
    assert draw() == expected


def test_evaluating__puts_every_module_back_as_it_was():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1)).train()
    model[1].eval()
    seen = []

    def fail():
        with evaluating(model):
            seen.extend(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [False] * 3
    assert [module.training for module in model.modules()] == [
        True,
        True,
        False,
    ]


def test_errors_only__hides_warnings_inside_its_block(monkeypatch):
    logger = MMLogger.get_current_instance()
    handler, heard = logging.Handler(), []
    handler.emit = lambda record: heard.append(record.getMessage())
    monkeypatch.setattr(logger, 'handlers', [handler])
    with errors_only():
        logger.warning('hidden')
        logger.error('error')
    logger.warning('after')
    assert heard == ['error', 'after']


def test_take_step__averages_the_gradients_over_the_ranks(monkeypatch):
    # Two ranks with gradients 2 and 4: a step of 0.1 * 3.
    monkeypatch.setattr(utils, 'all_reduce', lambda g: g.add_(4))
    monkeypatch.setattr(utils, 'get_world_size', lambda: 2)
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    take_step(optimizer, [weight], [torch.tensor([2.0])])
    assert weight.item() == pytest.approx(0.7)
    assert weight.grad is None


def test_unregistered__is_hidden_and_shared_by_copies():
    owner = nn.Module()
    owner.hidden = Unregistered(nn.Linear(1, 1))
    assert not list(owner.parameters())
    assert not owner.state_dict()
    assert copy.deepcopy(owner).hidden.module is owner.hidden.module


def test_to_cpu__copies_what_is_nested():
    value = {'a': [torch.ones(1, requires_grad=True)], 'b': (1, {'c': 2})}
    found = to_cpu(value)
    assert found['b'] == (1, {'c': 2})
    assert found['b'][1] is not value['b'][1]
    assert not found['a'][0].requires_grad
    assert torch.equal(found['a'][0], value['a'][0])
