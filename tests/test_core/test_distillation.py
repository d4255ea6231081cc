"""The model from a config."""

import pytest
from mmengine.registry import MODELS

from era_mm.testing import distillation_config

ERA = dict(type='era_mm.ERADistiller')


def build(**kwargs):
    return MODELS.build(distillation_config(ERA) | kwargs)


def test_distillation__unknown_key_shows_the_nearest():
    with pytest.raises(TypeError, match="Did you mean 'distiller'"):
        build(distillers=ERA)


def test_student__that_is_a_distillation_is_refused():
    with pytest.raises(ValueError, match='Distillation itself'):
        build(student=distillation_config(ERA))
