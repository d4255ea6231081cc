"""Runs that are killed in the midst of writing, and go on."""

import contextlib
import itertools
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS, METRICS, MODELS
from mmengine.visualization import LocalVisBackend

from era_mm import cli
from era_mm.core import extras_of
from era_mm.core.safe_files import load_file
from era_mm.core.utils import run_seed
from era_mm.engine import whole_files, work_dir
from era_mm.engine.whole_files import (
    WholeFileBackend,
    write_or_tell,
    write_whole,
)
from era_mm.engine.work_dir import held, newest_whole
from era_mm.errors import UserError
from era_mm.testing import (
    classifier_config,
    classifier_loader,
    run_config,
    save_teacher,
    write_class_folders,
)

NUMBERS = itertools.count()
STRIDE = int(os.environ.get('ERA_MM_SOAK_STRIDE', '7'))


@METRICS.register_module(force=True)
class RisingMetric(BaseMetric):
    """Each validation is better than the one before."""

    def process(self, data_batch, data_samples):
        self.results += [0] * len(data_samples)

    def compute_metrics(self, results):
        hub = MessageHub.get_current_instance()
        return dict(score=float(hub.get_info('iter')))


class Killed(BaseException):
    """What no `except Exception` catches, as a kill."""


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '0')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A distillation of three epochs of three steps, in a file."""
    folder = tmp_path_factory.mktemp('survival')
    data = write_class_folders(folder / 'data')
    teacher = classifier_config(width=16)
    loader = classifier_loader(data)
    cfg = run_config(
        dict(
            type='era_mm.Distillation',
            student=classifier_config(),
            teacher=dict(
                config=teacher,
                checkpoint=save_teacher(
                    teacher, folder / 't.pth', 'mmpretrain'
                ),
            ),
            distiller=dict(type='era_mm.ERADistiller'),
        ),
        '',
        'unset',
        default_scope='mmpretrain',
        train_dataloader=loader,
        val_dataloader=loader,
        val_evaluator=dict(type='RisingMetric'),
        test_cfg=None,
        test_dataloader=None,
        test_evaluator=None,
        train_cfg=dict(by_epoch=True, max_epochs=3, val_interval=1),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook',
                interval=1,
                max_keep_ckpts=1,
                save_best='score',
                rule='greater',
            )
        ),
        preflight=False,
    )
    Config(cfg.to_dict()).dump(folder / 'toy.py')
    return str(folder / 'toy.py')


def train(config, folder, *arguments, **options):
    """The command's status; runs of one second must not share their log."""
    options['experiment_name'] = f'survival{next(NUMBERS)}'
    return cli.run_train(
        [
            *(config, '--work-dir', str(folder), *arguments, '--cfg-options'),
            *(f'{key}={value}' for key, value in options.items()),
        ]
    )


def go_on(config, folder, **options):
    """Resume, or begin where nothing was written yet."""
    begun = any(p for p in work_dir.checkpoints_in(folder))
    return train(config, folder, *(['--resume'] if begun else []), **options)


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
    os.environ['LOCAL_RANK'] = '0'
    folder = tmp_path_factory.mktemp('whole') / 'run'
    assert train(config, folder) == 0
    return folder


def check_same(folder, whole):
    """The same files with the same weights and states, and no parts."""
    names = {p.name for p in folder.iterdir() if p.suffix == '.pth'}
    assert {'epoch_3.pth', 'best_score_epoch_3.pth'} <= names
    assert not list(whole_files.parts_in(folder))
    for name in ('epoch_3.pth', 'best_score_epoch_3.pth'):
        own, other = load_file(folder / name), load_file(whole / name)
        for key, value in other['state_dict'].items():
            assert torch.equal(own['state_dict'][key], value), (name, key)
        assert own['meta']['iter'] == other['meta']['iter'] == 9
    own = load_file(folder / 'epoch_3.pth')
    other = load_file(whole / 'epoch_3.pth')
    for number, state in other['optimizer']['state'].items():
        momentum = own['optimizer']['state'][number]['momentum_buffer']
        assert torch.equal(momentum, state['momentum_buffer'])
    pointer = (folder / 'last_checkpoint').read_text()
    assert Path(pointer).name == 'epoch_3.pth'


class KillAt:
    """Kills at the n-th moment around a write or a removal."""

    def __init__(self, monkeypatch, moment):
        self.left = moment
        self.where = ''
        monkeypatch.setattr(whole_files, 'open', self._open, raising=False)
        monkeypatch.setattr(whole_files, 'os', self)
        remove = WholeFileBackend.remove

        def removing(backend, path):
            self._pass(f'before removing {path}')
            remove(backend, path)
            self._pass(f'after removing {path}')

        monkeypatch.setattr(WholeFileBackend, 'remove', removing)

    def __getattr__(self, name):
        return getattr(os, name)

    def _pass(self, where):
        self.left -= 1
        if self.left < 0 and not self.where:
            self.where = where
            raise Killed(where)

    def _open(self, path, mode):
        file = open(path, mode)
        write = file.write
        outer = self

        class Half:
            def write(self, content):
                write(content[: len(content) // 2])
                file.flush()
                outer._pass(f'half-way through {path}')
                write(content[len(content) // 2 :])

            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *args):
                file.close()

        return Half()

    def replace(self, part, path):
        self._pass(f'before renaming {path}')
        os.replace(part, path)
        self._pass(f'after renaming {path}')


def boundaries(config, folder, monkeypatch):
    """How many moments a whole run has."""
    with monkeypatch.context() as patch:
        killer = KillAt(patch, 10_000)
        assert train(config, folder) == 0
        return 10_000 - killer.left


@pytest.mark.slow
def test_kills__at_every_write_boundary_resume_as_the_whole_run(
    config, whole, tmp_path, monkeypatch
):
    total = boundaries(config, tmp_path / 'counted', monkeypatch)
    # Config, and by epoch: file, pointer, best, file, pointer; removals.
    assert total >= 3 * (1 + 3 * 5) + 2 * 2 * 2
    # All of them, one after the other, are tried by `make soak`.
    for moment in range(0, total, STRIDE):
        folder = tmp_path / str(moment)
        with monkeypatch.context() as patch:
            killer = KillAt(patch, moment)
            with pytest.raises(Killed):
                train(config, folder)
        pointer = folder / 'last_checkpoint'
        if pointer.is_file():
            # What mmengine's own resume reads names a whole file, too.
            load_file(folder / Path(pointer.read_text()).name)
        assert go_on(config, folder) == 0, killer.where
        check_same(folder, whole)
        shutil.rmtree(folder)


def test_checkpoints__are_those_of_mmengines_hook(whole):
    names = {p.name for p in whole.iterdir() if p.suffix == '.pth'}
    assert names == {'epoch_3.pth', 'best_score_epoch_3.pth'}


def test_save_best__of_an_unknown_name_is_said_and_nothing_is_lost(
    config, whole, tmp_path, capsys
):
    folder = tmp_path / 'run'
    options = {'default_hooks.checkpoint.save_best': 'scroe'}
    assert train(config, folder, **options) == 1
    printed = capsys.readouterr().err
    assert "save_best: expected a metric of the validation, but 'scroe'" in (
        printed
    )
    assert 'it gave score.' in printed
    assert f'{folder}/epoch_1.pth is whole' in printed
    assert 'Traceback' not in printed
    assert train(config, folder, '--resume') == 0
    check_same(folder, whole)


def test_save_best__is_left_out_where_its_metric_was_not_given(
    config, tmp_path
):
    """COCO's gives none for a student that finds nothing yet."""
    folder = tmp_path / 'run'
    options = {'default_hooks.checkpoint.save_best': 'coco/bbox_mAP'}
    assert train(config, folder, **options) == 0
    assert (folder / 'epoch_3.pth').is_file()
    assert not list(folder.glob('best_*'))
    (log,) = folder.glob('*/*.log')
    # mmengine logs a warning once.
    assert "'coco/bbox_mAP' is none; it gave score. No best file" in (
        log.read_text()
    )


def test_write_whole__leaves_the_old_content_on_an_error(
    tmp_path, monkeypatch
):
    file = tmp_path / 'f'
    write_whole(file, b'old')

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(whole_files.os, 'fsync', full)
    with pytest.raises(OSError, match='No space'):
        write_whole(file, b'new')
    assert file.read_bytes() == b'old'
    assert [p.name for p in tmp_path.iterdir()] == ['f']


def test_full_disk__names_the_file_and_what_is_left(
    config, whole, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(whole, tmp_path / 'run')
    fsync = os.fsync

    def full(descriptor):
        if 'epoch_4' in os.readlink(f'/proc/self/fd/{descriptor}'):
            raise OSError(28, 'No space left on device')
        fsync(descriptor)

    monkeypatch.setattr(whole_files.os, 'fsync', full)
    options = {'train_cfg.max_epochs': 4}
    assert train(config, folder, '--resume', **options) == 1
    printed = capsys.readouterr().err
    assert 'epoch_4.pth' in printed
    assert 'No space left' in printed
    assert f'{folder}/epoch_3.pth is whole' in printed


def test_full_disk__is_said_of_what_hosts_write(
    config, whole, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(whole, tmp_path / 'run')

    def full(backend, scalars, *args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(LocalVisBackend, 'add_scalars', full)
    options = {'train_cfg.max_epochs': 4}
    assert train(config, folder, '--resume', **options) == 1
    printed = capsys.readouterr().err.rpartition('\nerror: ')[2]
    assert 'a file of the run cannot be written: No space left' in printed
    assert f'{folder}/epoch_3.pth is whole: make room' in printed
    assert 'whole traceback' not in printed


def test_full_disk__of_a_file_that_is_written_again_says_it_is_the_former(
    tmp_path, whole, monkeypatch
):
    file = shutil.copy(whole / 'epoch_3.pth', tmp_path / 'epoch_3.pth')

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(whole_files.os, 'fsync', full)
    said = rf'{file} \(.*\. {file} is whole, as it was written before: make'
    with pytest.raises(UserError, match=said):
        write_or_tell(file, b'new')
    assert load_file(file)['meta']['iter'] == 9


def test_read_only_disk__is_said_before_the_first_step(
    config, tmp_path, monkeypatch, capsys
):
    def refuse(descriptor):
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr(whole_files.os, 'fsync', refuse)
    assert train(config, tmp_path / 'run') == 1
    printed = capsys.readouterr().err.rpartition('\nerror: ')[2]
    assert 'Read-only file system. There is no checkpoint' in printed
    assert str(tmp_path / 'run') in printed


def test_work_dir__that_is_a_file_is_refused(config, tmp_path, capsys):
    file = tmp_path / 'run'
    file.write_text('')
    assert train(config, file) == 1
    printed = capsys.readouterr().err
    assert f'nothing can be written into {file} (File exists)' in printed
    assert 'Traceback' not in printed
    assert 'whole traceback' not in printed


# -- what --resume takes -----------------------------------------------------


def test_resume__takes_the_newest_whole_file_and_names_the_others(
    config, tmp_path, caplog
):
    folder = tmp_path / 'run'
    keep = {'default_hooks.checkpoint.max_keep_ckpts': -1}
    assert train(config, folder, **keep) == 0
    newest = folder / 'epoch_3.pth'
    newest.write_bytes(newest.read_bytes()[:5000])
    (folder / 'epoch_7.pth').write_bytes(b'')
    (folder / 'last_checkpoint').write_text('')
    found, passed = newest_whole(folder)
    assert found == folder / 'epoch_2.pth'
    assert [line.split(':')[0] for line in passed] == [
        str(folder / 'epoch_7.pth'),
        str(folder / 'epoch_3.pth'),
    ]
    with caplog.at_level(logging.WARNING):
        assert train(config, folder, '--resume', **keep) == 0
    assert load_file(newest)['meta']['iter'] == 9


def test_resume__finds_a_moved_work_dir(config, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / 'moved')
    options = {'train_cfg.max_epochs': 4}
    assert train(config, folder, '--resume', **options) == 0
    names = {p.name for p in folder.iterdir() if p.suffix == '.pth'}
    assert names == {'epoch_4.pth', 'best_score_epoch_4.pth'}
    # The copy has removed its own best file, not the original's.
    assert (whole / 'best_score_epoch_3.pth').is_file()


@pytest.mark.parametrize('empty', [True, False])
def test_resume__with_nothing_to_resume_is_refused(
    config, empty, tmp_path, capsys
):
    if not empty:
        (tmp_path / 'run').mkdir()
        (tmp_path / 'run' / 'epoch_1.pth').write_bytes(b'PK')
    assert train(config, tmp_path / 'run', '--resume') == 1
    printed = capsys.readouterr().err
    assert '--resume: expected a whole checkpoint' in printed
    assert str(tmp_path / 'run') in printed
    assert ('epoch_1.pth' in printed) != empty


def test_train__over_a_former_run_is_refused(config, whole, capsys):
    before = sorted(p.name for p in whole.iterdir())
    assert train(config, whole) == 1
    assert 'former run (epoch_3.pth)' in capsys.readouterr().err
    assert sorted(p.name for p in whole.iterdir()) == before


def test_train__in_a_work_dir_in_use_is_refused(config, tmp_path, capsys):
    with held(tmp_path / 'run'):
        assert train(config, tmp_path / 'run') == 1
    assert 'another run uses' in capsys.readouterr().err
    with held(tmp_path / 'run'):
        pass


def test_resume__inside_an_epoch_goes_on_where_it_was(
    config, whole, tmp_path, monkeypatch
):
    options = {
        'default_hooks.checkpoint.by_epoch': False,
        'default_hooks.checkpoint.save_best': None,
        'train_cfg.val_interval': 9,
    }
    for stop in (4, 5, 6):
        folder = tmp_path / str(stop)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kill_after(patch, f'iter_{stop}')
            train(config, folder, **options)
        assert (folder / f'iter_{stop}.pth').is_file()
        assert train(config, folder, '--resume', **options) == 0
        own = load_file(folder / 'iter_9.pth')
        other = load_file(whole / 'epoch_3.pth')
        for key, value in other['state_dict'].items():
            assert torch.equal(own['state_dict'][key], value), (stop, key)
        assert own['meta']['iter'] == 9


def test_resume__after_a_kill_in_the_last_validation_validates(
    config, whole, tmp_path, monkeypatch
):
    folder = tmp_path / 'run'
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        kill_after(patch, 'epoch_3')
        train(config, folder)
    names = {file.name for file in folder.glob('*.pth')}
    # The second epoch's would have been removed next.
    assert names - {'epoch_2.pth'} == {'epoch_3.pth', 'best_score_epoch_2.pth'}
    assert train(config, folder, '--resume') == 0
    check_same(folder, whole)


def test_resume__that_is_refused_leaves_the_former_config(
    config, whole, tmp_path
):
    folder = shutil.copytree(whole, tmp_path / 'run')
    (former,) = folder.glob('*.py')
    text = former.read_text()
    # Found when everything is built.
    spoil(folder / 'epoch_3.pth', of_another_method)
    longer = {'train_cfg.max_epochs': 4}
    assert train(config, folder, '--resume', **longer) == 1
    assert former.read_text() == text


def test_resume__between_two_updates_is_said_to_lose_gradients(
    config, tmp_path
):
    folder = tmp_path / 'run'
    options = {'optim_wrapper.accumulative_counts': 2}
    assert train(config, folder, **options) == 0
    (log,) = folder.glob('*/*.log')
    said = 'written every 3 iterations, but the weights are updated every 2'
    assert said in log.read_text()


def kill_after(patch, file):
    """Kill when a checkpoint is whole, before what follows."""

    def killing(path, content):
        write_whole(path, content)
        if Path(path).name == 'last_checkpoint' and (
            content.decode().endswith(f'{file}.pth')
        ):
            raise Killed

    patch.setattr('era_mm.engine.checkpoint_hook.write_or_tell', killing)


def test_resume__inside_an_epoch_of_another_length_is_refused(
    config, tmp_path, monkeypatch, capsys
):
    options = {
        'default_hooks.checkpoint.by_epoch': False,
        'default_hooks.checkpoint.save_best': None,
    }
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        kill_after(patch, 'iter_4')
        train(config, tmp_path, **options)
    options['train_dataloader.batch_size'] = 3
    assert train(config, tmp_path, '--resume', **options) == 1
    printed = capsys.readouterr().err
    assert 'epoch 2, after 1 of 3 iterations, but now an epoch has 2' in (
        printed
    )


# -- strictness --------------------------------------------------------------


def spoil(file, change):
    content = load_file(file)
    change(content)
    torch.save(content, file)


def drop(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def put(value, *keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def without_extras(content):
    del content['state_dict']._metadata['']['era_mm']


def of_another_method(content):
    extras = content['state_dict']._metadata['']['era_mm']
    extras['distiller']['type'] = 'SoKDDistiller'


WEIGHT = ('state_dict', 'head.fc.weight')
SPOILT = {
    'other shapes': (put(torch.ones(3, 5), *WEIGHT), 'other shapes'),
    'missing': (drop(*WEIGHT), 'missing in the file (1): head.fc.weight'),
    'unknown': (
        put(torch.ones(1), 'state_dict', 'head.more'),
        'not in the model (1): head.more',
    ),
    'empty': (put({}, 'state_dict'), 'no state_dict'),
    'integers': (
        put(torch.ones(3, 64, dtype=torch.int64), *WEIGHT),
        'other kinds of numbers',
    ),
    'nan': (put(torch.full((3, 64), torch.nan), *WEIGHT), 'not finite'),
    'extras gone': (without_extras, "without the distillers' weights"),
    'another method': (of_another_method, 'it has weights of'),
    'no optimiser': (drop('optimizer'), 'no optimizer'),
    'no hub': (drop('message_hub'), 'no message_hub'),
    'no iteration': (drop('meta', 'iter'), 'meta.iter'),
    'negative': (put(-1, 'meta', 'epoch'), 'meta.epoch'),
    'no groups': (
        put(None, 'optimizer', 'param_groups'),
        'epoch_3.pth cannot be resumed from: TypeError',
    ),
    'schedules': (put([{}, {}], 'param_schedulers'), 'schedules'),
}


@pytest.mark.parametrize('name', SPOILT)
def test_resume__refuses_what_is_not_the_runs(
    name, config, whole, tmp_path, capsys
):
    change, said = SPOILT[name]
    folder = shutil.copytree(whole, tmp_path / 'run')
    options = {'train_cfg.max_epochs': 4}
    if name == 'schedules':
        options['param_scheduler.type'] = 'ConstantLR'
        options['param_scheduler.factor'] = 1.0
    spoil(folder / 'epoch_3.pth', change)
    file = str(folder / 'epoch_3.pth')
    assert train(config, folder, '--resume', file, **options) == 1
    printed = capsys.readouterr().err.split('error: ')[-1]
    assert said in printed
    assert 'epoch_3.pth' in printed
    assert 'Traceback' not in printed


def test_resume__of_a_plain_runs_file_names_the_command_that_starts_from_it(
    config, whole, tmp_path, capsys
):
    file = str(tmp_path / 'plain.pth')
    shutil.copy(whole / 'epoch_3.pth', file)
    spoil(file, without_extras)
    folder = tmp_path / 'run'
    options = {'train_cfg.max_epochs': 1}
    assert train(config, folder, '--resume', file, **options) == 1
    printed = capsys.readouterr().err.split('error: ')[-1]
    assert f'{file} is of a plain run' in printed
    command = shlex.split(printed.splitlines()[-1])
    assert command[:4] == ['python', '-m', 'era_mm', 'train']
    arguments = command[4:]
    assert arguments[:2] == [config, '--work-dir']
    assert arguments[2] == f'{folder}_new'
    name = f'experiment_name=survival{next(NUMBERS)}'
    assert cli.run_train([*arguments, name, 'train_cfg.max_epochs=1']) == 0
    assert Path(arguments[2], 'epoch_1.pth').is_file()
    # No option of mmengine can hold a blank.
    other = str(tmp_path / 'plain run.pth')
    shutil.move(file, other)
    assert train(config, folder, '--resume', other, **options) == 1
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.endswith(f'write into the config: load_from = {other!r}')


def test_resume__of_another_distillers_run_names_both(
    config, whole, tmp_path, capsys
):
    folder = shutil.copytree(whole, tmp_path / 'run')
    spoil(folder / 'epoch_3.pth', of_another_method)
    options = {'train_cfg.max_epochs': 4}
    assert train(config, folder, '--resume', **options) == 1
    printed = capsys.readouterr().err.split('error: ')[-1]
    assert "'distiller' (SoKDDistiller)" in printed
    assert "the config has 'distiller' (ERADistiller)" in printed


def test_resume__of_other_parameters_says_so_where_it_is_not_strict(
    config, whole, tmp_path, capsys
):
    file = str(tmp_path / 'plain.pth')
    shutil.copy(whole / 'epoch_3.pth', file)

    def as_plain(content):
        without_extras(content)
        groups = content['optimizer']['param_groups']
        groups[0]['params'] = groups[0]['params'][:-2]

    spoil(file, as_plain)
    options = {'strict_load': False}
    assert train(config, tmp_path / 'a', '--resume', file, **options) == 1
    printed = capsys.readouterr().err.split('error: ')[-1]
    assert 'its optimiser has other parameters than this run' in printed
    assert f'load_from={file}' in printed


def test_published__file_is_the_plain_students(config, tmp_path):
    options = {
        'train_cfg.max_epochs': 1,
        'default_hooks.checkpoint.published_keys': "['meta','state_dict']",
    }
    folder = tmp_path / 'run'
    assert train(config, folder, **options) == 0
    whole_file = load_file(folder / 'epoch_1.pth')
    published = sorted(folder.glob('*-????????.pth'))
    # The last and the best.
    assert len(published) == 2
    for file in published:
        content = torch.load(file, weights_only=False)
        assert set(content) == {'meta', 'state_dict'}
        state = content['state_dict']
        assert list(state) == list(whole_file['state_dict'])
        assert extras_of(state) is None
    assert extras_of(whole_file['state_dict'])
    # The student's numbers and no other: what a plain run would publish.
    numbers = sum(value.numel() for value in state.values())
    model = MODELS.build(classifier_config())
    assert numbers == sum(v.numel() for v in model.state_dict().values())


def test_load_from__refuses_what_does_not_fit_unless_asked(
    config, whole, tmp_path, capsys
):
    file = shutil.copy(whole / 'best_score_epoch_3.pth', tmp_path / 'f.pth')
    spoil(file, put(torch.ones(5, 64), *WEIGHT))
    options = {'load_from': file, 'train_cfg.max_epochs': 1}
    assert train(config, tmp_path / 'a', **options) == 1
    printed = capsys.readouterr().err
    assert 'head.fc.weight: file (5, 64), model (3, 64)' in printed
    assert 'strict_load=False' in printed
    assert train(config, tmp_path / 'b', strict_load=False, **options) == 0


def test_load_from__takes_what_the_host_takes(config, whole, tmp_path, capsys):
    """Averages beside the model are named; a deeper model's are refused."""
    options = {'train_cfg.max_epochs': 1}
    file = shutil.copy(whole / 'best_score_epoch_3.pth', tmp_path / 'f.pth')
    spoil(file, put(torch.ones(1), 'state_dict', 'ema_head_fc_bias'))
    options['load_from'] = file
    assert train(config, tmp_path / 'a', **options) == 0
    log = next((tmp_path / 'a').glob('*/*.log')).read_text()
    assert (
        'f.pth has 1 tensors that Distillation does not use: ema_head_fc_bias.'
    ) in log
    spoil(file, put(torch.ones(1), 'state_dict', 'head.more.bias'))
    assert train(config, tmp_path / 'b', **options) == 1
    printed = capsys.readouterr().err
    assert 'not in the model (2): ' in printed
    assert 'head.more.bias' in printed


def test_load_from__takes_a_plain_student(config, whole, tmp_path):
    file = shutil.copy(whole / 'best_score_epoch_3.pth', tmp_path / 'f.pth')
    spoil(file, without_extras)
    options = {'load_from': file, 'train_cfg.max_epochs': 1}
    assert train(config, tmp_path / 'run', **options) == 0


@pytest.mark.parametrize(('number', 'newest'), [(5, 'epoch_3'), (12, 'iter')])
def test_newest_whole__is_by_iteration_whatever_the_name(
    number, newest, whole, tmp_path
):
    shutil.copy(whole / 'epoch_3.pth', tmp_path)
    file = shutil.copy(whole / 'epoch_3.pth', tmp_path / f'iter_{number}.pth')
    spoil(file, put(number, 'meta', 'iter'))
    found, passed = newest_whole(tmp_path)
    assert found.name.startswith(newest)
    assert passed == []


def test_newest_whole__of_an_empty_folder_is_none(tmp_path):
    assert newest_whole(tmp_path) == (None, [])


# -- signals and numbers -----------------------------------------------------


@HOOKS.register_module(force=True)
class AtIterationHook(Hook):
    """Does something before an iteration, counted from 0."""

    def __init__(self, iteration, what):
        self.iteration, self.what = iteration, what

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter != self.iteration:
            return
        if self.what == 'nan gradient':
            parameter = next(runner.model.student.parameters())
            parameter.register_hook(
                lambda gradient: (
                    gradient * torch.nan
                    if runner.iter == self.iteration
                    else gradient
                )
            )
        elif self.what == 'nan':
            next(runner.model.student.parameters()).data.fill_(torch.nan)
        else:
            for name in self.what.split():
                os.kill(os.getpid(), getattr(signal, name))


@pytest.fixture
def at_iteration(config, tmp_path):
    """A config that does something in its fifth step."""

    def write(what):
        cfg = Config.fromfile(config)
        cfg.custom_hooks = [
            dict(type='AtIterationHook', iteration=4, what=what)
        ]
        cfg.dump(tmp_path / 'at.py')
        return str(tmp_path / 'at.py')

    return write


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_signal__writes_a_checkpoint_from_which_the_run_goes_on(
    name, config, whole, at_iteration, tmp_path, capsys
):
    folder = tmp_path / 'run'
    before = signal.getsignal(getattr(signal, name))
    status = train(at_iteration(name), folder)
    assert status == 128 + getattr(signal, name)
    assert signal.getsignal(getattr(signal, name)) == before
    printed = capsys.readouterr().err
    assert f'stopped by {name}; --resume continues from' in printed
    assert 'Traceback' not in printed
    # The step under way was ended.
    assert load_file(folder / 'iter_5.pth')['meta']['iter'] == 5
    pointer = (folder / 'last_checkpoint').read_text()
    assert Path(pointer).name == 'iter_5.pth'
    assert train(config, folder, '--resume') == 0
    check_same(folder, whole)


def test_signal__while_gradients_are_gathered_waits_for_the_update(
    config, at_iteration, tmp_path
):
    options = {'optim_wrapper.accumulative_counts': 2}
    assert train(config, tmp_path / 'whole', **options) == 0
    folder = tmp_path / 'run'
    status = train(at_iteration('SIGTERM'), folder, **options)
    assert status == 128 + signal.SIGTERM
    # After the fifth step one batch is gathered, which no file would have.
    (file,) = folder.glob('iter_*.pth')
    assert file.name == 'iter_6.pth'
    assert train(config, folder, '--resume', **options) == 0
    check_same(folder, tmp_path / 'whole')


def test_signal__that_comes_twice_is_not_held_up(at_iteration, tmp_path):
    heard = []
    before = signal.signal(
        signal.SIGTERM, lambda number, frame: heard.append(number)
    )
    try:
        status = train(at_iteration('SIGTERM SIGTERM'), tmp_path / 'run')
    finally:
        signal.signal(signal.SIGTERM, before)
    # The first is the hook's, the second whoever's it was before.
    assert heard == [signal.SIGTERM]
    assert status == 128 + signal.SIGTERM


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_signal__to_the_whole_group_ends_run_and_workers(
    name, config, tmp_path
):
    """As ``timeout`` and batch systems send it: data workers get it too."""
    cfg = Config.fromfile(config)
    cfg.train_cfg.max_epochs = 10000
    # Its metric is known here alone.
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint.pop('save_best')
    cfg.train_dataloader |= dict(num_workers=1, persistent_workers=True)
    cfg.dump(tmp_path / 'long.py')
    folder = tmp_path / 'run'
    with open(tmp_path / 'log', 'w') as log:
        run = subprocess.Popen(
            [
                *(sys.executable, '-m', 'era_mm', 'train'),
                *(str(tmp_path / 'long.py'), '--work-dir', str(folder)),
            ],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            for _ in range(600):
                if any(folder.glob('epoch_*')) or run.poll() is not None:
                    break
                time.sleep(0.2)
            os.killpg(run.pid, getattr(signal, name))
            status = run.wait(timeout=60)
        finally:
            # Whoever is left of the group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    printed = (tmp_path / 'log').read_text()
    assert f'stopped by {name}; --resume continues from' in printed
    assert status == 128 + getattr(signal, name)
    assert 'DataLoader worker' not in printed
    assert list(folder.glob('iter_*.pth'))


def test_ctrl_c__is_said_in_one_line(at_iteration, tmp_path, capsys):
    # Shells let jobs in the background ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert train(at_iteration('SIGINT'), tmp_path / 'run') == 130
    finally:
        signal.signal(signal.SIGINT, before)
    printed = capsys.readouterr().err
    assert 'stopped by Ctrl-C; --resume goes on' in printed
    assert 'Traceback' not in printed


def test_nan__is_named_and_no_file_has_it(at_iteration, tmp_path, capsys):
    folder = tmp_path / 'run'
    assert train(at_iteration('nan'), folder) == 1
    printed = capsys.readouterr().err.split('error: ')[-1]
    assert 'in iteration 5 loss_' in printed
    assert ' is nan' in printed
    assert printed.count('.png') == 2
    assert 'Traceback' not in printed
    # The file of the second epoch would have held it.
    newest, passed = newest_whole(folder)
    assert (newest.name, passed) == ('epoch_1.pth', [])


def test_nan__is_left_out_if_asked(at_iteration, tmp_path):
    folder = tmp_path / 'run'
    options = {'check_finite.action': 'skip'}
    assert train(at_iteration('nan gradient'), folder, **options) == 0
    (log,) = folder.glob('*/*.log')
    assert 'in iteration 5 gradients are not finite' in log.read_text()
    assert '1 of 9 steps were left out' in log.read_text()
    weights = load_file(folder / 'epoch_3.pth')['state_dict']
    assert all(value.isfinite().all() for value in weights.values())


def test_teacher_of_nan__is_refused_before_the_first_step(
    config, tmp_path, capsys
):
    cfg = Config.fromfile(config)
    file = shutil.copy(cfg.model.teacher.checkpoint, tmp_path / 't.pth')
    spoil(
        file,
        lambda content: content['state_dict']['head.fc.weight'].fill_(
            torch.nan
        ),
    )
    options = {'model.teacher.checkpoint': file}
    assert train(config, tmp_path / 'run', **options) == 1
    printed = capsys.readouterr().err
    assert 'not finite (1): head.fc.weight' in printed


def test_run_seed__is_kept_with_the_run():
    torch.manual_seed(3)
    assert run_seed() == 3
    torch.manual_seed(4)
    assert run_seed() == 3
    assert MessageHub.get_current_instance().get_info('era_mm_seed') == 3
