"""A cell of the matrix: one run with its config, folder and state."""

import contextlib
import copy
import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine.config import Config

from era_mm.engine.preflight import find_config, find_fault_among
from era_mm.engine.whole_files import write_whole
from era_mm.errors import UserError

from .schedule import length_of, stretch
from .spec import TEACHER, Method, Pair, Suite

#: Two: mmengine removes the oldest file before the newest is written.
KEPT_CHECKPOINTS = 2
PHASES = ('train', 'test')
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Cell:
    """One run of the matrix.

    Args:
        suite: The suite it belongs to.
        pair: Its teacher and student.
        method: Its method. None: it trains the pair's teacher.
        seed: Its seed. None: the config's (for the teacher).
        folder: The folder of its files.
        teacher: The cell that trains its teacher, if there is one.
        sources: Unchanged configs by name, shared by the cells of a matrix,
            so that each is read once.
    """

    suite: Suite = field(repr=False)
    pair: Pair
    method: Method | None
    seed: int | None
    folder: Path
    teacher: 'Cell | None' = field(default=None, repr=False)
    sources: dict[str, Config] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def name(self) -> str:
        """Name on the screen: pair/method/seed."""
        if self.method is None:
            return f'{self.pair.name}/{TEACHER}'
        return f'{self.pair.name}/{self.method.name}/s{self.seed}'

    @property
    def key(self) -> tuple[str, str, int | None]:
        """Key of its row in the suite."""
        name = TEACHER if self.method is None else self.method.name
        return self.pair.name, name, self.seed

    @property
    def config_name(self) -> str:
        """Base name of its config."""
        return Path(self._source).stem

    @cached_property
    def _source(self) -> str:
        """Path or base name of that config."""
        if self.method is None:
            assert self.pair.teacher is not None
            return self.pair.teacher
        words = {
            **self.pair.words,
            'pair': self.pair.name,
            'student': self.pair.student,
            'teacher': self.pair.teacher or '',
        }
        try:
            return self.method.config.format(**words)
        except KeyError as error:
            raise UserError(
                f'{self.suite.name}: the config {self.method.config!r} of '
                f'{self.method.name} needs {error}, but the pair '
                f'{self.pair.name} has {", ".join(sorted(words))}.'
            ) from None

    @property
    def config_file(self) -> Path:
        """File of the config as it is run."""
        return self.folder / 'config.py'

    @property
    def log(self) -> Path:
        """File with the output of its processes."""
        return self.folder / 'log.txt'

    @cached_property
    def config(self) -> Config:
        """The config as it is run, but for the teacher's weights."""
        source = self._source
        if source not in self.sources:
            # It prints the file that it has found.
            with contextlib.redirect_stdout(io.StringIO()):
                file = find_config(source, f'{self.suite.name}: {self.name}')
            self.sources[source] = Config.fromfile(file)
        cfg = copy.deepcopy(self.sources[source])
        options = dict(self.suite.options)
        if self.method is not None:
            stretch(cfg, self.suite.schedule * self.method.schedule)
            options |= self.method.options
            options['randomness.seed'] = self.seed
        cfg.merge_from_dict(options)
        # mmengine's default, where the config has none.
        hook = dict(type='CheckpointHook', interval=1)
        hook |= cfg.get('default_hooks', {}).get('checkpoint', {})
        hook['max_keep_ckpts'] = KEPT_CHECKPOINTS
        cfg.merge_from_dict({'default_hooks.checkpoint': hook})
        return cfg

    @property
    def length(self) -> tuple[str, int]:
        """'epochs' or 'iters', and how many."""
        return length_of(self.config)

    @cached_property
    def has_teacher(self) -> bool:
        """Whether its config has a teacher."""
        return 'teacher' in self.config.get('model', {})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of its config without the teacher's file.

        Paths are relative to the checkout, so that rows of another machine
        are recognised.
        """
        values = self.config.to_dict()
        if self.has_teacher:
            values['model']['teacher'].pop('checkpoint', None)
        text = json.dumps(values, sort_keys=True, default=str)
        text = text.replace(f'{ROOT}/', '')
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases to run; given weights need no training."""
        given = self.method is None and self.pair.checkpoint
        return PHASES[1:] if given else PHASES

    def weights(self) -> str:
        """The weights to test: the pair's file, or the training's checkpoint.

        Raises:
            UserError: Training has left no checkpoint.
        """
        if self.method is None and self.pair.checkpoint:
            return self.pair.checkpoint
        found = read_json(self.folder / 'train.json')
        if found is None:
            raise UserError(f'{self.folder}: expected a finished training.')
        return found['checkpoint']

    def teacher_weights(self) -> str | None:
        """Path or URL of its teacher's weights."""
        if not self.has_teacher or self.teacher is None:
            return None
        return self.teacher.weights()

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the weights of a teacher.

        Of weights trained here without their file, which has times: a teacher
        that is trained again gives the same.
        """
        if self.pair.checkpoint:
            return checksum(self.pair.checkpoint)
        found = read_json(self.folder / 'train.json')
        assert found is not None
        return found['weights']

    def is_done(self, phase: str) -> bool:
        """Whether a phase has completed."""
        found = read_json(self.folder / f'{phase}.json')
        return found is not None and (
            phase != 'train' or not find_fault_among(found['checkpoint'])
        )

    def open(self, job: Mapping[str, Any]) -> None:
        """Prepare its folder: keep it if it is of the same run, else renew it.

        Args:
            job: What the run depends on besides the config; 'teacher' is the
                checksum of the teacher's weights.
        """
        wanted = dict(job, fingerprint=self.fingerprint)
        if read_json(self.folder / 'job.json') != wanted:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            weights = self.teacher_weights()
            if weights is not None:
                self.config.merge_from_dict(
                    {'model.teacher.checkpoint': weights}
                )
            self.config.dump(self.config_file)
            write_json(self.folder / 'job.json', wanted)


def all_cells(suite: Suite, work_dir: Path) -> list[Cell]:
    """The matrix, by pairs and seeds; a pair's teacher before its students.

    Pairs whose teachers are trained with the same config share its folder:
    it is trained once.
    """
    return list(_cells(suite, work_dir))


def _cells(suite: Suite, work_dir: Path) -> Iterator[Cell]:
    sources: dict[str, Config] = {}
    trained: dict[str, Path] = {}
    for pair in suite.pairs.values():
        teacher = None
        if pair.teacher is not None:
            folder = work_dir / pair.name / TEACHER
            if not pair.checkpoint:
                folder = trained.setdefault(pair.teacher, folder)
            teacher = Cell(suite, pair, None, None, folder, None, sources)
            yield teacher
        for seed in suite.seeds:
            for method in suite.methods_of(pair):
                folder = work_dir / pair.name / method.name / f'seed{seed}'
                cell = Cell(
                    suite, pair, method, seed, folder, teacher, sources
                )
                if cell.has_teacher and teacher is None:
                    raise UserError(
                        f'{suite.name}: {cell.config_name} learns from a '
                        f'teacher, but the pair {pair.name} has none. Give '
                        'it `teacher`, and `checkpoint` if it is trained.'
                    )
                yield cell


def checksum(file: str) -> str:
    """SHA-256 of a file's content, or of the address of a URL."""
    if '://' in file:
        return hashlib.sha256(file.encode()).hexdigest()
    with open(file, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def read_json(file: Path) -> dict[str, Any] | None:
    """Read a file; None if it is missing or cut off."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a file completely or not at all."""
    write_whole(file, (json.dumps(value, indent=1) + '\n').encode())
