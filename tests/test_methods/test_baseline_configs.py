"""A step of every baseline's config on the embedded data's pairs."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

from era_mm.testing import detection_batch

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    'at': 'loss_at',
    'crosskd': 'loss_crosskd_score',
    'cwd': 'loss_cwd',
    'dml': 'loss_logit_score',
    'logit': 'loss_logit_score',
    'mgd': 'loss_mgd',
    'pkd': 'loss_imitation',
    'reviewkd': 'loss_reviewkd',
    'simkd': 'loss_simkd',
}
FILES = sorted(
    file
    for name in NAMES
    for file in (ROOT / 'configs').rglob(f'{name}_*.py')
    if re.search('_(digits|digit_crops|letters)$', file.stem)
)


def crops(num=4):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (num, 3, 32, 32), generator=generator)
    return dict(
        inputs=list(inputs.byte()),
        data_samples=[DataSample().set_gt_label(i) for i in range(num)],
    )


def test_configs__there_is_one_of_each():
    assert {file.stem.partition('_')[0] for file in FILES} == set(NAMES)


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_config__takes_two_steps(file):
    config = Config.fromfile(file)
    init_default_scope(config.default_scope)
    is_crops = file.stem.endswith('crops')
    if 'teacher' in config.model:
        config.model.teacher.checkpoint = 'random'
    model = MODELS.build(config.model)
    model.init_weights()
    model.train()
    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    batch = crops() if is_crops else detection_batch(2, size=128)
    # The second looks back at the first, which every extra must have reached.
    for _ in range(2):
        found = model.train_step(batch, wrapper)
    key = NAMES[file.stem.partition('_')[0]]
    values = [v for k, v in found.items() if k.rpartition('.')[2] == key]
    assert values
    assert all(value.isfinite() and value > 0 for value in values)
