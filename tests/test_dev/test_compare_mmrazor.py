"""The comparison with mmrazor, without mmrazor."""

import json

import pytest
from mmengine.registry import DefaultScope

from dev import compare_mmrazor as tool
from dev.config_pages import ROOT
from era_mm.engine.benchmark_models import Distilled
from era_mm.engine.random_batch import random_batch
from era_mm.errors import UserError

DEVICE = tool.torch.device('cpu')


def test_page__has_the_numbers_of_the_file():
    record = json.loads((ROOT / 'results/mmrazor.json').read_text())
    page = (ROOT / 'docs/benchmark.md').read_text()
    assert '\n'.join(tool.table(record)) in page


def test_file__is_of_one_job():
    record = json.loads((ROOT / 'results/mmrazor.json').read_text())
    assert record['versions']['mmrazor'] == tool.VERSION
    for name, found in record['pairs'].items():
        tool.check_same(found['losses'])
        assert found['setting'] == json.loads(
            json.dumps(tool.PAIRS[name]._asdict())
        )


def test_jobs__that_differ_are_not_compared():
    same = dict(total=3.0, pkd=2.0)
    tool.check_same(dict(era_mm=same, other=dict(total=3.00001, pkd=2.0)))
    with pytest.raises(UserError, match='jobs differ'):
        tool.check_same(dict(era_mm=same, other=dict(total=3.0, pkd=2.001)))


def test_mmrazor__that_is_not_there_is_asked_for(monkeypatch):
    monkeypatch.setattr(tool, 'installed_version', lambda name: None)
    with pytest.raises(UserError, match=r'expected version 1\.0\.0.*None'):
        tool.import_mmrazor()


@pytest.mark.parametrize('name', tool.PAIRS)
def test_own_config__is_pkd_of_the_pair(name):
    distiller = tool.own_config(tool.PAIRS[name]).model.distiller
    assert (distiller.type, distiller.measure) == (
        'era_mm.FeatureImitationDistiller',
        'pearson',
    )


def test_job__is_pkd_on_every_level():
    """Both take the same levels with the same weight."""
    pair = tool.PAIRS['demo']
    cfg = tool.own_config(pair)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        own = Distilled(cfg, DEVICE, amp=False)
    pkd = own.model.distillers['distiller']
    config = tool.mmrazor_config('X', pkd.num_levels, pkd.loss_weight)
    losses = config['distiller']['distill_losses']
    assert [loss['loss_weight'] for loss in losses.values()] == [6.0] * 3
    mappings = config['distiller']['loss_forward_mappings']
    assert [
        (m['preds_S']['data_idx'], m['preds_T']['data_idx'])
        for m in mappings.values()
    ] == [(0, 0), (1, 1), (2, 2)]
    batch = random_batch(
        own.deployed, 2, (64, 64), 2, tool.torch.Generator().manual_seed(0)
    )
    found = tool.first_losses(own, batch)
    assert 0 < found['pkd'] < found['total']
