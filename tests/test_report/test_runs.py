"""Work dirs are read and sorted, and what is missing is named."""

import json
import math
import shlex
import shutil

import pytest

from era_mm.errors import UserError
from era_mm.report.comparison import compare_runs
from era_mm.report.runs import read_run
from era_mm.testing.work_dirs import STUDENT, distilled, train_lines, write_run

AP = 'coco/bbox_mAP'


def test_read_run__a_whole_run(tmp_path):
    log = (
        '2026/01/01 10:00:00 - mmengine - INFO - \n'
        '    Python: 3.11.7 (main)\n    GPU 0: A card\n'
        'a step costs about 2.04 times the plain one (FLOPs at 256 x 256)\n'
        '2026/01/01 10:00:01 - mmengine - WARNING - look here\n'
        '2026/01/01 10:02:30 - mmengine - INFO - done\n'
    )
    folder = write_run(
        tmp_path / 'run',
        seed=3,
        train=train_lines(20, time=0.5),
        metrics=[
            {AP: 0.2, f'{AP}_l': -1.0, f'T/{AP}': 0.3, 'step': 1},
            {AP: 0.4, f'T/{AP}': 0.35, 'step': 2},
        ],
        log=log,
    )
    run = read_run(folder)
    assert run.seed == 3
    assert run.val[AP] == [(1, 0.2), (2, 0.4)]
    assert run.modes == ['', 'T']
    assert run.last(AP, 'T') == 0.35
    assert run.best(AP) == (2, 0.4)
    # COCO's -1 is no value.
    assert f'{AP}_l' not in run.val
    assert run.seconds == 150
    assert run.seconds_per_iter == 0.5
    assert run.facts['GPU 0'] == 'A card'
    assert run.facts['Cost of a step'].startswith('2.04 times')
    assert run.complaints == ['look here']
    assert run.checkpoint == folder / 'epoch_2.pth'
    assert run.remarks == []
    assert 'recipe.py' in run.command


def test_command__works_in_a_folder_with_a_blank(tmp_path):
    folder = write_run(tmp_path / 'my run', train=train_lines(2))
    words = shlex.split(read_run(folder).command)
    assert words[:3] == ['mim', 'train', 'era_mm']
    assert words[3].startswith(str(folder))
    assert words[4:] == ['--work-dir', f'{folder}_again']


def test_read_run__a_resumed_run_counts_each_step_once(tmp_path):
    folder = write_run(
        tmp_path / 'run',
        train=train_lines(15, loss=1.0),
        metrics=[{AP: 0.1, 'step': 1}],
        stamp='20260101_000000',
    )
    later = folder / '20260101_010000' / 'vis_data'
    later.mkdir(parents=True)
    lines = [
        *train_lines(10, start=11, loss=2.0),
        {AP: 0.3, 'step': 2},
    ]
    (later / 'scalars.json').write_text(
        '\n'.join(json.dumps(line) for line in lines)
    )
    run = read_run(folder)
    assert [step for step, _ in run.train['loss']] == list(range(1, 21))
    assert [v for _, v in run.train['loss']] == [1.0] * 10 + [2.0] * 10
    assert run.val[AP] == [(1, 0.1), (2, 0.3)]


def test_read_run__a_run_begun_anew_forgets_the_first(tmp_path):
    folder = write_run(
        tmp_path / 'run', train=train_lines(20), metrics=[{AP: 0.9, 'step': 2}]
    )
    later = folder / '20260102_000000' / 'vis_data'
    later.mkdir(parents=True)
    lines = [*train_lines(8, loss=5.0), {AP: 0.1, 'step': 1}]
    (later / 'scalars.json').write_text(
        '\n'.join(json.dumps(line) for line in lines)
    )
    run = read_run(folder)
    assert run.val[AP] == [(1, 0.1)]
    assert len(run.train['loss']) == 8
    assert any('unfinished' in remark for remark in run.remarks)


@pytest.mark.parametrize(
    ('spoil', 'said'),
    [
        (lambda f: shutil.rmtree(f / '20260101_000000'), 'no log of numbers'),
        (lambda f: (f / 'epoch_2.pth').unlink(), 'epoch_2.pth is not there'),
        (
            lambda f: [
                (f / 'recipe.py').unlink(),
                (f / '20260101_000000/vis_data/config.py').unlink(),
            ],
            'no config',
        ),
        (
            lambda f: (f / '20260101_000000/vis_data/scalars.json').write_text(
                '{"lr": 1, "step": 1, "iter": 1, "epoch": 1}\n{"ls'
            ),
            'are incomplete',
        ),
    ],
)
def test_read_run__says_what_is_missing(tmp_path, spoil, said):
    folder = write_run(
        tmp_path / 'run', train=train_lines(20), metrics=[{AP: 0.2, 'step': 2}]
    )
    spoil(folder)
    assert any(said in remark for remark in read_run(folder).remarks)


def test_read_run__not_a_number_is_named(tmp_path):
    folder = write_run(
        tmp_path / 'run',
        train=train_lines(20, loss=lambda s: math.nan if s > 7 else 1.0),
        metrics=[{AP: 0.2, 'step': 2}],
    )
    (remark,) = read_run(folder).remarks
    assert 'loss is not a finite number from iteration 8 on' in remark


def test_read_run__writes_nothing(tmp_path):
    folder = write_run(tmp_path / 'run', train=train_lines(20))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
    read_run(folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob('*')} == before


def test_read_run__no_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match='not there'):
        read_run(tmp_path / 'nothing')


@pytest.fixture
def five(tmp_path):
    """A teacher, plain seeds 0 and 1, ERA seeds 1 and 2, a test."""
    teacher = write_run(
        tmp_path / 'big',
        model="dict(type='RetinaNet', backbone=dict(depth=101))",
        metrics=[{AP: 0.6, 'step': 2}],
        train=train_lines(20),
    )
    for seed, value in ((0, 0.30), (1, 0.32)):
        write_run(
            tmp_path / f'plain_s{seed}',
            seed=seed,
            metrics=[{AP: value, 'step': 2}],
            train=train_lines(20),
        )
    for seed, value in ((1, 0.40), (2, 0.44)):
        write_run(
            tmp_path / f'era_s{seed}',
            model=distilled(teacher / 'epoch_2.pth'),
            seed=seed,
            metrics=[{AP: value, f'T/{AP}': value - 0.01, 'step': 2}],
            train=train_lines(20),
        )
    test = tmp_path / 'test_era'
    stamp = '20260103_000000'
    (test / stamp / 'vis_data').mkdir(parents=True)
    (test / stamp / 'vis_data/config.py').write_text(
        f"model = {STUDENT}\nload_from = '{tmp_path}/era_s1/epoch_2.pth'\n"
    )
    (test / stamp / f'{stamp}.json').write_text(json.dumps({AP: 0.39}))
    return tmp_path


def folders(root, *names):
    return [root / name for name in names]


def test_compare_runs__sorts_into_roles_and_seeds(five):
    found = compare_runs(
        folders(five, 'era_s1', 'era_s2', 'plain_s0', 'plain_s1', 'test_era')
    )
    # The teacher's run is found by its checkpoint.
    assert [(g.name, g.role, len(g.runs)) for g in found.groups] == [
        ('teacher', 'teacher', 1),
        ('plain', 'plain', 2),
        ('era', 'distilled', 2),
    ]
    assert found.metric == AP
    assert found.plain.name == 'plain'
    assert found.remarks == []
    era = found.groups[-1]
    assert era.tests(AP) == [0.39]
    # Seed 1 alone is in both.
    assert found.differences(era, AP) == [pytest.approx(0.08)]
    assert found.differences(era, AP, 'T') == [pytest.approx(0.07)]


def test_compare_runs__without_common_seeds_to_the_mean(five):
    found = compare_runs(folders(five, 'era_s2', 'plain_s0', 'plain_s1'))
    era = found.groups[-1]
    assert found.differences(era, AP) == [pytest.approx(0.44 - 0.31)]


def test_compare_runs__says_what_is_not_alike(five):
    longer = write_run(
        five / 'longer',
        epochs=4,
        metrics=[{AP: 0.4, 'step': 4}],
        train=train_lines(40),
    )
    found = compare_runs([five / 'era_s1', longer])
    assert any(
        'era_s1 was trained for 2' in remark for remark in found.remarks
    )
    other = write_run(
        five / 'other',
        model="dict(type='FCOS')",
        metrics=[{AP: 0.4, 'step': 2}],
        train=train_lines(20),
    )
    found = compare_runs([five / 'era_s1', other])
    assert any('another student' in remark for remark in found.remarks)


def test_compare_runs__alone_says_what_is_missing(five):
    shutil.rmtree(five / 'big')
    found = compare_runs(folders(five, 'era_s1'))
    assert found.plain is None
    assert any('no plain run' in remark for remark in found.remarks)
    assert any("teacher's run is not" in remark for remark in found.remarks)


def test_compare_runs__a_test_of_another_run_is_left_out(five):
    found = compare_runs(folders(five, 'era_s2', 'test_era'))
    assert any(
        'belongs to none of the runs' in remark for remark in found.remarks
    )


def test_compare_runs__names_a_failed_seed(tmp_path):
    for seed, value in enumerate((0.5, 0.0, 0.52)):
        write_run(
            tmp_path / f'plain_s{seed}',
            seed=seed,
            metrics=[{AP: value, 'step': 2}],
            train=train_lines(20),
        )
    found = compare_runs(sorted(tmp_path.iterdir()))
    assert [run.name for _, run in found.failed] == ['plain_s1']
    assert 'plain_s1 failed: AP 0.0' in found.remarks[0]
