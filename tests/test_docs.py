"""The code in the docs runs, and the docs' links lead somewhere."""

import json
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


def rows_with(page, column):
    """Rows of the page's tables that have a column, as dicts."""
    found, names = [], []
    for line in (ROOT / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if not line.startswith('|'):
            names = []
        elif not names:
            names = cells
        elif column in names and not set(line) <= set('|-: '):
            found.append(dict(zip(names, cells, strict=True)))
    return found


def costs_in(file):
    """Image, parameters and FLOPs by config, as documents show them."""
    with (ROOT / 'results' / file).open() as lines:
        return {
            cost['config']: (
                str(cost['input_size']),
                f'{cost["params"] / 1e6:.3f}',
                f'{cost["flops"] / 1e9:.3f}',
            )
            for cost in map(json.loads, lines)
        }


def test_flops__in_the_tables_are_those_that_the_tool_wrote():
    digits = costs_in('digits_flops.jsonl')
    assert {image for image, _, _ in digits.values()} == {'128'}
    told = {config: cost[1:] for config, cost in digits.items()}
    shown = {
        row['config'].split('`')[1]: (row['M parameters'], row['GFLOPs'])
        for row in rows_with('docs/model_zoo.md', 'GFLOPs')
        # A row without is of two models, or of a mode that has more.
        if row['GFLOPs']
    }
    assert shown == told

    of_pairs = digits | costs_in('residual_kd_flops.jsonl')
    rows = rows_with('docs/methods/residual_kd.md', 'image')
    for row in rows:
        cost = (row['image'], row['M parameters'], row['GFLOPs'])
        assert cost == of_pairs[row['config'].strip('`')]
    # Every config of the method has its row.
    assert {row['config'].strip('`') for row in rows} >= {
        path.stem for path in (ROOT / 'configs/residual_kd').glob('*.py')
    }

    plain, *pairs = rows_with('docs/methods/residual_kd.md', 'AP')
    for row, config in (
        (plain, 'plain_retinanet_r18w16_digits'),
        *(
            (pair, 'residual_kd_retinanet_r18w32_r18w16_digits')
            for pair in pairs
        ),
    ):
        assert (row['M parameters'], row['GFLOPs']) == told[config]
    # What is deployed has both, in all three runs.
    assert len(pairs) == 3
    assert plain['M parameters'] < pairs[0]['M parameters']
