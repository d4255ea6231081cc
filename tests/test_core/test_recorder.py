"""What passes a module."""

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import nn

from era_mm.core import Recorder
from era_mm.core.host_models import forward_until
from era_mm.testing import detector_config


def test_source__changed_in_place_afterwards_is_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    recorder = Recorder(net, ['0'], owner='student')
    with recorder:
        net(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match='changed in place'):
        recorder.pop()


def test_source__replaced_by_sync_norm_is_still_heard():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    recorder = Recorder(net, ['1'], owner='student')
    net[1] = nn.Identity()
    with recorder:
        net(torch.ones(3, 2))
    assert recorder.pop()['1'][0].shape == (3, 2)


def test_source__of_a_dense_head_gives_its_outputs_level_by_level():
    model = MODELS.build(ConfigDict(detector_config(head='FCOSHead'))).eval()
    inputs = torch.rand(1, 3, 64, 64)
    recorder = Recorder(model, ['neck', 'bbox_head'], owner='student')
    with recorder, torch.no_grad():
        forward_until(model, inputs, recorder.sources)
    found = recorder.pop()
    with torch.no_grad():
        scores, boxes, centerness = model(inputs, mode='tensor')
    # Class scores of both levels, then boxes, then centre-ness.
    expected = [*scores, *boxes, *centerness]
    assert len(found['bbox_head']) == len(expected) == 6
    assert all(map(torch.equal, found['bbox_head'], expected))
    assert len(found['neck']) == 2


def test_source__that_puts_out_more_than_tensors_is_refused():
    class Tokens(nn.Module):
        def forward(self, x):
            return [x], (2, 2)

    recorder = Recorder(nn.Sequential(Tokens()), ['0'], owner='student')
    with recorder, pytest.raises(ValueError, match=r"'0' .* but gave int"):
        recorder.model(torch.ones(1, 2))


def test_recorder__listens_only_inside_its_block():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    recorder = Recorder(net, ['0', '1'], owner='student')
    x = torch.ones(1, 2)
    net(x)
    with recorder:
        net(x)
    net(x)
    feats = recorder.pop()
    assert [feats[key][0].shape[1] for key in ('0', '1')] == [3, 4]
    assert len(feats['0']) == 1
    assert not net[0]._forward_hooks
    with pytest.raises(RuntimeError, match='never called'):
        recorder.pop()


def test_recorder__module_called_per_level_gives_all_its_outputs():
    shared = torch.nn.Identity()
    recorder = Recorder(torch.nn.Sequential(shared), ['0'], owner='student')
    with recorder:
        for value in (1.0, 2.0, 3.0):
            shared(torch.tensor(value))
    assert [t.item() for t in recorder.pop()['0']] == [1, 2, 3]


def test_recorder__output_that_is_no_feature_is_refused():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return {'x': x}

    net = torch.nn.Sequential(Odd())
    with (
        pytest.raises(ValueError, match='gave dict'),
        Recorder(net, ['0'], owner='student'),
    ):
        net(torch.ones(1))


def test_when_recorded__is_called_once_as_soon_as_all_are_there():
    net = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    seen = []
    recorder = Recorder(net, ['0', '1', '2'], owner='student')
    with recorder:
        recorder.when_recorded(
            {'0': 1, '1': 2},
            lambda outputs: seen.append(
                {
                    key: [t.item() for t in value]
                    for key, value in outputs.items()
                }
            ),
        )
        net(torch.tensor(5.0))
        # '1' gave one tensor of two.
        assert seen == []
        net[1](torch.tensor(6.0))
        assert seen == [{'0': [5.0], '1': [5.0, 6.0]}]
        net[2](torch.tensor(7.0))
    assert len(seen) == 1
    # What never came does not wait for the next block.
    with recorder:
        recorder.when_recorded({'0': 2}, seen.append)
        net(torch.tensor(5.0))
    with recorder:
        net[0](torch.tensor(5.0))
        net(torch.tensor(5.0))
        net[1](torch.tensor(6.0))
    assert len(seen) == 1
