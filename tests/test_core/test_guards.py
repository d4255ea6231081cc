"""What would train nothing is found out."""

import copy

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from era_mm.core.guards import GradientWatch, check_graph, learns
from era_mm.testing import (
    detection_batch,
    detector_config,
    distillation_config,
)


def test_learns__where_any_part_has_a_gradient():
    leaf = torch.ones(1, requires_grad=True)
    assert learns(leaf * 2)
    assert learns([leaf.detach(), leaf])
    assert not learns(leaf.detach())
    assert not learns(())


def test_graph__a_source_needs_one_level_with_a_gradient():
    leaf = torch.ones(1, requires_grad=True)
    check_graph({'a': (leaf.detach(), leaf * 2)})
    with pytest.raises(RuntimeError, match="'b' has no gradient"):
        check_graph({'a': (leaf,), 'b': (leaf.detach(),)})


def test_watch__names_what_the_first_step_did_not_reach():
    extras = nn.ModuleDict(
        dict(used=nn.Linear(1, 1, bias=False), idle=nn.Linear(1, 1))
    )
    extras['idle'].bias.requires_grad_(False)
    watch = GradientWatch(extras)
    watch.check()
    extras['used'](torch.ones(1)).sum().backward()
    with pytest.raises(
        RuntimeError,
        match=r'^1 trainable extras .*: distillers.idle.weight\. ',
    ):
        watch.check()
    # Only once, and nothing listens any more.
    watch.check()
    assert not extras['used'].weight._backward_hooks


def test_watch__is_shared_by_copies_as_the_extras_are():
    watch = GradientWatch(nn.Linear(1, 1))
    assert copy.deepcopy(watch) is watch


ERA = dict(type='era_mm.ERADistiller')


def test_source__in_a_frozen_stage_is_refused():
    student = detector_config()
    student['backbone'] |= dict(frozen_stages=1)
    config = distillation_config(
        dict(ERA, source='backbone.layer1', twi_steps='none'), student=student
    )
    model = MODELS.build(config)
    # mmdet freezes in train().
    model.train()
    data = model.data_preprocessor(detection_batch(), True)
    with pytest.raises(RuntimeError, match='has no gradient'):
        model(**data, mode='loss')


def test_gradients__are_not_missed_where_none_are_computed():
    model = MODELS.build(distillation_config(ERA))
    data = model.data_preprocessor(detection_batch(), True)
    with torch.no_grad():
        for _ in range(3):
            model(**data, mode='loss')
