"""The table at a run's end, from work dirs written by hand."""

import shlex

import pytest
from mmengine.config import Config

from era_mm import cli
from era_mm.engine.run_table_hook import (
    RunTableHook,
    add_run_table,
    table_of,
)
from era_mm.errors import UserError
from era_mm.testing.work_dirs import distilled, train_lines, write_run

AP = 'coco/bbox_mAP'


@pytest.fixture
def kin(tmp_path):
    """An ERA run of seed 1, plain runs of seeds 0 and 1, and others."""
    era = write_run(
        tmp_path / 'era',
        model=distilled(),
        seed=1,
        metrics=[
            {AP: 0.45, f'T/{AP}': 0.40, 'step': 1},
            {AP: 0.42, f'T/{AP}': 0.41, 'step': 2},
        ],
        train=train_lines(20),
    )
    for name, seed, value, epochs in (
        ('a', 0, 0.30, 2),
        ('b', 1, 0.31, 2),
        ('longer', 1, 0.35, 4),
    ):
        write_run(
            tmp_path / name,
            seed=seed,
            epochs=epochs,
            metrics=[{AP: value, 'step': 2}],
            train=train_lines(20),
        )
    write_run(
        tmp_path / 'other',
        model="dict(type='FCOS')",
        seed=1,
        metrics=[{AP: 0.9, 'step': 2}],
        train=train_lines(20),
    )
    return era


def test_table__modes_plain_of_the_same_seed_and_what_to_do(kin):
    lines = table_of(kin)
    cells = {line[:20].strip(): line[20:].split() for line in lines}
    assert cells['plain student'] == [
        '31.0',
        '31.0',
        '2',
        str(kin.parent / 'b'),
    ]
    assert cells['student, S'] == ['42.0', '45.0', '1']
    assert cells['T'] == ['41.0', '41.0', '2']
    assert cells['its file'] == [str(kin / 'epoch_2.pth')]
    # Commands that the command line knows.
    for name in ('as a stock model', 'as a report'):
        assert cells[name][:3] == ['python', '-m', 'era_mm']
        assert cells[name][3] in cli.COMMANDS
    assert 'export_student' in cells['as a stock model']
    assert str(kin.parent / 'b') in cells['as a report']


def test_table__commands_work_in_a_folder_with_a_blank(kin):
    folder = kin.rename(kin.parent / 'my era')
    (config,) = folder.glob('*.py')
    cells = {line[:20].strip(): line[20:] for line in table_of(folder)}
    words = shlex.split(cells['as a stock model'])
    assert words[3:] == [
        'export_student',
        str(config),
        str(folder / 'epoch_2.pth'),
        '--out',
        str(folder / 'student'),
    ]
    words = shlex.split(cells['as a report'])
    assert words[4] == str(folder)
    assert words[-1] == 'my era.html'


def test_table__plain_as_the_config_says(kin):
    lines = table_of(kin, plain=str(kin.parent / 'longer'))
    assert any('35.0' in line for line in lines)


def test_table__without_metrics(tmp_path):
    run = write_run(tmp_path / 'run', train=train_lines(20))
    assert table_of(run)[0] == 'no metrics of validation were logged'


def test_hook__refuses_no_folder(tmp_path):
    with pytest.raises(UserError, match=r'report\.plain'):
        RunTableHook(plain=str(tmp_path / 'nothing'))


def test_add_run_table__as_the_config_says():
    class Runner:
        hooks = []

        def register_hook(self, hook):
            self.hooks.append(hook)

    runner = Runner()
    add_run_table(runner, Config(dict(report=False)))
    assert runner.hooks == []
    add_run_table(runner, Config(dict()))
    assert isinstance(runner.hooks[0], RunTableHook)
    with pytest.raises(UserError, match='report: expected'):
        add_run_table(runner, Config(dict(report='yes')))
