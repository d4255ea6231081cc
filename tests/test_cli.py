"""The command line."""

from pathlib import Path

import pytest

from era_mm import cli
from era_mm.cli_parsers import train_parser
from era_mm.errors import UserError

# mmengine refuses it when the Runner is built: the train loop is missing.
CONFIG = """
default_scope = 'mmpretrain'
model = dict(type='ImageClassifier', backbone=dict(type='LeNet5'))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1))
"""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')


def test_main__hands_the_options_to_the_command(monkeypatch) -> None:
    seen = []
    monkeypatch.setitem(cli.COMMANDS, 'train', lambda argv: seen.append(argv))
    cli.main(['train', '-h', 'x.py', '--work-dir', 'y'])
    assert seen == [['-h', 'x.py', '--work-dir', 'y']]


def test_main__has_every_command_that_mim_has() -> None:
    tools = Path(cli.__file__).parents[1] / 'tools'
    # A suite needs a checkout.
    assert set(cli.COMMANDS) - {'suite'} == {
        file.stem
        for file in tools.glob('*.py')
        if 'from era_mm.cli import run_' in file.read_text()
    }


def test_main__without_a_command_prints_the_hosts(capsys) -> None:
    assert cli.main([]) == 0
    assert 'mmdet' in capsys.readouterr().out


def test_main__shows_the_commands(capsys) -> None:
    for argv, status in ((['-h'], 0), (['tain'], 2)):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == status
        assert 'make_config' in ''.join(capsys.readouterr())


def test_train__says_a_user_error_in_one_message(capsys) -> None:
    assert cli.run_train(['no_such_config.py']) == 1
    printed = capsys.readouterr().err
    assert printed.startswith('\nerror: config: expected the path')
    assert 'Traceback' not in printed


def test_train__says_an_error_of_the_hosts_in_one_message(
    capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    Path('toy.py').write_text(CONFIG)
    assert cli.run_train(['toy.py']) == 1
    last = capsys.readouterr().err.split('\nerror: ')[-1]
    assert last.startswith('the config: ValueError: train_dataloader, train_')
    assert last.endswith('--traceback prints where it was raised.\n')
    assert not list(tmp_path.glob('*.traceback.txt'))


def test_explain__keeps_the_traceback_of_what_nobody_foresaw(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    try:
        raise OSError('the machine is on fire')
    except OSError as error:
        message = cli._explain(error)
    assert message.startswith('\nerror: OSError: the machine is on fire\n')
    (kept,) = tmp_path.glob('*.traceback.txt')
    assert 'Traceback (most recent call last)' in kept.read_text()
    assert str(kept) in message


def test_explain__shows_a_key_error_without_quotes() -> None:
    message = cli._explain(KeyError("no 'neck'"))
    assert message.startswith("\nerror: KeyError: no 'neck'\n")


def test_train__raises_with_traceback() -> None:
    with pytest.raises(UserError):
        cli.run_train(['no_such_config.py', '--traceback'])


def test_train__refuses_auto_scale_lr_without_a_base(capsys) -> None:
    Path('toy.py').write_text(CONFIG)
    assert cli.run_train(['toy.py', '--auto-scale-lr']) == 1
    assert 'base_batch_size' in capsys.readouterr().err


@pytest.mark.parametrize(
    'option', ["a.b={'c': dict(d=1, e=2)}", 'a=[1,(2]', 'a=(1,2']
)
def test_train__refuses_an_option_that_cannot_be_read(option, capsys) -> None:
    Path('toy.py').write_text(CONFIG)
    assert cli.run_train(['toy.py', '--cfg-options', option]) == 1
    printed = capsys.readouterr().err
    assert f'cannot read {option!r}' in printed
    assert 'one by one: KEY.NAME=VALUE' in printed


def test_train__takes_options_of_one_dict_together() -> None:
    Path('toy.py').write_text(CONFIG)
    # Whatever comes first.
    options = ['optim_wrapper.a=[3,(4,5)]', 'optim_wrapper._delete_=True']
    cfg = cli._read_config('toy.py', options)
    assert cfg.optim_wrapper == dict(a=[3, (4, 5)])


def test_train__refuses_an_option_without_a_value(capsys) -> None:
    Path('toy.py').write_text(CONFIG)
    assert cli.run_train(['toy.py', '--cfg-options', 'a.b', '3']) == 1
    assert "got 'a.b'" in capsys.readouterr().err


def test_train__stops_before_it_writes_anything(tmp_path: Path) -> None:
    Path('toy.py').write_text(CONFIG)
    assert cli.run_train(['toy.py', '--resume', 'no.pth']) == 1
    assert [path.name for path in tmp_path.iterdir()] == ['toy.py']


def test_test__refuses_an_output_that_is_no_pickle(capsys) -> None:
    Path('toy.py').write_text(CONFIG)
    assert cli.run_test(['toy.py', 'x.pth', '--out', 'x.json']) == 1
    assert "got 'x.json'" in capsys.readouterr().err


def test_test__says_what_a_config_without_a_test_lacks(capsys) -> None:
    Path('toy.py').write_text(CONFIG)
    assert cli.run_test(['toy.py', 'x.pth']) == 1
    said = 'toy.py has no test_dataloader, test_cfg, test_evaluator, so'
    assert said in capsys.readouterr().err


@pytest.mark.parametrize('spelling', ['--local_rank=3', '--local-rank=3'])
def test_train__takes_both_spellings_of_the_rank(spelling: str) -> None:
    args = train_parser().parse_args(['x.py', spelling])
    assert args.local_rank == 3


def test_help__has_no_gpus_flag() -> None:
    # mim reads the help and would pass --gpus or --device on.
    assert '--gpus' not in train_parser().format_help()
