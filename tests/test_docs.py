"""The code in the docs runs, and the docs' links lead somewhere."""

import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.engine.make_config import methods
from era_mm.testing import detection_batch, distillation_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'SECURITY.md')),
    *sorted((ROOT / 'docs').rglob('*.md')),
]
EVERY_PAGE = [
    *PAGES,
    ROOT / 'CHANGELOG.md',
    ROOT / 'results/README.md',
    *sorted((ROOT / 'configs').rglob('*.md')),
]


def by_path(page):
    return page.relative_to(ROOT).as_posix()


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


def test_make_config__doc_names_no_method_that_is_gone():
    # A new one need not be there: --method shows what is in the folder.
    (row,) = (
        line
        for line in (ROOT / 'docs/make_config.md').read_text().splitlines()
        if line.startswith('| `--method`')
    )
    assert 'era' in methods()
    assert set(re.findall(r'`(\w+)`', row)) <= set(methods())


def anchors_of(page):
    """Anchors of headings, as GitHub and the docs site make them."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.DOTALL | re.M)
    anchors = set()
    for heading in re.findall(r'^#+ (.*)$', text, re.M):
        words = re.sub(r'\[(.*?)\]\(.*?\)', r'\1', heading).lower()
        anchors.add(re.sub(r'[^\w\- ]', '', words).replace(' ', '-'))
    return anchors


def dead_links(page):
    """Relative links of a page without a file or heading at their end."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.DOTALL | re.M)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        name, _, anchor = target.partition('#')
        if '://' in target or name.startswith('mailto:'):
            continue
        end = page.parent / name if name else page
        if not end.exists() or (anchor and anchor not in anchors_of(end)):
            yield target


@pytest.mark.parametrize('page', EVERY_PAGE, ids=by_path)
def test_links__lead_to_files_and_headings(page):
    assert list(dead_links(page)) == []


def test_links__dead_ones_are_found(tmp_path):
    (tmp_path / 'b.md').write_text('# A `word`, two\n')
    page = tmp_path / 'a.md'
    page.write_text(
        '## Here\n[1](b.md) [2](b.md#a-word-two) [3](#here) [4](c.md) '
        '[5](b.md#a-word) [6](#there) [7](https://x.y/z)\n'
        '```\n[8](d.md)\n```\n'
    )
    assert list(dead_links(page)) == ['c.md', 'b.md#a-word', '#there']


@pytest.mark.parametrize('page', PAGES, ids=by_path)
def test_named_files__exist(page):
    for name in re.findall(
        r'`((?:era_mm|configs|demo|dev|tests|tools|docs)/[\w/.]+)`',
        page.read_text(),
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
