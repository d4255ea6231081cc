"""From configs to students, teachers and distillers."""

import pytest
import torch
from mmengine.config import Config

from era_mm.core import Distillation, distillation_kind
from era_mm.core.build import (
    as_named_configs,
    build_distillers,
    build_student,
)
from era_mm.core.host_models import whole_model
from era_mm.testing import detector_config


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [
        ('era_mm.Distillation', 'Distillation'),
        ('MutualDistillation', 'MutualDistillation'),
        (Distillation, 'Distillation'),
        ('mmdet.RetinaNet', None),
        (None, None),
    ],
)
def test_kind__of_a_models_config(kind, expected):
    assert distillation_kind(dict(type=kind)) == expected


def test_named_configs__of_one_have_the_role_as_name():
    one = dict(type='A', width=3)
    assert as_named_configs(one, 'distiller', 'type') == {'distiller': one}
    two = dict(a=one, b=one)
    assert as_named_configs(two, 'distiller', 'type') == two
    assert as_named_configs(None, 'distiller', 'type') == {}


@pytest.mark.parametrize(
    ('value', 'error', 'message'),
    [
        ([dict(type='A')], TypeError, r'`distiller` must be a dict'),
        (dict(a=dict(kind='A')), ValueError, "'a' must be a dict with 'type'"),
        (dict(a=3), ValueError, "'a' must be a dict with 'type', but got 3"),
        (dict(my_loss=dict(type='A')), ValueError, 'must not be named'),
    ],
)
def test_named_configs__that_are_none_are_refused(value, error, message):
    with pytest.raises(error, match=message):
        as_named_configs(value, 'distiller', 'type')


def test_distillers__that_are_none_are_refused():
    with pytest.raises(TypeError, match="'a' must be a BaseDistiller"):
        build_distillers(
            dict(a=dict(type='Linear', in_features=1, out_features=1))
        )


def test_student__draws_what_the_plain_model_does():
    torch.manual_seed(3)
    distillers = build_distillers(dict(type='era_mm.ERADistiller'))
    built = build_student(detector_config(), None, distillers)
    after = torch.rand(1)
    torch.manual_seed(3)
    plain = build_student(detector_config(), None, {})
    assert torch.equal(torch.rand(1), after)
    for key, value in plain.module.state_dict().items():
        assert torch.equal(built.module.state_dict()[key], value), key
    assert built.config == plain.config


def test_whole_model__has_the_preprocessor_that_lies_beside_it():
    cfg = Config(
        dict(
            model=dict(type='A'),
            data_preprocessor=dict(type='Pre', mean=[1.0]),
        )
    )
    assert whole_model(cfg) == dict(
        type='A', data_preprocessor=dict(type='Pre', mean=[1.0])
    )
    assert 'data_preprocessor' not in cfg.model
    cfg.model.data_preprocessor = dict(type='Own')
    assert whole_model(cfg).data_preprocessor == dict(type='Own')
