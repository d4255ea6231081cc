"""What the demos share: their stages from the data to the table.

A demo makes its data, trains a teacher, a plain student and an ERA student
(same schedule, same seed), tests them, measures them and reports. What is
finished and unchanged is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from demo.report import TITLES, Table, report
from demo.stages import (
    Screen,
    Stage,
    StageError,
    alone,
    console,
    open_screen,
    read_json,
    run_logged,
    run_stage,
    write_json,
)
from era_mm.hosts import versions
from era_mm.report import write_demo_report

if TYPE_CHECKING:
    from mmengine.config import Config

    from era_mm.datasets.made_folder import SplitParams

ROOT = Path(__file__).resolve().parents[1]


class Demo(ABC):
    """The stages of a demo.

    Args:
        work: Where everything goes but the data.
        threads: CPU threads of the programs it runs.
        quick: Do a few iterations of everything.
    """

    #: Config of the 'teacher', the 'plain' and the 'era' student.
    configs: ClassVar[dict[str, str]]
    #: Seconds of each stage in one run on two cores, for the time left.
    expected: ClassVar[dict[str, int]]
    table: ClassVar[Table]
    #: What the teacher reaches at least, in the table's first metric, if its
    #: training has not failed.
    least_teacher: ClassVar[float]
    #: What the demo changes in every config.
    changes: ClassVar[dict] = {}
    #: And in the ERA student's alone.
    era_changes: ClassVar[dict] = {}
    #: What the data set holds, in plural.
    images: ClassVar[str]
    params_type: ClassVar[type[SplitParams]]
    #: Writes the data set.
    make_data: ClassVar[Callable[..., bool]]
    #: File that says how the data set was made; its folder has that name.
    manifest: ClassVar[str]
    #: Writes result.json, and `pictures`, into the folder it is given.
    measure_module: ClassVar[str]
    measure_title: ClassVar[str]
    pictures: ClassVar[tuple[str, ...]] = ()

    def __init__(self, work: Path, threads: int, quick: bool) -> None:
        self.work = work
        self.threads = threads
        self.quick = quick
        self.records: dict[str, dict] = {}
        folder = Path(self.manifest).stem
        self.data = Path('data', folder)
        self.params = self.params_type()
        if quick:
            self.data = work / folder
            self.params = self.params_type(num_train=32, num_val=8, num_test=8)

    def run(self) -> None:
        """Run every stage and report."""
        stages = self.stages()
        with alone(self.work), open_screen(stages) as screen:
            for stage in stages:
                self.records[stage.name] = run_stage(stage, self.work, screen)
            for name in self.pictures:
                shutil.copy(self.work / 'measure' / name, self.work)
        report(self.records, self.stock(), self.work, self.table)
        for name in ('table.md', 'table.json', *self.pictures):
            console.print(f'{self.work / name}', highlight=False)
        page = write_demo_report(self.work)
        console.print(f'{page}', highlight=False)

    def stages(self) -> list[Stage]:
        """All stages in order."""
        students = [name for name in self.configs if name != 'teacher']
        return [
            self.data_stage(),
            self.train_stage('teacher'),
            # Before anything learns from it.
            self.test_stage('teacher'),
            *(self.train_stage(name) for name in students),
            *(self.test_stage(name) for name in students),
            self.measure_stage(),
        ]

    @abstractmethod
    def stock(self) -> dict:
        """How the stock host loads the ERA student.

        Its missing and unexpected keys, and under the table's first heading
        the metric as a share.
        """

    # -- what the stages depend on -----------------------------------------

    def options(self, name: str) -> dict:
        """What the demo changes in a config."""
        chosen: dict = {
            'default_hooks.checkpoint.max_keep_ckpts': 1,
            'default_hooks.logger.interval': 10,
            **self.changes,
        }
        if name == 'era':
            checkpoint = self.result('teacher')['checkpoint']
            chosen |= {
                'model.teacher.checkpoint': checkpoint,
                **self.era_changes,
            }
        if self.quick:
            # A teacher of four iterations is near chance.
            chosen['preflight'] = False
            chosen['train_cfg.max_epochs'] = 1
            chosen['train_cfg.val_interval'] = 1
            for split in ('train', 'val', 'test'):
                chosen[f'{split}_dataloader.dataset.data_root'] = (
                    f'{self.data}/'
                )
            chosen |= self.data_options()
        return chosen

    def data_options(self) -> dict:
        """What names the data in a config beside its loaders."""
        return {}

    def config(self, name: str) -> Config:
        """A config as the demo runs it."""
        from mmengine.config import Config

        config = Config.fromfile(self.config_file(name))
        config.merge_from_dict(self.options(name))
        return config

    def inputs(self, name: str) -> dict:
        """What a trained model depends on."""
        found = {
            'config': self.config(name).pretty_text,
            'data': self.result('data'),
            'versions': versions(),
        }
        if name == 'era':
            found['teacher'] = self.result('teacher')['sha256']
            found['source'] = source_sum()
        return found

    def result(self, stage: str) -> dict:
        """What a finished stage returned."""
        return self.records[stage]['result']

    # -- the stages --------------------------------------------------------

    def data_stage(self) -> Stage:
        """Make the data."""
        manifest = self.data / self.manifest

        def run(folder: Path, goes_on: bool, screen: Screen) -> dict:
            try:
                self.make_data(
                    self.data,
                    self.params,
                    lambda done, total: screen.update(
                        done / total, f'{done}/{total}'
                    ),
                )
            except FileExistsError as error:
                raise StageError(str(error)) from None
            return json.loads(manifest.read_text())

        return Stage(
            'data',
            f'make digit {self.images}',
            self.expected['data'],
            lambda: asdict(self.params),
            run,
            is_there=lambda result: read_json(manifest) == result,
        )

    def train_stage(self, name: str) -> Stage:
        """Train a model."""

        def run(folder: Path, goes_on: bool, screen: Screen) -> dict:
            command = [
                *self.command('tools/train.py', name),
                '--work-dir',
                str(folder),
            ]
            if goes_on and (folder / 'last_checkpoint').exists():
                command.append('--resume')
            config = self.config(name)
            batch = config.train_dataloader.batch_size
            total = config.train_cfg.max_epochs * -(
                -self.params.num_train // batch
            )
            began = time.time()

            def watch() -> None:
                entry = last_scalars(folder, began)
                if entry is None:
                    screen.update(None, 'starting')
                elif 'loss' not in entry:
                    screen.update(1.0, 'validating')
                else:
                    screen.update(
                        entry['step'] / total,
                        f'iteration {entry["step"]}/{total}  '
                        f'loss {entry["loss"]:.3f}',
                    )

            self.run_program(command, name, watch)
            checkpoint = (folder / 'last_checkpoint').read_text().strip()
            return {'checkpoint': checkpoint, 'sha256': file_sum(checkpoint)}

        def is_there(result: dict) -> bool:
            checkpoint = Path(result['checkpoint'])
            return (
                checkpoint.is_file()
                and file_sum(checkpoint) == result['sha256']
            )

        return Stage(
            name,
            f'train the {TITLES[name]}',
            self.expected[name],
            lambda: self.inputs(name),
            run,
            is_there,
            keeps=True,
        )

    def test_stage(self, trained: str) -> Stage:
        """Evaluate a model on the test split."""
        # A teacher of four iterations has learnt nothing.
        judged = trained == 'teacher' and not self.quick
        return self.evaluation_stage(
            f'test_{trained}',
            f'test the {TITLES[trained]}',
            lambda: self.command(
                'tools/test.py', trained, self.result(trained)['checkpoint']
            ),
            lambda: {
                **self.inputs(trained),
                'checkpoint': self.result(trained)['sha256'],
                **({'least': self.least_teacher} if judged else {}),
            },
            self.check_teacher if judged else None,
        )

    def evaluation_stage(
        self,
        name: str,
        title: str,
        command: Callable[[], list[str]],
        inputs: Callable[[], dict],
        check: Callable[[dict], None] | None = None,
    ) -> Stage:
        """Run an evaluation; the result is the metrics that it writes.

        Args:
            name: Of the stage.
            title: What the screen says.
            command: The program that evaluates.
            inputs: What the result depends on.
            check: Raises StageError for metrics that are no result.
        """

        def run(folder: Path, goes_on: bool, screen: Screen) -> dict:
            self.run_program(
                [*command(), '--work-dir', str(folder)],
                name,
                lambda: screen.update(None, ''),
            )
            (file,) = folder.glob('*/*.json')
            metrics = json.loads(file.read_text())
            if check is not None:
                check(metrics)
            return metrics

        return Stage(name, title, self.expected[name], inputs, run)

    def check_teacher(self, metrics: dict) -> None:
        """See whether there is something to learn from the teacher.

        Raises:
            StageError: Its training has failed.
        """
        heading, key = next(iter(self.table.metrics.items()))
        value = self.table.value(metrics, key)
        if value < self.least_teacher:
            folder = self.work / 'teacher'
            raise StageError(
                f'The teacher has {heading} {value}, and after a training '
                f'that goes well at least {self.least_teacher:g}: its '
                'training has failed, and there is nothing to learn from it. '
                f'The losses are in {folder}/*/vis_data/scalars.json. Delete '
                f'{folder} and run the demo again with another --threads, '
                'which changes the rounding.'
            )

    def measure_stage(self) -> Stage:
        """Measure what was trained, in a program of its own."""

        def job() -> dict:
            return {
                'configs': {
                    name: self.config_file(name) for name in self.configs
                },
                'checkpoints': {
                    name: self.result(name)['checkpoint']
                    for name in self.configs
                },
                'data': str(self.data),
            }

        def inputs() -> dict:
            return {
                **job(),
                'models': [self.inputs(name) for name in self.configs],
                'sums': [self.result(name)['sha256'] for name in self.configs],
                'scripts': [
                    file_sum(f'{module.replace(".", "/")}.py')
                    for module in (self.measure_module, 'demo.models')
                ],
            }

        def run(folder: Path, goes_on: bool, screen: Screen) -> dict:
            write_json(folder / 'job.json', job())
            state = folder / 'state.json'

            def watch() -> None:
                entry = read_json(state) or {'share': None, 'text': 'starting'}
                screen.update(entry['share'], entry['text'])

            self.run_program(
                [sys.executable, '-m', self.measure_module, str(folder)],
                'measure',
                watch,
            )
            return json.loads((folder / 'result.json').read_text())

        return Stage(
            'measure',
            self.measure_title,
            self.expected['measure'],
            inputs,
            run,
            is_there=lambda result: all(
                (self.work / 'measure' / name).exists()
                for name in self.pictures
            ),
        )

    def command(self, script: str, name: str, *more: str) -> list[str]:
        """A call of a train.py or test.py."""
        options = [f'{k}={v}' for k, v in self.options(name).items()]
        return [
            sys.executable,
            script,
            self.config_file(name),
            *more,
            '--cfg-options',
            *options,
        ]

    def config_file(self, name: str) -> str:
        """Path of a config."""
        return f'configs/{self.configs[name]}.py'

    def run_program(self, command: list[str], name: str, watch) -> None:
        """Run a program with its log beside the stages' folders."""
        run_logged(command, self.work / f'{name}.log', watch, self.threads)


def last_scalars(folder: Path, began: float) -> dict | None:
    """The newest line of this run's log of numbers."""
    files = [
        path
        for path in folder.glob('*/vis_data/scalars.json')
        if path.stat().st_mtime >= began
    ]
    if not files:
        return None
    for line in reversed(max(files).read_text().splitlines()):
        # The last line may be half written.
        with contextlib.suppress(ValueError):
            return json.loads(line)
    return None


def file_sum(path: str | Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def source_sum() -> str:
    """SHA-256 over the package's own source."""
    total = hashlib.sha256()
    for path in sorted(Path('era_mm').rglob('*.py')):
        total.update(str(path).encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def parse_args(description: str, work_dir: str) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--work-dir', type=Path, default=work_dir)
    parser.add_argument(
        '--threads',
        type=int,
        default=min(2, os.cpu_count() or 1),
        help='CPU threads in training',
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='a few iterations of everything, to see whether it works; the '
        'figures mean nothing',
    )
    return parser.parse_args()


def main(demo: type[Demo], description: str, work_dir: str) -> int:
    """Run a demo; the exit status is returned."""
    args = parse_args(description, work_dir)
    work = args.work_dir.resolve()
    os.chdir(ROOT)
    if work.is_relative_to(ROOT):
        work = work.relative_to(ROOT)
    # Ends the running training as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        demo(work, args.threads, args.quick).run()
    except StageError as error:
        console.print(
            f'\ndemo: {error}', markup=False, highlight=False, soft_wrap=True
        )
        return 1
    except KeyboardInterrupt:
        console.print('\nStopped. Run it again to go on from here.')
        return 130
    return 0
