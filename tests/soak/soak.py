"""Tries to break runs: kills, configs, files, faults, ranks.

    python tests/soak/soak.py

Seeded: what an attempt draws depends on ``--seed``, its kind and its number
alone. Every attempt is a call of the commands themselves on a toy run. Each
leaves a line in ``--record``, so a soak that was stopped goes on, and
``--again`` repeats what failed. The counted outcomes are written to
``docs/reliability.md``; the exit status is 1 if anything went wrong.
``tests/soak/test_short.py`` runs a few of each.
"""

import argparse
import contextlib
import copy
import gc
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

# Its own modules, however it is started.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from mutations import (
    FAULTS,
    base_for,
    mutate_file,
    mutate_host,
    mutate_ours,
)
from toys import (
    EMA,
    LIMIT,
    FailedError,
    Hung,
    Killed,
    Toy,
    ended,
    killing,
    methods,
    same_state,
)

from era_mm.core.safe_files import TRUST, load_file
from era_mm.engine import whole_files
from era_mm.engine.work_dir import checkpoints_in

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / 'docs' / 'reliability.md'
#: How an attempt ended, and what was wrong, '' if nothing.
Ending = tuple[str, str]


# -- kills -------------------------------------------------------------------


def _compare(folder: Path, whole: Path, begun: bool, what: str) -> Ending:
    """The outcome of a run that was killed and resumed."""
    parts = list(whole_files.parts_in(folder))
    name = 'epoch_2.pth'
    if parts or not same_state(folder / name, whole / name):
        return 'differs', f'{what}: {parts}'
    if begun:
        return 'resumed bit-identically', ''
    return 'killed before the first file and begun anew bit-identically', ''


def count_moments(toy: Toy) -> int:
    """How many moments around writes the whole run has."""
    folder = toy.folder / 'whole'
    shutil.rmtree(folder, ignore_errors=True)
    with killing(10**9) as killer:
        status, said = toy.train(folder)
    assert status == 0, said
    return 10**9 - killer.left


def at_a_write(toy: Toy, index: int, chance: random.Random) -> Ending:
    """Kill at a moment around a write, go on, compare with the whole run."""
    folder = toy.folder / 'killed'
    if not (toy.folder / 'whole' / 'epoch_2.pth').is_file():
        count_moments(toy)
    with killing(index), contextlib.suppress(Killed):
        toy.train(folder)
    begun = any(checkpoints_in(folder))
    status, said = toy.train(folder, *(['--resume'] if begun else []))
    if status != 0:
        return 'lost', f'moment {index}: {status} {said[:300]}'
    return _compare(folder, toy.folder / 'whole', begun, f'moment {index}')


def variants(toy: Toy) -> list[tuple[str, dict, list[str]]]:
    """Every method's run, and ERA's with averages and in half precision."""
    found = [(name, toy.base_of(name), []) for name in sorted(methods())]
    averaged = toy.base_of('ERADistiller') | dict(custom_hooks=EMA)
    found.append(('ERA with EMA', averaged, []))
    found.append(('ERA with AMP', toy.base_of('ERADistiller'), ['--amp']))
    return found


def at_random(toy: Toy, index: int, chance: random.Random) -> Ending:
    """SIGKILL at a random time, one method after the other."""
    every = variants(toy)
    name, config, flags = every[index % len(every)]
    return _killed(toy, name, config, flags, 1, chance)


def on_two_ranks(toy: Toy, index: int, chance: random.Random) -> Ending:
    """The same for a method on two ranks, both killed."""
    name = sorted(methods())[index]
    config = toy.base_of(name)
    # As many batches of two images for each rank as for one.
    loader = config['train_dataloader']
    loader['dataset'] = dict(
        type='RepeatDataset', times=2, dataset=loader['dataset']
    )
    return _killed(toy, name, config, [], 2, chance)


def _killed(
    toy: Toy,
    name: str,
    config: dict,
    flags: list[str],
    ranks: int,
    chance: random.Random,
) -> Ending:
    whole, spent = toy.whole(name, config, ranks, *flags)
    folder = toy.folder / 'killed'
    status = [0]
    # A run may take less time than the whole one did.
    while -signal.SIGKILL not in status:
        shutil.rmtree(folder, ignore_errors=True)
        when = chance.uniform(0.3, 1) * spent
        spent *= 0.9
        status = ended(
            toy.start(folder, *flags, config=config, ranks=ranks), when
        )
    begun = any(checkpoints_in(folder))
    flags = [*flags, *(['--resume'] if begun else [])]
    status = ended(toy.start(folder, *flags, config=config, ranks=ranks))
    what = f'{name}, after {when:.1f} s'
    if any(status):
        said = Path(f'{folder}.said0').read_text()
        return 'lost', f'{what}: {status} {said[:300]}'
    return _compare(folder, whole, begun, what)


# -- what must be refused ----------------------------------------------------


def _judge(status: int | str, said: str, ours: bool) -> Ending:
    """Of a run that was not meant to end well."""
    if status != 1 or 'Traceback (most' in said or not said.strip():
        if status == 'Hung: ':
            return 'hung', 'hung'
        return 'raw traceback', f'{status} {said[:200]}'
    if 'The whole traceback is in' not in said:
        return 'refused in one message', ''
    failure = f'in words of others: {said[:200]}' if ours else ''
    return 'refused in words of the hosts', failure


def wrong_config(toy: Toy, index: int, chance: random.Random) -> Ending:
    """Train with one wrong value or key, of ours or of the hosts."""
    ours = index % 3 != 0
    config, name = base_for(toy, chance, ours)
    if ours:
        what, wrong = mutate_ours(config, name, chance)
    else:
        what, wrong = mutate_host(config, chance), False
    folder = toy.folder / 'config'
    status, said = toy.train(folder, config=config)
    what = f'{name}: {what}'
    for paths in checkpoints_in(folder):
        for path in paths:
            try:
                load_file(path)
            except ValueError as error:
                return 'half a file', f'{what}: {error}'
    if status == 0:
        if wrong:
            return 'accepted though wrong', what
        return f'trained ({"ours" if ours else "of the hosts"})', ''
    ending, failure = _judge(status, said, ours)
    return ending, failure and f'{what}: {failure}'


def wrong_file(toy: Toy, index: int, chance: random.Random) -> Ending:
    """Resume from a mutated or harmful file, start from it, learn from it."""
    whole = toy.folder / 'whole' / 'epoch_2.pth'
    if not whole.is_file():
        count_moments(toy)
    mark = toy.folder / 'harmed'
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
        # Of the student's own width, so that its file is one of it.
        config['model']['teacher'] = dict(
            config=copy.deepcopy(config['model']['student']),
            checkpoint=str(target),
        )
    status, said = toy.train(toy.folder / 'file', *flags, config=config)
    if mark.exists():
        mark.unlink()
        return 'code was run', f'{what} as {way}'
    if status == 0:
        return 'taken', ''
    ending, failure = _judge(status, said, ours=True)
    return ending, failure and f'{what} as {way}: {failure}'


def with_a_fault(toy: Toy, index: int, chance: random.Random) -> Ending:
    """Train while something around the run is broken."""
    fault = FAULTS[index]
    config = copy.deepcopy(toy.config)
    folder = toy.folder / 'fault'
    folder.mkdir()
    with fault(config, folder):
        status, said = toy.train(folder / 'run', config=config)
    if status == 0:
        return 'passed over', f'{fault.__name__}: trained'
    ending, failure = _judge(status, said, ours=False)
    if 'image' in fault.__name__ and '.png' not in said:
        failure = f'no file is named: {said[:200]}'
    return ending, failure and f'{fault.__name__}: {failure}'


KINDS: dict[str, Callable[[Toy, int, random.Random], Ending]] = {
    'kills around writes': at_a_write,
    'kills at random times': at_random,
    'kills of two ranks': on_two_ranks,
    'wrong configs': wrong_config,
    'damaged and harmful files': wrong_file,
    'faults': with_a_fault,
}
#: What attempts of one kind leave behind.
LEFT = ('killed', 'config', 'file', 'fault')


# -- all of it ---------------------------------------------------------------


class Record:
    """The lines of attempts, in a file or in memory.

    Args:
        path: Of the file; None: in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.lines: list[dict] = []
        if path is not None and path.is_file():
            self.lines = [
                json.loads(line) for line in path.read_text().splitlines()
            ]

    def has(self, kind: str, index: int) -> bool:
        """Whether an attempt was made."""
        return any(
            line['kind'] == kind and line['index'] == index
            for line in self.lines
        )

    def drop_failures(self) -> None:
        """Forget what failed, so that it is tried again."""
        self.lines = [line for line in self.lines if not line['failure']]
        if self.path is not None:
            self.path.write_text(
                ''.join(f'{json.dumps(line)}\n' for line in self.lines)
            )

    def add(self, **line: object) -> None:
        """Keep an outcome."""
        self.lines.append(line)
        if self.path is not None:
            with self.path.open('a') as file:
                file.write(f'{json.dumps(line)}\n')

    def of(self, kind: str) -> list[dict]:
        """The lines of a kind."""
        return [line for line in self.lines if line['kind'] == kind]


def soak(numbers: dict[str, int | None], seed: int, record: Record) -> None:
    """Try everything that the record lacks.

    Args:
        numbers: How often, by kind; None: every moment, method or fault.
        seed: Of the draws.
        record: Gets a line for every attempt.
    """
    os.environ[TRUST] = '0'
    os.environ.setdefault('LOCAL_RANK', '0')
    commit = _commit()
    with (
        tempfile.TemporaryDirectory(prefix='era_mm-soak-') as name,
        contextlib.chdir(name),
        contextlib.ExitStack() as stack,
    ):
        # Tracebacks of the commands go there.
        stack.callback(setattr, tempfile, 'tempdir', tempfile.tempdir)
        tempfile.tempdir = name
        toy = Toy(Path(name))
        totals = {
            'kills around writes': lambda: count_moments(toy),
            'kills of two ranks': lambda: len(methods()),
            'faults': lambda: len(FAULTS),
        }
        # What stays is not looked through in each of hundreds of runs.
        gc.collect()
        gc.freeze()
        for kind, number in numbers.items():
            number = totals[kind]() if number is None else number
            for index in range(number):
                if record.has(kind, index):
                    continue
                began = time.monotonic()
                chance = random.Random(f'{seed} {kind} {index}')
                try:
                    ending, failure = KINDS[kind](toy, index, chance)
                except Hung:
                    ending = failure = f'hung for {LIMIT} s'
                except FailedError as error:
                    ending, failure = 'failed undisturbed', str(error)
                record.add(
                    kind=kind,
                    index=index,
                    ending=ending,
                    failure=failure,
                    seconds=round(time.monotonic() - began, 1),
                    commit=commit,
                )
                for left in LEFT:
                    shutil.rmtree(toy.folder / left, ignore_errors=True)


def _commit() -> str:
    done = subprocess.run(
        ['git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD'],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or 'unknown'


def page(record: Record, seed: int) -> str:
    """The figures as Markdown."""
    rows, failures, seconds = [], [], 0.0
    for kind in KINDS:
        lines = record.of(kind)
        if not lines:
            continue
        counts = Counter(line['ending'] for line in lines)
        wrong = [line['failure'] for line in lines if line['failure']]
        commits = sorted({line['commit'] for line in lines})
        rows.append(
            f'| {kind} | {len(lines)} | '
            + ', '.join(f'{n} {end}' for end, n in sorted(counts.items()))
            + f' | {len(wrong)} | {", ".join(commits)} |'
        )
        failures += [f'- {kind}: `{" ".join(text.split())}`' for text in wrong]
        seconds += sum(line['seconds'] for line in lines)
    return '\n'.join(
        [
            '<!-- written by tests/soak/soak.py; do not edit -->',
            '# Reliability',
            '',
            '`tests/soak/soak.py` tries to break training runs: two epochs of',
            'toy models on the CPU. These are the outcomes.',
            '',
            '- Kills around writes: an ERA run is killed before, halfway',
            '  through and after every write, resumed, and compared with a',
            '  run that was not killed. Kills at random times: SIGKILL; every',
            '  method in turn, ERA also with EMA and with AMP. Kills of two',
            '  ranks: both at once, every method.',
            '- Wrong configs: one wrong value or misspelt key. Two thirds are',
            '  arguments of our methods, drawn from their signatures; one',
            '  third are keys of the hosts.',
            '- Files: truncated, damaged, with other entries, or made to run',
            '  code; given to `--resume`, `load_from` and the teacher.',
            '- Faults: images, data, teachers and disks that are broken or',
            '  missing.',
            '',
            '| tried | attempts | outcome | failures | at commit |',
            '| --- | --- | --- | --- | --- |',
            *rows,
            '',
            f'Seed {seed}, {seconds / 60:.0f} minutes, Python '
            f'{platform.python_version()}, torch {torch.__version__}.',
            '',
            *(['Failures:', '', *failures, ''] if failures else []),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, write the page; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=20, help='random times')
    parser.add_argument('--configs', type=int, default=300)
    parser.add_argument('--files', type=int, default=300)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--only', nargs='+', choices=KINDS, metavar='KIND', default=KINDS
    )
    parser.add_argument(
        '--again', action='store_true', help='try what failed once more'
    )
    parser.add_argument(
        '--record', type=Path, default=ROOT / 'work_dirs' / 'soak.jsonl'
    )
    parser.add_argument('--out', type=Path, default=DOC)
    args = parser.parse_args(argv)
    args.record.parent.mkdir(parents=True, exist_ok=True)
    record = Record(args.record.absolute())
    if args.again:
        record.drop_failures()
    numbers: dict[str, int | None] = dict.fromkeys(KINDS)
    numbers['kills at random times'] = args.kills
    numbers['wrong configs'] = args.configs
    numbers['damaged and harmful files'] = args.files
    soak({kind: numbers[kind] for kind in args.only}, args.seed, record)
    args.out.write_text(page(record, args.seed))
    failures = [line for line in record.lines if line['failure']]
    for line in failures:
        print(f'{line["kind"]} {line["index"]}: {line["failure"]}')
    return int(bool(failures))


if __name__ == '__main__':
    sys.exit(main())
