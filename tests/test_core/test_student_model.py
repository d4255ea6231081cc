"""How the wrapped model is its student."""

import copy

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.core import extras_of
from era_mm.testing import distillation_config, era_model

ERA = dict(type='era_mm.ERADistiller')


def test_files__module_versions_reach_the_students_modules(monkeypatch):
    model = MODELS.build(distillation_config(ERA))
    norm = model.student.backbone.bn1
    seen = {}
    load = norm._load_from_state_dict

    def spy(state_dict, prefix, local_metadata, *args):
        seen.update(local_metadata)
        load(state_dict, prefix, local_metadata, *args)

    monkeypatch.setattr(norm, '_load_from_state_dict', spy)
    model.load_state_dict(model.state_dict())
    assert seen['version'] == norm._version == 2


def test_load__extras_of_another_method_are_left_out():
    model, other = (MODELS.build(distillation_config(ERA)) for _ in range(2))
    state = model.state_dict()
    extras_of(state)['distiller']['type'] = 'OtherDistiller'
    before = copy.deepcopy(other.distillers.state_dict())
    other.load_state_dict(state)
    for key, value in other.distillers.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_parameters__have_the_students_names():
    # Layer-wise decay of the hosts looks at names that begin "backbone".
    model = MODELS.build(distillation_config(ERA))
    names = [name for name, _ in model.named_parameters()]
    own = [name for name, _ in model.student.named_parameters()]
    assert names[: len(own)] == own
    assert all(name.startswith('distillers.') for name in names[len(own) :])
    assert len(names) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ('form', 'reason'),
    # Bottlenecks lie side by side in one tensor.
    [('released', 'missing'), ('normalised', 'other shapes')],
)
def test_load__extras_of_other_settings_are_refused(form, reason):
    def with_branches(num):
        era = dict(ERA, form=form, mbrnet=dict(num_branches=num))
        return MODELS.build(distillation_config(era))

    state = with_branches(3).state_dict()
    with pytest.raises(ValueError, match=f"extras of 'distiller'.*{reason}"):
        with_branches(4).load_state_dict(state)


@pytest.mark.parametrize(
    ('distiller', 'present', 'former'),
    [
        (ERA, 'mbrnet.branches.', 'mbrnet.bottlenecks.'),
        (dict(type='era_mm.SoKDDistiller'), 'dam.predictors.', 'dam.heads.'),
    ],
    ids=['era', 'sokd'],
)
def test_load__extras_with_former_names_are_those(distiller, present, former):
    model, other = (
        MODELS.build(distillation_config(distiller)) for _ in range(2)
    )
    state = model.state_dict()
    entry = extras_of(state)['distiller']
    expected = entry['state_dict']
    assert any(present in key for key in expected)
    entry['state_dict'] = {
        key.replace(present, former): value for key, value in expected.items()
    }
    other.load_state_dict(state)
    for key, value in other.distillers['distiller'].state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_load__counters_of_norms_in_extras_are_those_of_the_file(monkeypatch):
    load = torch.nn.BatchNorm2d._load_from_state_dict

    def like_torch_2_1(self, state_dict, prefix, *args):
        state_dict.setdefault(f'{prefix}num_batches_tracked', torch.tensor(0))
        load(self, state_dict, prefix, *args)

    monkeypatch.setattr(
        torch.nn.BatchNorm2d, '_load_from_state_dict', like_torch_2_1
    )
    model, again = (
        era_model(form='released', mbrnet=dict(num_branches=1))
        for _ in range(2)
    )

    def counters(of):
        state = of.distillers.state_dict()
        return [v for k, v in state.items() if k.endswith('batches_tracked')]

    assert counters(model)
    for counter in counters(model):
        counter.fill_(7)
    again.load_state_dict(model.state_dict())
    assert [int(counter) for counter in counters(again)] == [7] * len(
        counters(model)
    )
