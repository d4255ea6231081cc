"""Tries to break runs: kills, mutated configs, mutated and harmful files.

    python tests/soak/soak.py --kills 20 --configs 300 --files 300

Seeded: what is drawn depends on ``--seed`` alone. Every attempt is a call of
the commands themselves on a toy run. Writes what came out, as counted, to
``docs/reliability.md``; the exit status is 1 if anything went wrong.
``tests/soak/test_short.py`` runs a few of each.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from era_mm import cli
from era_mm.core.safe_files import TRUST, load_file
from era_mm.engine import whole_files
from era_mm.engine.work_dir import checkpoints_in
from era_mm.testing import (
    classifier_config,
    classifier_loader,
    run_config,
    save_teacher,
    write_class_folders,
)

DOC = Path(__file__).resolve().parents[2] / 'docs' / 'reliability.md'
DISTILLER = dict(
    type='era_mm.ERADistiller',
    loss=dict(align_weight=1.0, residual_weight=1.0, twi_weight=1.0),
    mbrnet=dict(num_branches=2),
    schedules={'loss_era_*': dict(start=0, ramp=2, scale=1.0)},
)
#: What values are replaced by.
WRONG = (
    -1,
    0,
    float('nan'),
    float('inf'),
    None,
    'no',
    '1',
    [],
    {},
    'ST',
    True,
)


class Killed(BaseException):
    """What no `except Exception` catches, as a kill."""


@dataclass
class Outcome:
    """How attempts of one kind ended."""

    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, ending: str, failure: str = '') -> None:
        """Count one attempt; a failure says what was wrong."""
        self.counts[ending] += 1
        if failure:
            self.failures.append(failure)


class Toy:
    """A classifier's distillation of two epochs of three steps.

    Args:
        folder: Where everything is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        data = write_class_folders(folder / 'data')
        teacher = classifier_config(width=16)
        loader = classifier_loader(data)
        file = save_teacher(teacher, folder / 't.pth', 'mmpretrain')
        self.config = run_config(
            dict(
                type='era_mm.Distillation',
                student=classifier_config(),
                teacher=dict(config=teacher, checkpoint=file),
                distiller=copy.deepcopy(DISTILLER),
            ),
            '',
            'unset',
            default_scope='mmpretrain',
            train_dataloader=loader,
            val_dataloader=loader,
            val_evaluator=dict(type='Accuracy', topk=(1,)),
            test_cfg=None,
            test_dataloader=None,
            test_evaluator=None,
            train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
            default_hooks=dict(
                checkpoint=dict(
                    type='CheckpointHook',
                    interval=1,
                    max_keep_ckpts=1,
                    save_best='accuracy/top1',
                )
            ),
            preflight=False,
            log_level='ERROR',
        ).to_dict()

    def train(
        self, work_dir: Path, *flags: str, config: dict | None = None
    ) -> tuple[int | str, str]:
        """The status of ``train``, or what it raised; and its last words."""
        self._number += 1
        whole = copy.deepcopy(self.config if config is None else config)
        # Runs of one second must not share their log.
        whole['experiment_name'] = f'soak{self._number}'
        file = self.folder / 'toy.py'
        Config(whole).dump(file)
        said = io.StringIO()
        status: int | str
        with contextlib.redirect_stderr(said):
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    status = cli.run_train(
                        [str(file), '--work-dir', str(work_dir), *flags]
                    )
                except Killed:
                    raise
                except BaseException as error:
                    status = f'{type(error).__name__}: {error}'
        return status, said.getvalue().rpartition('error: ')[2]


# -- kills -------------------------------------------------------------------


class KillAt:
    """Stands in for ``os`` where files are written; kills at a moment."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _pass(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise Killed

    def open(self, path: Path, mode: str) -> Any:
        """Half of the content first."""
        killer, file = self, open(path, mode)

        class Halves:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, content: bytes) -> None:
                middle = len(content) // 2
                file.write(content[:middle])
                file.flush()
                killer._pass()
                file.write(content[middle:])

        return Halves()

    def replace(self, part: Path, path: Path) -> None:
        """Before and after a file gets its name."""
        self._pass()
        os.replace(part, path)
        self._pass()


@contextlib.contextmanager
def killing(moment: int) -> Iterator[KillAt]:
    """Kill the run inside at a moment around a write."""
    killer = KillAt(moment)
    whole_files.os, whole_files.open = killer, killer.open  # type: ignore
    try:
        yield killer
    finally:
        whole_files.os = os
        del whole_files.open  # type: ignore[attr-defined]


def try_kills(toy: Toy, number: int | None, chance: random.Random) -> Outcome:
    """Kill at moments around writes, go on, compare with the whole run.

    Args:
        toy: The run.
        number: How many moments, drawn; None: all of them.
        chance: Draws.
    """
    outcome = Outcome()
    with killing(10**9) as killer:
        status, said = toy.train(toy.folder / 'whole')
    assert status == 0, said
    total = 10**9 - killer.left
    whole = load_file(toy.folder / 'whole' / 'epoch_2.pth')
    moments = range(total)
    for moment in (
        moments if number is None else chance.sample(moments, number)
    ):
        folder = toy.folder / f'killed{moment}'
        with killing(moment), contextlib.suppress(Killed):
            toy.train(folder)
        begun = any(checkpoints_in(folder))
        status, said = toy.train(folder, *(['--resume'] if begun else []))
        if status != 0:
            outcome.add('lost', f'kill at {moment} of {total}: {said[:200]}')
            continue
        parts = list(whole_files.parts_in(folder))
        found = load_file(folder / 'epoch_2.pth')
        same = all(
            torch.equal(found['state_dict'][key], value)
            for key, value in whole['state_dict'].items()
        )
        if same and not parts:
            outcome.add('resumed bit-identically')
        else:
            outcome.add('differs', f'kill at {moment} of {total}: {parts}')
        shutil.rmtree(folder)
    return outcome


# -- configs -----------------------------------------------------------------


def _leaves(node: Any, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, (*path, key))
    elif path:
        yield path


def mutate_config(config: dict, chance: random.Random) -> tuple[dict, str]:
    """A config with one wrong value or misspelt key, and what was done."""
    config = copy.deepcopy(config)
    parts = [('model', 'distiller'), ('model',), ('optim_wrapper',), ()]
    start = chance.choice(parts)
    node: Any = config
    for key in start:
        node = node[key]
    leaves = list(_leaves(node))
    *way, last = chance.choice(leaves)
    for key in way:
        node = node[key]
    name = '.'.join(map(str, (*start, *way, last)))
    if chance.random() < 0.25 and isinstance(last, str) and len(last) > 3:
        at = chance.randrange(len(last) - 1)
        wrong = last[:at] + last[at + 1] + last[at] + last[at + 2 :]
        node[wrong] = node.pop(last)
        return config, f'{name} misspelt {wrong}'
    value = chance.choice(WRONG)
    node[last] = value
    return config, f'{name}={value!r}'


def try_configs(toy: Toy, number: int, chance: random.Random) -> Outcome:
    """Train with mutated configs; each trains or is refused in one message."""
    outcome = Outcome()
    for index in range(number):
        config, what = mutate_config(toy.config, chance)
        folder = toy.folder / f'config{index}'
        status, said = toy.train(folder, config=config)
        if status == 0:
            outcome.add('trained')
        elif status == 1 and 'Traceback' not in said and said.strip():
            outcome.add('refused in one message')
        else:
            outcome.add('raw traceback', f'{what}: {status} {said[:200]}')
        for paths in checkpoints_in(folder):
            for path in paths:
                try:
                    load_file(path)
                except ValueError as error:
                    outcome.add('half a file', f'{what}: {error}')
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


# -- files -------------------------------------------------------------------


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path, way: str) -> None:
        self.mark, self.way = mark, way

    def __reduce__(self) -> tuple:
        if self.way == 'system':
            return (os.system, (f'touch {self.mark}',))
        return (eval, (f"open({str(self.mark)!r}, 'w').close()",))


def mutate_file(
    whole: Path, target: Path, mark: Path, chance: random.Random
) -> str:
    """Write a damaged or harmful copy of a checkpoint; say what was done."""
    kind = chance.choice(['cut', 'bytes', 'entry', 'harm'])
    data = bytearray(whole.read_bytes())
    if kind == 'cut':
        target.write_bytes(data[: chance.randrange(len(data))])
    elif kind == 'bytes':
        for _ in range(chance.choice([1, 20, 500])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        target.write_bytes(data)
    else:
        content = load_file(whole)
        holder = chance.choice(
            [content, content['meta'], content['optimizer']]
        )
        key = chance.choice(list(holder))
        if kind == 'harm':
            holder[key] = Harm(mark, chance.choice(['system', 'eval']))
        else:
            holder[key] = chance.choice([None, 3, 'x', {}, [], float('nan')])
        torch.save(content, target, pickle_protocol=chance.choice([2, 3]))
        return f'{kind} {key}'
    return kind


def try_files(toy: Toy, number: int, chance: random.Random) -> Outcome:
    """Resume from mutated files, or start or teach with them."""
    outcome = Outcome()
    whole = toy.folder / 'whole' / 'epoch_2.pth'
    if not whole.exists():
        status, said = toy.train(toy.folder / 'whole')
        assert status == 0, said
    mark = toy.folder / 'harmed'
    for index in range(number):
        target = toy.folder / 'mutated.pth'
        what = mutate_file(whole, target, mark, chance)
        config = copy.deepcopy(toy.config)
        config['train_cfg']['max_epochs'] = 3
        way = chance.choice(['resume', 'load_from', 'teacher'])
        flags = []
        if way == 'resume':
            flags = ['--resume', str(target)]
        elif way == 'load_from':
            config['load_from'] = str(target)
        else:
            config['model']['teacher']['checkpoint'] = str(target)
        folder = toy.folder / f'file{index}'
        status, said = toy.train(folder, *flags, config=config)
        if mark.exists():
            mark.unlink()
            outcome.add('code was run', f'{what} as {way}')
        elif status == 0:
            outcome.add('taken')
        elif status == 1 and 'Traceback' not in said and said.strip():
            outcome.add('refused in one message')
        else:
            outcome.add('raw traceback', f'{what} as {way}: {status}')
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


# -- all of it ---------------------------------------------------------------


def soak(
    kills: int | None, configs: int, files: int, seed: int
) -> dict[str, Outcome]:
    """Try everything; how it went, by kind."""
    os.environ[TRUST] = '0'
    os.environ.setdefault('LOCAL_RANK', '0')
    with tempfile.TemporaryDirectory(prefix='era_mm-soak-') as folder:
        toy = Toy(Path(folder))
        return {
            'kills around writes': try_kills(toy, kills, random.Random(seed)),
            'mutated configs': try_configs(toy, configs, random.Random(seed)),
            'mutated and harmful files': try_files(
                toy, files, random.Random(seed)
            ),
        }


def page(found: dict[str, Outcome], seed: int, seconds: float) -> str:
    """The figures as Markdown."""
    rows = [
        f'| {kind} | {sum(outcome.counts.values())} | '
        + ', '.join(f'{n} {end}' for end, n in sorted(outcome.counts.items()))
        + f' | {len(outcome.failures)} |'
        for kind, outcome in found.items()
    ]
    failures = [
        f'- {kind}: `{line}`'
        for kind, outcome in found.items()
        for line in outcome.failures
    ]
    return '\n'.join(
        [
            '<!-- written by tests/soak/soak.py; do not edit -->',
            '# Reliability',
            '',
            'What `tests/soak/soak.py` counted when it tried to break runs of',
            'a toy classifier (ERA, two epochs, on the CPU): kills around',
            'every write, configs with one wrong value or misspelt key, and',
            'checkpoints that were cut, damaged or made to run code, given',
            'to `--resume`, `load_from` and the teacher.',
            '',
            '| tried | attempts | came out | failures |',
            '| --- | --- | --- | --- |',
            *rows,
            '',
            f'Seed {seed}, {seconds:.0f} s, Python '
            f'{platform.python_version()}, torch {torch.__version__}.',
            '',
            *(['Failures:', '', *failures, ''] if failures else []),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, write the page; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, help='default: all moments')
    parser.add_argument('--configs', type=int, default=300)
    parser.add_argument('--files', type=int, default=300)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=DOC)
    args = parser.parse_args(argv)
    began = time.monotonic()
    found = soak(args.kills, args.configs, args.files, args.seed)
    args.out.write_text(page(found, args.seed, time.monotonic() - began))
    print(json.dumps({k: dict(o.counts) for k, o in found.items()}, indent=1))
    return int(any(outcome.failures for outcome in found.values()))


if __name__ == '__main__':
    sys.exit(main())
