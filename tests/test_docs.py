"""The code in the docs runs, and the docs' links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.cli import _make_config_parser
from era_mm.engine.make_config import methods
from era_mm.testing import detection_batch, distillation_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]


def test_add_a_method__the_dummy_method_trains(teacher_file):
    text = (ROOT / 'docs/add_a_method.md').read_text()
    code = re.search(r'```python\n(.*?)```', text, re.DOTALL)[1]
    exec(compile(code, 'channel_mean.py', 'exec'), {'__name__': 'docs'})
    model = MODELS.build(
        distillation_config(
            dict(type='era_mm.ChannelMeanDistiller', loss_weight=2.0),
            checkpoint=teacher_file,
        )
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    values = []
    for _ in range(12):
        data = model.data_preprocessor(detection_batch(), True)
        losses = model(**data, mode='loss')
        values.append(losses['loss_channel_mean'].item())
        optimizer.zero_grad()
        losses['loss_channel_mean'].backward()
        optimizer.step()
    assert values[-1] < values[0]


def test_make_config__doc_and_help_name_all_methods():
    help_text = ' '.join(_make_config_parser().format_help().split())
    text = (ROOT / 'docs/make_config.md').read_text()
    for name in methods():
        assert name in help_text
        assert f'`{name}`' in text


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links__lead_to_files(page):
    for target in re.findall(r'\]\(([^)#]+?)(?:#[^)]*)?\)', page.read_text()):
        if '://' not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_named_files__exist(page):
    for name in re.findall(
        r'`((?:era_mm|configs|tests|tools|docs)/[\w/.]+)`', page.read_text()
    ):
        if name.endswith(('.py', '.sh', '.md', '/')) and '<' not in name:
            assert (ROOT / name).exists() or 'channel_mean' in name, name
