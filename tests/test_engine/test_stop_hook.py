"""Signals to runs of several ranks, and launchers that are gone."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from era_mm.core.safe_files import load_file
from era_mm.testing import (
    classifier_config,
    classifier_loader,
    run_config,
    save_teacher,
    write_class_folders,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc'),
]

#: As mim starts a launcher: no signal is handed on.
MIM = """
import subprocess, sys
subprocess.check_call(sys.argv[1:])
"""


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A distillation that ends by a signal alone."""
    folder = tmp_path_factory.mktemp('signals')
    teacher = classifier_config(width=16)
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
        # Six images: one step of each rank in an epoch.
        train_dataloader=classifier_loader(
            write_class_folders(folder / 'data'), batch_size=3
        ),
        train_cfg=dict(by_epoch=True, max_epochs=100000),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook', interval=2, max_keep_ckpts=1
            )
        ),
        preflight=False,
        **dict.fromkeys(
            f'{part}_{key}'
            for part in ('val', 'test')
            for key in ('cfg', 'dataloader', 'evaluator')
        ),
    )
    Config(cfg.to_dict()).dump(folder / 'long.py')
    return str(folder / 'long.py')


class Ranks:
    """Two ranks, and how they were started."""

    def __init__(self, config, folder, launcher):
        self.work_dir = folder / 'run'
        self.log = folder / 'log'
        command = [
            *('-m', 'era_mm', 'train', config, '--work-dir'),
            *(str(self.work_dir), '--launcher', 'pytorch'),
        ]
        torchrun = [
            *(sys.executable, '-m', 'torch.distributed.run'),
            *('--standalone', '--nproc-per-node=2', *command),
        ]
        if launcher == 'torchrun':
            self.started = [self.start(torchrun)]
        elif launcher == 'mim':
            script = folder / 'mim'
            script.write_text(MIM)
            self.started = [
                self.start([sys.executable, str(script), *torchrun])
            ]
        else:
            with socket.socket() as one:
                one.bind(('localhost', 0))
                port = str(one.getsockname()[1])
            self.started = [
                self.start(
                    [sys.executable, *command],
                    RANK=rank,
                    LOCAL_RANK=rank,
                    WORLD_SIZE='2',
                    MASTER_ADDR='localhost',
                    MASTER_PORT=port,
                )
                for rank in '01'
            ]

    def start(self, command, **variables):
        with self.log.open('a') as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=os.environ | variables,
                start_new_session=True,
            )

    def alive(self):
        """The ranks' ids, by what they were started with."""
        found = []
        for folder in Path('/proc').glob('[0-9]*'):
            with contextlib.suppress(OSError):
                words = (folder / 'cmdline').read_bytes().decode().split('\0')
                if (
                    str(self.work_dir) in words
                    and 'torch.distributed.run' not in words
                ):
                    found.append(int(folder.name))
        return found

    def wait_for(self, condition, seconds):
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, self.log.read_text()
            time.sleep(0.1)

    def wait_until_they_train(self):
        self.wait_for(
            lambda: (
                any(self.work_dir.glob('epoch_*.pth'))
                or any(p.poll() is not None for p in self.started)
            ),
            300,
        )
        # A program that a rank starts bears its words until it is loaded.
        self.wait_for(lambda: len(self.alive()) == 2, 10)


@pytest.fixture
def start(config, tmp_path):
    """Start two ranks, and end what is left of them."""
    started = []

    def begin(launcher):
        started.append(Ranks(config, tmp_path, launcher))
        started[0].wait_until_they_train()
        return started[0]

    yield begin
    for ranks in started:
        for number in (*ranks.alive(), *(p.pid for p in ranks.started)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        for process in ranks.started:
            process.wait()


def check_one_checkpoint(ranks):
    (file,) = ranks.work_dir.glob('iter_*.pth')
    content = load_file(file)
    assert content['meta']['iter'] == int(file.stem.removeprefix('iter_'))
    weights = content['state_dict'].values()
    assert all(torch.isfinite(value).all() for value in weights)
    pointer = (ranks.work_dir / 'last_checkpoint').read_text()
    assert Path(pointer).name == file.name


@pytest.mark.parametrize(
    ('name', 'told'), [('SIGTERM', [1]), ('SIGUSR1', [0]), ('SIGTERM', [0, 1])]
)
def test_signal__to_some_ranks_ends_all_with_one_checkpoint(name, told, start):
    ranks = start('none')
    number = getattr(signal, name)
    for rank in told:
        ranks.started[rank].send_signal(number)
    statuses = [process.wait(timeout=60) for process in ranks.started]
    printed = ranks.log.read_text()
    assert statuses == [128 + number] * 2, printed
    assert printed.count(f'stopped by {name}; --resume continues from') == 2
    assert 'Traceback' not in printed
    check_one_checkpoint(ranks)


def test_signal__to_the_launcher_ends_all_with_one_checkpoint(start):
    ranks = start('torchrun')
    ranks.started[0].send_signal(signal.SIGTERM)
    assert ranks.started[0].wait(timeout=60) != 0
    assert not ranks.alive()
    printed = ranks.log.read_text()
    assert printed.count('stopped by SIGTERM; --resume continues from') == 2
    check_one_checkpoint(ranks)


def test_launcher__that_is_killed_takes_its_ranks_along(start):
    ranks = start('torchrun')
    ranks.started[0].kill()
    ranks.wait_for(lambda: not ranks.alive(), 10)


def test_mim__that_is_killed_stops_its_ranks(start):
    ranks = start('mim')
    ranks.started[0].kill()
    # 7 s and less; on a busy machine it takes a while until they look.
    ranks.wait_for(lambda: not ranks.alive(), 20)
    check_one_checkpoint(ranks)
