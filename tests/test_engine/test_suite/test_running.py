"""The matrix: what is run, what is not run again, what a kill leaves."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from era_mm.engine.suite import command, rows, running
from era_mm.engine.suite.cells import all_cells
from era_mm.engine.suite.command import run_suite
from era_mm.engine.suite.spec import read_suite
from era_mm.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
FAKE = Path(__file__).with_name('fake_worker.py')
CONFIG = """
model = dict(type='A', width={width})
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
param_scheduler = dict(type='CosineAnnealingLR', T_max=2, end=2)
randomness = dict(seed=0)
"""
TAUGHT = """
model = dict(
    type='B', weight=1.0, teacher=dict(config='big.py', checkpoint='no.pth')
)
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
"""
SUITE = """
title: Toys
metric: {key: m/ap, name: AP, scale: 100}
seeds: [0, 1]
note: Two seeds, as they are toys.
pairs:
  big_small: {teacher: big, student: small, title: Big to small}
methods:
  plain: {config: '{student}', role: plain}
  plain_x2: {config: '{student}', role: plain, schedule: 2}
  era: {config: 'era_{pair}'}
"""


def fake(phase, folder):
    return [sys.executable, '-IS', str(FAKE), phase, str(folder)]


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """A folder with configs, a suite, and room for results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, 'LOOK_EVERY', 0.02)
    for folder in ('configs/deeper', 'results', 'docs'):
        Path(folder).mkdir(parents=True)
    Path('configs/big.py').write_text(CONFIG.format(width=2))
    Path('configs/deeper/small.py').write_text(CONFIG.format(width=1))
    Path('configs/deeper/era_big_small.py').write_text(TAUGHT)
    Path('toys.yaml').write_text(SUITE)


def run(**kwargs):
    screen = io.StringIO()
    console = Console(file=screen, width=200)
    done = run_suite(
        kwargs.pop('file', 'toys.yaml'),
        jobs=kwargs.pop('jobs', 3),
        commit='abc',
        command=fake,
        console=console,
        **kwargs,
    )
    return done, screen.getvalue()


def calls():
    file = Path('calls')
    found = file.read_text().split('\n')[:-1] if file.exists() else []
    file.unlink(missing_ok=True)
    base = 'work_dirs/suites/toys/big_small/'
    return sorted(call.replace(base, '') for call in found)


def both(*cells):
    return sorted(f'{p} {cell}' for cell in cells for p in ('train', 'test'))


ALL = ['teacher'] + [
    f'{method}/seed{seed}'
    for method in ('plain', 'plain_x2', 'era')
    for seed in (0, 1)
]


def read():
    header, found = rows.read_rows(Path('results/toys.jsonl'))
    return header, {(row['method'], row['seed']): row for row in found}


def test_run__trains_and_tests_every_cell_once_and_keeps_all():
    done, printed = run()
    assert done
    assert calls() == both(*ALL)
    header, found = read()
    assert header['suite'] == 'toys'
    assert list(found) == [
        ('teacher', None),
        ('plain', 0),
        ('plain', 1),
        ('plain_x2', 0),
        ('plain_x2', 1),
        ('era', 0),
        ('era', 1),
    ]
    row = found['era', 1]
    assert row['config'] == 'era_big_small'
    assert row['metrics'] == {'m/ap': 0.45, 'T/m/ap': 0.46}
    assert row['commit'] == 'abc'
    assert row['schedule'] == {'epochs': 2}
    assert found['plain_x2', 0]['schedule'] == {'epochs': 4}
    # Four iterations of 0.5 s, of which the log speaks.
    assert row['seconds'] == dict(train=2.0, test=1.0)
    assert row['memory'] == dict(process_mib=101)
    assert row['machine']['cpu'] == 'abacus'
    assert row['jobs'] == 3
    assert row['teacher'] == found['era', 0]['teacher'] is not None
    assert found['plain', 0]['teacher'] is None
    # No terminal: a line for each event.
    assert 'big_small/era/s0: started' in printed
    assert 'big_small/era/s0: AP 43.0, ' in printed
    assert '[7/7' in printed
    page = Path('docs/results.md').read_text()
    assert '\nTwo seeds, as they are toys.\n' in page
    # Differences 3 and 4: mean 3.5, half 12.7062 * 0.5 = 6.4.
    assert ' 3.5 +- 6.4 |' in page


def test_run__config_of_a_cell_has_its_seed_teacher_and_options():
    Path('toys.yaml').write_text(
        SUITE + '  half: {part_of: era, options: {model.weight: 0.5}}\n'
    )
    run(only=['*/half/s1'], dry_run=True)
    suite = read_suite('toys.yaml')
    cells = {c.name: c for c in all_cells(suite, Path('w'))}
    cfg = cells['big_small/half/s1'].config
    assert cfg.model.weight == 0.5
    assert cfg.randomness.seed == 1
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 2
    assert cells['big_small/era/s1'].config.model.weight == 1.0
    assert cells['big_small/plain_x2/s0'].config.train_cfg.max_epochs == 4
    prints = {cell.fingerprint for cell in cells.values()}
    # The teacher's is that of its own seed, which is 0.
    assert len(prints) == len(cells)


def test_run__what_is_finished_is_not_run_again():
    run()
    calls()
    first = Path('results/toys.jsonl').read_text()
    done, printed = run()
    assert done
    assert calls() == []
    assert 'started' not in printed
    assert Path('results/toys.jsonl').read_text() == first


def test_run__a_changed_config_is_run_again_and_no_other():
    run()
    calls()
    Path('toys.yaml').write_text(
        SUITE.replace(
            "'era_{pair}'", "'era_{pair}', options: {model.weight: 2.0}"
        )
    )
    run()
    assert calls() == both('era/seed0', 'era/seed1')
    assert read()[1]['era', 0]['options'] == {'model.weight': 2.0}


TRIES = """
title: Tries
metric: {key: m/ap, name: AP, scale: 100}
seeds: [0]
pairs:
  big_small: {teacher: big, student: small, title: Big to small}
methods:
  plain: {config: '{student}', role: plain}
  era: {config: 'era_{pair}'}
  half: {part_of: era, options: {model.weight: 0.5}}
"""


def test_run__a_run_of_another_suite_with_the_same_config_counts():
    run()
    calls()
    Path('tries.yaml').write_text(TRIES)
    assert run(file='tries.yaml')[0]
    # The first try is the method as it is; the second needs the teacher.
    base = 'work_dirs/suites/tries/big_small/'
    found = [call.replace(base, '') for call in calls()]
    assert sorted(found) == both('half/seed0', 'teacher')
    _, tried = rows.read_rows(Path('results/tries.jsonl'))
    assert [row['method'] for row in tried] == [
        'teacher',
        'plain',
        'era',
        'half',
    ]
    # Half the weight becomes the method's.
    Path('toys.yaml').write_text(
        SUITE.replace(
            "'era_{pair}'", "'era_{pair}', options: {model.weight: 0.5}"
        )
    )
    run(jobs=0)
    taken = read()[1]['era', 0]
    assert taken['options'] == {'model.weight': 0.5}
    assert taken['fingerprint'] == tried[-1]['fingerprint']
    assert taken['finished'] == tried[-1]['finished']
    run()
    assert calls() == both('era/seed1')


@pytest.mark.parametrize(
    'change', [dict(teacher='other'), dict(error='no memory')]
)
def test_run__a_run_of_another_teacher_or_that_failed_does_not(change):
    run()
    calls()
    header, found = read()
    moved = found.pop(('era', 0))
    rows.write_rows(Path('results/toys.jsonl'), header, found.values())
    rows.write_rows(
        Path('results/tries.jsonl'),
        dict(header, suite='tries'),
        [moved | change],
    )
    run(jobs=0)
    assert ('era', 0) not in read()[1]
    run()
    assert calls() == ['test era/seed0']
    assert 'error' not in read()[1]['era', 0]


def test_run__again_and_only_choose_cells():
    run(only=['*/plain/s0'])
    assert calls() == both('plain/seed0')
    # Its teacher is needed, too.
    run(only=['*/era/s0'])
    assert calls() == both('teacher', 'era/seed0')
    run(only=['*/era/s0'], again=['*/era/*'])
    assert calls() == both('era/seed0')
    assert set(read()[1]) == {('teacher', None), ('plain', 0), ('era', 0)}
    # The student's row is of the same weights.
    run(only=['*/era/s0'], again=['*/teacher'])
    assert calls() == both('teacher')
    with pytest.raises(UserError, match="no cell matches 'nothing'"):
        run(only=['nothing'])


def test_run__rows_of_another_machine_count_and_another_teacher_does_not():
    run()
    calls()
    # Rows came by copying; no work dir is here.
    for folder in sorted(Path('work_dirs').rglob('*'), reverse=True):
        folder.unlink() if folder.is_file() else folder.rmdir()
    run()
    assert calls() == []
    # A cell that is missing needs a teacher; it turns out as it was.
    header, found = read()
    del found['era', 1]
    rows.write_rows(Path('results/toys.jsonl'), header, found.values())
    _, printed = run()
    assert calls() == both('teacher', 'era/seed1')
    assert 'big_small/era/s0: not run, finished before' in printed
    # Now it is another one.
    found = read()[1]
    for row in found.values():
        if row['teacher']:
            row['teacher'] = 'other'
    del found['teacher', None]
    rows.write_rows(Path('results/toys.jsonl'), header, found.values())
    run()
    # Where weights are those of this teacher, only a test is wanted.
    assert calls() == sorted(
        [*both('era/seed0'), 'test era/seed1', 'test teacher']
    )


def test_run__the_row_of_a_teacher_with_students_elsewhere_stays():
    run()
    calls()
    header, found = read()
    del found['era', 1]
    for row in found.values():
        if row['teacher']:
            row |= dict(teacher='other', finished='2026-01-01T00:00:00')
    rows.write_rows(Path('results/toys.jsonl'), header, found.values())
    shutil.rmtree('work_dirs')
    run(only=['*/era/s1'])
    assert calls() == both('teacher', 'era/seed1')
    _, found = rows.read_rows(Path('results/toys.jsonl'))
    own = found[-1]['teacher']
    assert [
        (row['method'], row['teacher']) for row in found if row['teacher']
    ] == [
        ('teacher', 'other'),
        ('teacher', own),
        ('era', 'other'),
        ('era', own),
    ]
    # The page is of both, and the next call trains neither.
    run(only=['*/era/s1'])
    assert calls() == []
    assert 'teacher of 1 run ' in Path('docs/results.md').read_text()


def test_run__a_teacher_of_two_pairs_is_trained_once():
    pair = '  big_small: {teacher: big, student: small, title: Big to small}\n'
    other = '  again: {teacher: big, student: small, words: {}}\n'
    Path('toys.yaml').write_text(
        SUITE.replace(pair, pair + other).replace(
            'era_{pair}', 'era_big_small'
        )
    )
    done, _ = run(only=['*/era/s0'])
    assert done
    found = [call for call in calls() if 'teacher' in call]
    # Its test is cheap, and gives the second pair a row of its own.
    assert found == ['test teacher', 'test teacher', 'train teacher']
    _, all_rows = rows.read_rows(Path('results/toys.jsonl'))
    assert [(row['pair'], row['method']) for row in all_rows] == [
        ('big_small', 'teacher'),
        ('big_small', 'era'),
        ('again', 'teacher'),
        ('again', 'era'),
    ]
    assert {row['teacher'] for row in all_rows} == {'teacher 0'}


def test_run__a_failed_cell_has_no_number_and_is_tried_again():
    Path('broken').write_text('era/seed0')
    done, printed = run()
    assert not done
    row = read()[1]['era', 0]
    assert 'metrics' not in row
    assert row['error'].startswith('train stopped with status 3')
    assert 'ValueError: broken on purpose' in row['error']
    assert 'big_small/era/s0: failed: train stopped with status 3' in printed
    page = Path('docs/results.md').read_text()
    assert '- era, seed 0: train stopped with status 3' in page
    assert '1 of 2' in page
    Path('broken').unlink()
    calls()
    done, _ = run()
    assert done
    assert calls() == both('era/seed0')


def test_run__students_of_a_failed_teacher_are_left():
    Path('broken').write_text('teacher')
    done, printed = run()
    assert not done
    assert 'big_small/era/s0: not run, its teacher failed' in printed
    assert set(read()[1]) == {
        ('teacher', None),
        *((m, s) for m in ('plain', 'plain_x2') for s in (0, 1)),
    }
    # Once it is trained, nothing is left of the failure.
    Path('broken').unlink()
    assert run()[0]
    _, found = rows.read_rows(Path('results/toys.jsonl'))
    (teacher,) = [row for row in found if row['method'] == 'teacher']
    assert 'error' not in teacher


def test_run__without_jobs_writes_the_page_from_the_rows():
    run(only=['*/plain/*'])
    Path('docs/results.md').unlink()
    calls()
    done, _ = run(jobs=0)
    assert done
    assert calls() == []
    page = Path('docs/results.md').read_text()
    assert re.search(r'\| era +\| 0 of 2 \| +not run \|', page)


def test_run__dry_run_tells_and_does_nothing():
    run(only=['*/plain/s0'])
    before = Path('results/toys.jsonl').read_text()
    calls()
    _, printed = run(dry_run=True)
    assert calls() == []
    assert 'big_small/plain/s0: small, 2 epochs: finished\n' in printed
    assert 'big_small/plain_x2/s1: small, 4 epochs: to run\n' in printed
    assert Path('results/toys.jsonl').read_text() == before


def test_run__dry_run_says_why_a_finished_teacher_is_run_again():
    run(only=['*/era/s0'])
    shutil.rmtree('work_dirs')
    _, printed = run(dry_run=True)
    assert (
        'big_small/teacher: big, 2 epochs: finished, but its weights are not '
        'here: to run\n'
    ) in printed
    Path('configs/big.py').write_text(CONFIG.format(width=3))
    _, printed = run(dry_run=True)
    assert 'big_small/teacher: big, 2 epochs: changed since\n' in printed


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from era_mm.cli import _run
from era_mm.engine.suite.command import run_suite

def fake(phase, folder):
    return [sys.executable, '-IS', {fake!r}, phase, str(folder)]

run_suite('toys.yaml', jobs=1, commit=sys.argv[1], command=fake)
"""


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM])
def test_run__a_killed_cell_goes_on_where_it_was_saved(how):
    code = DRIVER.format(root=str(ROOT), fake=str(FAKE))
    folder = Path('work_dirs/suites/toys/big_small/plain/seed0')
    run(only=['*/teacher'])
    calls()
    Path('slow').touch()
    process = subprocess.Popen([sys.executable, '-c', code, 'first'])
    # The first epoch is saved; the second lasts.
    wait_for(lambda: '"step": 3' in log_of(folder))
    process.send_signal(how)
    process.wait()
    # The cell's program ends with the suite.
    wait_for(lambda: not alive(folder))
    Path('slow').unlink()
    first = log_of(folder)
    assert '"step": 4' not in first
    run()
    row = read()[1]['plain', 0]
    assert row['attempts'] == 2
    assert row['commit'] == 'first abc'
    # Step 3 was done twice and counts once.
    assert row['seconds']['train'] == 2.0
    assert (folder / 'train/attempt1/vis_data/scalars.json').exists()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def log_of(folder):
    files = sorted(folder.glob('train/*/vis_data/scalars.json'))
    return ''.join(file.read_text() for file in files)


def alive(folder):
    """Whether a program works on a folder."""
    for process in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            words = process.read_bytes().split(b'\0')
            cwd = os.readlink(process.with_name('cwd'))
        except OSError:
            continue
        if str(folder).encode() in words and cwd == os.getcwd():
            return True
    return False


def test_alone__refuses_a_second_suite():
    with command.alone(Path('here')):
        with pytest.raises(UserError, match='another one is running in here'):
            with command.alone(Path('here')):
                pass
    with command.alone(Path('here')):
        pass


def test_run__gpus_are_shared_in_turn(monkeypatch):
    monkeypatch.setattr(command, '_gpus', lambda: 2)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    seen = []
    popen = subprocess.Popen

    def spy(argv, **kwargs):
        seen.append(kwargs['env'])
        return popen(argv, **kwargs)

    monkeypatch.setattr(running.subprocess, 'Popen', spy)
    run(only=['*/plain/*'], jobs=2)
    assert {env['CUDA_VISIBLE_DEVICES'] for env in seen} == {'0', '1'}
    assert {env['OMP_NUM_THREADS'] for env in seen} == {'1'}


def test_run__says_which_metric_a_test_gave():
    text = SUITE.replace('m/ap', 'm/mAP')
    Path('toys.yaml').write_text(text)
    with pytest.raises(
        UserError, match="compares 'm/mAP', but the test split gave m/ap"
    ):
        run(only=['*/plain/s0'])


def test_run__needs_a_place_for_results():
    with pytest.raises(UserError, match='expected the folder nowhere'):
        run(results=Path('nowhere'))


def test_commit__says_whether_the_code_was_changed():
    commit = command.commit_of_code()
    assert commit == 'not known' or len(commit.partition('-')[0]) == 12


def test_json__of_rows_is_one_object_per_line():
    run(only=['*/plain/s0'])
    for line in Path('results/toys.jsonl').read_text().splitlines():
        assert isinstance(json.loads(line), dict)
