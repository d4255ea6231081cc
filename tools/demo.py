"""Teach a small detector with ERA, from nothing to a table and a picture.

python tools/demo.py

Makes the digit scenes, trains a teacher, a plain student and an ERA student
(same schedule, same seed) and writes table.json, table.md and detections.png
into work_dirs/demo. What is finished and unchanged is not repeated: after an
interruption, run it again.
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
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from demo_report import report, versions
from demo_stages import (
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

if TYPE_CHECKING:
    from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    'teacher': 'plain_retinanet_r18w32_digits',
    'plain': 'plain_retinanet_r18w16_digits',
    'era': 'era_retinanet_r18w32_r18w16_digits',
}
TITLES = {
    'teacher': 'teacher',
    'plain': 'plain student',
    'era': 'ERA student',
}
#: Seconds of each stage on two cores of a Xeon at 2.6 GHz.
EXPECTED = {
    'data': 19,
    'teacher': 335,
    'plain': 210,
    'era': 463,
    'test_teacher': 18,
    'test_plain': 16,
    'test_era': 34,
    'measure': 33,
}


class Demo:
    """The demo's stages.

    Args:
        work: Where everything goes but the data.
        threads: CPU threads of the programs it runs.
        quick: Do a few iterations of everything.
    """

    def __init__(self, work: Path, threads: int, quick: bool) -> None:
        from era_mm.datasets.digit_scenes import SceneParams

        self.work = work
        self.threads = threads
        self.quick = quick
        self.records: dict[str, dict] = {}
        self.data = Path('data/digit_scenes')
        self.params = SceneParams()
        if quick:
            self.data = work / 'digit_scenes'
            self.params = SceneParams(num_train=32, num_val=8, num_test=8)

    def run(self) -> None:
        """Run every stage and report."""
        stages = [
            self.data_stage(),
            *(self.train_stage(name) for name in CONFIGS),
            *(self.test_stage(name) for name in CONFIGS),
            self.measure_stage(),
        ]
        with alone(self.work), open_screen(stages) as screen:
            for stage in stages:
                self.records[stage.name] = run_stage(stage, self.work, screen)
            shutil.copy(self.work / 'measure' / 'detections.png', self.work)
        report(self.records, self.work)

    # -- what the stages depend on -----------------------------------------

    def options(self, name: str) -> dict:
        """What the demo changes in a config."""
        chosen: dict = {
            'default_hooks.checkpoint.max_keep_ckpts': 1,
            'default_hooks.logger.interval': 10,
        }
        if name == 'era':
            checkpoint = self.result('teacher')['checkpoint']
            chosen['model.teacher.checkpoint'] = checkpoint
        if self.quick:
            # A teacher of four iterations is near chance.
            chosen['preflight'] = False
            chosen['train_cfg.max_epochs'] = 1
            chosen['train_cfg.val_interval'] = 1
            for split in ('train', 'val', 'test'):
                chosen[f'{split}_dataloader.dataset.data_root'] = (
                    f'{self.data}/'
                )
            for split in ('val', 'test'):
                chosen[f'{split}_evaluator.ann_file'] = (
                    f'{self.data}/annotations/{split}.json'
                )
        return chosen

    def config(self, name: str) -> Config:
        """A config as the demo runs it."""
        from mmengine.config import Config

        config = Config.fromfile(config_file(name))
        config.merge_from_dict(self.options(name))
        return config

    def inputs(self, name: str) -> dict:
        """What a detector depends on."""
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
        """Make the digit scenes."""
        from era_mm.datasets.digit_scenes import MANIFEST, make_digit_scenes

        manifest = self.data / MANIFEST

        def run(folder: Path, goes_on: bool, screen: Screen) -> dict:
            try:
                make_digit_scenes(
                    self.data,
                    self.params,
                    lambda done, total: screen.update(
                        done / total, f'scene {done}/{total}'
                    ),
                )
            except FileExistsError as error:
                raise StageError(str(error)) from None
            return json.loads(manifest.read_text())

        return Stage(
            'data',
            'make digit scenes',
            EXPECTED['data'],
            lambda: asdict(self.params),
            run,
            is_there=lambda result: read_json(manifest) == result,
        )

    def train_stage(self, name: str) -> Stage:
        """Train a detector."""

        def run(folder: Path, goes_on: bool, screen: Screen) -> dict:
            command = [*self.command('train', name), '--work-dir', str(folder)]
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
            EXPECTED[name],
            lambda: self.inputs(name),
            run,
            is_there,
            keeps=True,
        )

    def test_stage(self, trained: str) -> Stage:
        """Evaluate a detector on the test split."""
        name = f'test_{trained}'

        def run(folder: Path, goes_on: bool, screen: Screen) -> dict:
            checkpoint = self.result(trained)['checkpoint']
            command = self.command('test', trained, checkpoint)
            self.run_program(
                [*command, '--work-dir', str(folder)],
                name,
                lambda: screen.update(None, ''),
            )
            (metrics,) = folder.glob('*/*.json')
            return json.loads(metrics.read_text())

        return Stage(
            name,
            f'test the {TITLES[trained]}',
            EXPECTED[name],
            lambda: {
                **self.inputs(trained),
                'checkpoint': self.result(trained)['sha256'],
            },
            run,
        )

    def measure_stage(self) -> Stage:
        """Load the ERA student with stock mmdet; time and draw."""

        def job() -> dict:
            return {
                'configs': {name: config_file(name) for name in CONFIGS},
                'checkpoints': {
                    name: self.result(name)['checkpoint'] for name in CONFIGS
                },
                'data': str(self.data),
            }

        def inputs() -> dict:
            return {
                **job(),
                'detectors': [self.inputs(name) for name in CONFIGS],
                'sums': [self.result(name)['sha256'] for name in CONFIGS],
                'script': file_sum('tools/demo_measure.py'),
            }

        def run(folder: Path, goes_on: bool, screen: Screen) -> dict:
            write_json(folder / 'job.json', job())
            state = folder / 'state.json'

            def watch() -> None:
                entry = read_json(state) or {'share': None, 'text': 'starting'}
                screen.update(entry['share'], entry['text'])

            self.run_program(
                [sys.executable, 'tools/demo_measure.py', str(folder)],
                'measure',
                watch,
            )
            return json.loads((folder / 'result.json').read_text())

        return Stage(
            'measure',
            'load with stock mmdet, time, draw',
            EXPECTED['measure'],
            inputs,
            run,
            is_there=lambda result: (
                self.work / 'measure' / 'detections.png'
            ).exists(),
        )

    def command(self, tool: str, name: str, *more: str) -> list[str]:
        """A call of train.py or test.py."""
        options = [f'{k}={v}' for k, v in self.options(name).items()]
        return [
            sys.executable,
            f'tools/{tool}.py',
            config_file(name),
            *more,
            '--cfg-options',
            *options,
        ]

    def run_program(self, command: list[str], name: str, watch) -> None:
        """Run a program with its log beside the stages' folders."""
        run_logged(command, self.work / f'{name}.log', watch, self.threads)


def config_file(name: str) -> str:
    """Path of a config."""
    return f'configs/{CONFIGS[name]}.py'


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


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--work-dir', type=Path, default='work_dirs/demo')
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


def main() -> int:
    """Run the demo; the exit status is returned."""
    args = parse_args()
    work = args.work_dir.resolve()
    os.chdir(ROOT)
    if work.is_relative_to(ROOT):
        work = work.relative_to(ROOT)
    sys.path.insert(0, str(ROOT))
    # Ends the running training as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        Demo(work, args.threads, args.quick).run()
    except StageError as error:
        console.print(
            f'\ndemo: {error}', markup=False, highlight=False, soft_wrap=True
        )
        return 1
    except KeyboardInterrupt:
        console.print('\nStopped. Run it again to go on from here.')
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
