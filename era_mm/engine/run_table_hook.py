"""The results of a training, in a few lines at its end."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner

from era_mm.errors import UserError
from era_mm.hosts import versions
from era_mm.registry import HOOKS
from era_mm.report.comparison import find_metric, is_same_student
from era_mm.report.runs import METRICS, Run, read_run

#: Number of folders next to the work dir to search for the plain run.
MOST_SIBLINGS = 30


@HOOKS.register_module()
class RunTableHook(Hook):
    """Logs versions and machine, and at the end a short table of results.

    The table has the plain student's metric, if its work dir is known; the
    last and best metric of each mode, with the epoch; the student's file and
    the command that exports it; and the command that writes the report.
    ``train`` adds the hook to every run; ``report = False`` in the config
    turns it off, ``report = dict(plain='work_dirs/...')`` sets the plain run.

    Without that, the newest folders next to the work dir are searched for a
    run of the same model without teacher, of the same length.

    Source: ours.

    Args:
        plain: Work dir of the plain student's run.

    Raises:
        UserError: ``plain`` is not a folder.
    """

    # After the last checkpoint is written and the last metrics are logged.
    priority = 'LOWEST'

    def __init__(self, plain: str | None = None) -> None:
        if plain is not None and not Path(plain).is_dir():
            raise UserError(
                "report.plain: expected the work dir of the plain student's "
                f'run, but {plain!r} is not a folder. Correct it, or remove '
                'it.'
            )
        self.plain = plain

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Log versions and machine, for the report."""
        from era_mm.engine.benchmark_report import machine

        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        found = machine(torch.device(device))
        where = found.get('gpu') or found['cpu']
        packages = ', '.join(f'{k} {v}' for k, v in versions().items())
        runner.logger.info(
            f'Made with: {packages}; torch {torch.__version__}; {where}, '
            f'{found["threads"]} thread(s), {runner.world_size} rank(s)'
        )

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Log the table."""
        try:
            lines = table_of(Path(runner.work_dir), self.plain)
        except Exception as error:
            # The table must not fail a run that has succeeded.
            runner.logger.warning(
                f'No table of the run: {type(error).__name__}: {error}'
            )
            return
        runner.logger.info('Results:\n' + '\n'.join(lines))


def table_of(work_dir: Path, plain: str | None = None) -> list[str]:
    """The table's lines.

    Args:
        work_dir: Work dir of the run.
        plain: Work dir of the plain run; None: search next to ``work_dir``.
    """
    run = read_run(work_dir)
    key = find_metric([run])
    name, percent = METRICS.get(key, (key, 1.0))
    unit = 'epoch' if run.by_epoch else 'iteration'
    lines = [f'{"":<20}{"last " + name:>12}{"best " + name:>12}{unit:>11}']
    other = None
    if run.is_distillation:
        other = read_run(plain) if plain else find_plain_run(run)
        if other is not None:
            lines += _line('plain student', other, key, '', percent)
            lines[-1] += f'  {other.folder}'
    for mode in run.modes:
        title = mode or ('student, S' if run.is_distillation else 'model')
        lines += _line(title, run, key, mode, percent)
    if len(lines) == 1:
        lines = ['no metrics of validation were logged']
    if run.checkpoint is not None:
        lines.append(f'{"its file":<20}{run.checkpoint}')
        if run.is_distillation:
            config = next(iter(sorted(work_dir.glob('*.py'))), work_dir)
            lines.append(
                f'{"as a stock model":<20}'
                + _command(
                    *('export_student', config, run.checkpoint),
                    *('--out', work_dir / 'student'),
                )
            )
    folders = [r.folder for r in (run, other) if r is not None]
    lines.append(
        f'{"as a report":<20}'
        + _command('report', *folders, '--out', f'{work_dir.name}.html')
    )
    return lines


def _command(*words: object) -> str:
    return shlex.join(['python', '-m', 'era_mm', *map(str, words)])


def _line(
    title: str, run: Run, key: str, mode: str, percent: float
) -> list[str]:
    last, best = run.last(key, mode), run.best(key, mode)
    if last is None or best is None:
        return []
    return [
        f'{title:<20}{percent * last:>12.1f}{percent * best[1]:>12.1f}'
        f'{best[0]:>11g}'
    ]


def find_plain_run(run: Run) -> Run | None:
    """The plain run of a distillation's student, next to its work dir.

    It has the same model, length and (if set) seed, and has metrics. None if
    there is no such run.
    """
    kin = [
        folder
        for folder in run.folder.resolve().parent.iterdir()
        if folder.is_dir() and folder != run.folder.resolve()
    ]
    kin.sort(key=lambda folder: -folder.stat().st_mtime)
    found: list[Run] = []
    for folder in kin[:MOST_SIBLINGS]:
        if not any(folder.glob('*/vis_data/scalars.json')):
            continue
        other = read_run(folder)
        if (
            other.val
            and not other.is_distillation
            and other.length == run.length
            and is_same_student(other, run)
        ):
            found.append(other)
    found.sort(key=lambda other: other.seed != run.seed)
    return found[0] if found else None


def add_run_table(runner: Runner, cfg: Config) -> None:
    """Register the hook, as set by ``report`` in the config.

    Raises:
        UserError: ``report`` is neither true, false nor a dict.
    """
    options: Any = cfg.get('report', True)
    if not isinstance(options, (bool, Mapping)):
        raise UserError(
            'report: expected True, False, or a dict with arguments of '
            f'era_mm.RunTableHook, but got {options!r}.'
        )
    if options is not False:
        arguments = dict(options) if isinstance(options, Mapping) else {}
        runner.register_hook(RunTableHook(**arguments))
