"""The suite files of the project, its published numbers, reproduce.sh."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from era_mm.engine.suite.cells import all_cells
from era_mm.engine.suite.page import page
from era_mm.engine.suite.results import read_results
from era_mm.engine.suite.spec import read_suite

ROOT = Path(__file__).resolve().parents[3]
SUITES = sorted((ROOT / 'suites').glob('*.py'))


@pytest.mark.parametrize('file', SUITES, ids=lambda file: file.stem)
def test_suite__every_cell_has_a_config_of_one_schedule(
    file, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    suite = read_suite(file)
    tries = suite.metric.split == 'val'
    assert len(suite.seeds) == (1 if tries else 5)
    cells = all_cells(suite, tmp_path)
    # Two runs of one fingerprint would be one run, counted twice. Pairs may
    # have the same teacher.
    runs = {(cell.pair.name, cell.fingerprint) for cell in cells}
    assert len(runs) == len(cells)
    students = [cell for cell in cells if cell.method is not None]
    assert len({cell.fingerprint for cell in students}) == len(students)
    lengths = {}
    for cell in cells:
        cfg = cell.config
        lengths[cell.key[1]] = cell.length[1]
        if cell.method is None:
            continue
        distiller = cfg.model.get('distiller') or {}
        # A phase that comes before is added to the schedule of all.
        first = distiller.get('pretrain_iters', 0)
        iters = 32 if 'crops' in suite.name else 150
        epochs = cell.length[1] - -(-first // iters)
        assert epochs == lengths['plain'] * cell.method.schedule
    assert tries or lengths['plain_x2'] == 2 * lengths['plain']
    assert lengths['teacher'] == lengths['plain']


def test_suite__a_try_does_not_change_its_method(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    suite = read_suite(ROOT / 'suites/digit_crops_tuning.py')
    cells = {cell.key[1]: cell for cell in all_cells(suite, tmp_path)}
    # Both replace the distiller by one dict; only the try adds to it.
    assert cells['fitnet_fifth'].config.model.distiller.schedules == dict(
        loss_imitation=dict(scale=0.2)
    )
    assert 'schedules' not in cells['fitnet'].config.model.distiller
    # DKD's own ramp stays.
    assert cells['dkd_fifth'].config.model.distiller.schedules == dict(
        loss_logit_score=dict(ramp=107, scale=0.2)
    )


@pytest.mark.parametrize(
    'file',
    [
        file
        for file in SUITES
        if re.fullmatch('digit_(crops|scenes)(_tuning)?', file.stem)
    ],
    ids=lambda file: file.stem,
)
def test_suite__sokd_searches_with_a_rate_that_can_move_its_policy(
    file, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    found = [
        (cell.config, cell.length[1])
        for cell in all_cells(read_suite(file), tmp_path)
        if cell.method is not None and cell.key[1].startswith('sokd')
    ]
    assert found
    for cfg, epochs in found:
        # Batches of 64 of 2000 crops, of 16 of 2400 scenes.
        steps = 0.2 * epochs * (32 if 'crops' in file.stem else 150)
        assert cfg.model.distiller.optimizer.lr * steps > 1


#: The methods of published numbers that are here, as `kinds_of` calls them.
HERE = {
    'plain': [],
    'AT': ['AT'],
    'CWD': ['CWD'],
    'CrossKD': ['CrossKD'],
    'CrossKD + PKD': ['CrossKD', 'PKD'],
    'DIST': ['Logit dist'],
    'DKD': ['Logit dkd'],
    'IE-KD': ['IEKD'],
    'IE-KD (IE-FT)': ['IEKD'],
    'KD': ['Logit kl'],
    'KD + logit standardisation': ['Logit kl standardised'],
    'MGD': ['MGD'],
    'PKD': ['PKD'],
    'Residual KD + AT': ['AT', 'ResidualKD'],
    'ReviewKD': ['ReviewKD'],
    'ReviewKD + SoKD': ['SoKD ReviewKD'],
    'SimKD, with its projector': ['SimKD'],
}


def kind_of(distiller):
    """Name of a distiller's method, with what makes another of it."""
    name = distiller.type.removeprefix('era_mm.').removesuffix('Distiller')
    words = [name]
    if name == 'Logit':
        logit = distiller.get('logit', {})
        words.append(logit.get('kind', 'kl'))
        words += ['standardised'] if logit.get('standardise') else []
    elif name == 'SoKD':
        words.append(kind_of(distiller.base))
    return ' '.join(words)


def kinds_of(model):
    """The kinds of a model's distillers."""
    found = model.get('distiller') or {}
    each = [found] if 'type' in found else found.values()
    return [kind_of(distiller) for distiller in each]


PUBLISHED = [
    pair
    for table in json.loads((ROOT / 'results/published.json').read_text())[
        'tables'
    ]
    for pair in table['pairs']
]


def test_published__each_pair_is_there_once():
    names = [pair['pair'] for pair in PUBLISHED]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize('pair', PUBLISHED, ids=lambda pair: pair['pair'])
def test_published__configs_are_there_and_of_the_method(pair, read_config):
    ours = {path.stem: path for path in (ROOT / 'configs').rglob('*.py')}
    twins = set()
    for entry in pair['numbers']:
        assert entry['value'], entry
        assert entry['source'], entry
        if 'config' not in entry:
            # Another kind of a method that is here, or another schedule.
            assert entry['method'] not in HERE or entry['without'], entry
            continue
        config = ours[entry['config']]
        cfg = read_config(config)
        assert kinds_of(cfg.model) == HERE[entry['method']], entry
        twin = re.search(r'Plain twin: (\w+)\.py', config.read_text())
        twins.add(config.stem if entry['method'] == 'plain' else twin[1])
    # All are compared with the same student.
    assert len(twins) <= 1
    if any(entry['method'] == 'plain' for entry in pair['numbers']):
        assert len(twins) == 1 or all('without' in e for e in pair['numbers'])


def test_page__of_the_project_is_made_of_its_rows(tmp_path):
    text = (ROOT / 'docs/results.md').read_text()
    assert text == page(ROOT / 'results', [ROOT / 'configs'])
    names = {header['suite'] for header, _ in read_results(ROOT / 'results')}
    assert names == {file.stem for file in SUITES}


PYTHON = """#!/bin/bash
[ "$1" = - ] && exec {python} "$@"
echo "$@" >> calls
while [ $# -gt 0 ]; do [ "$1" = --work-dir ] && dir=$2; shift; done
mkdir -p $dir && touch $dir/epoch_2.pth
echo $dir/epoch_2.pth > $dir/last_checkpoint
"""


def test_reproduce__trains_the_teacher_first_and_goes_on(tmp_path):
    (tmp_path / 'dev').mkdir()
    copied = tmp_path / 'dev/reproduce.sh'
    copied.write_bytes((ROOT / 'dev/reproduce.sh').read_bytes())
    copied.chmod(0o755)
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs/big.py').write_text('model = dict(type="A")')
    (tmp_path / 'configs/era_big.py').write_text(
        'model = dict(teacher=dict(config="big",'
        ' checkpoint="work_dirs/big/epoch_2.pth"))'
    )
    python = tmp_path / 'python'
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)

    def run(*argv, **env):
        (tmp_path / 'calls').unlink(missing_ok=True)
        path = f'{ROOT}:{os.environ.get("PYTHONPATH", "")}'
        subprocess.run(
            [str(copied), *argv],
            check=True,
            cwd=tmp_path,
            env=os.environ | {'PYTHON': str(python), 'PYTHONPATH': path} | env,
            capture_output=True,
        )
        return (tmp_path / 'calls').read_text().splitlines()

    config = f'{tmp_path}/configs'
    assert run('era_big', '--amp') == [
        f'tools/train.py {config}/big.py --work-dir work_dirs/big',
        f'tools/test.py {config}/big.py work_dirs/big/epoch_2.pth '
        '--work-dir work_dirs/big/test',
        f'tools/train.py {config}/era_big.py --work-dir work_dirs/era_big '
        '--amp',
        f'tools/test.py {config}/era_big.py work_dirs/era_big/epoch_2.pth '
        '--work-dir work_dirs/era_big/test',
    ]
    # The teacher is there, and the training goes on.
    again = run('configs/era_big.py', GPUS='2')
    assert len(again) == 2
    assert again[0].startswith(
        '-m torch.distributed.run --nproc_per_node=2 tools/train.py'
    )
    assert again[0].endswith('--resume --launcher pytorch')
    assert subprocess.run([str(copied)], capture_output=True).returncode == 2
