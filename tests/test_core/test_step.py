"""What happens in an iteration, and whose predictions are asked for."""

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.core import step
from era_mm.testing import (
    detection_batch,
    detector_config,
    distillation_config,
)

ERA = dict(type='era_mm.ERADistiller')


def test_predict__modes_get_samples_without_predictions(monkeypatch):
    model = MODELS.build(distillation_config(ERA)).eval()
    era, seen = model.distillers['distiller'], []
    predict = era.predict

    def spy(modes, *, data_samples, **kwargs):
        seen.extend(data_samples)
        return predict(modes, data_samples=data_samples, **kwargs)

    monkeypatch.setattr(era, 'predict', spy)
    model.active_modes = ('T',)
    data = model.data_preprocessor(detection_batch(), False)
    with torch.no_grad():
        own = model(**data, mode='predict')
    assert all('pred_instances' in sample for sample in own)
    assert seen
    assert not any('pred_instances' in sample for sample in seen)


def test_init_weights__leaves_the_random_state_of_a_plain_run():
    drawn = []
    for config in (detector_config(), distillation_config(ERA)):
        torch.manual_seed(0)
        MODELS.build(config).init_weights()
        drawn.append(torch.rand(1))
    assert torch.equal(*drawn)


def test_init_weights__puts_the_extras_alike_on_all_ranks(monkeypatch):
    sent = []
    monkeypatch.setattr(step, 'broadcast', sent.append)
    config = distillation_config(ERA)
    model = MODELS.build(config)
    model.init_weights()
    expected = model.distillers['distiller'].state_dict().values()
    assert [t.data_ptr() for t in sent] == [t.data_ptr() for t in expected]


def test_modes__of_a_plain_file_are_refused(tmp_path):
    plain = MODELS.build(detector_config())
    config = distillation_config(ERA) | dict(inference_mode='T')
    model = MODELS.build(config).eval()
    model.load_state_dict(plain.state_dict())
    data = model.data_preprocessor(detection_batch(), False)
    with pytest.raises(RuntimeError, match='plain student only'):
        model(**data, mode='predict')
    # What the distillation itself has written is fine.
    model.load_state_dict(MODELS.build(config).state_dict())
    model(**data, mode='predict')


def test_modes__of_two_distillers_are_told_apart():
    config = distillation_config({}) | dict(distiller=dict(a=ERA, b=ERA))
    model = MODELS.build(config).eval()
    model.check_modes(['a.T', 'b.T'])
    with pytest.raises(ValueError, match=r"'T' is not offered\. Known"):
        model.check_modes(['T'])
    model.active_modes = ('a.T', 'b.T')
    data = model.data_preprocessor(detection_batch(), False)
    with torch.no_grad():
        model(**data, mode='predict')
    assert set(model.mode_predictions) == {'a.T', 'b.T'}
