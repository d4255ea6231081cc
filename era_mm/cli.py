"""``train`` and ``test``, with the flags of mmdet's scripts, and the tools.

Nothing heavy is imported before the arguments are parsed: mim asks for
``train.py -h`` before every run.
"""

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from era_mm.cli_parsers import (
    benchmark_parser,
    export_parser,
    make_config_parser,
    print_sources_parser,
    suite_parser,
    test_parser,
    train_parser,
)
from era_mm.errors import UserError, is_own, said_of, without_workers
from era_mm.hosts import print_hosts

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner


def run_train(argv: Sequence[str] | None = None) -> int:
    """Train the model of a config; returns the exit status."""
    return _run(train_parser().parse_args(argv), _train)


def run_test(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint; returns the exit status."""
    return _run(test_parser().parse_args(argv), _test)


def run_export_student(argv: Sequence[str] | None = None) -> int:
    """Write a student as a plain host model; returns the exit status."""
    return _run(export_parser().parse_args(argv), _export)


def run_make_config(argv: Sequence[str] | None = None) -> int:
    """Write the config of a distillation; returns the exit status."""
    return _run(make_config_parser().parse_args(argv), _make_config)


def run_print_sources(argv: Sequence[str] | None = None) -> int:
    """List a model's modules and shapes; returns the exit status."""
    return _run(print_sources_parser().parse_args(argv), _print_sources)


def run_benchmark(argv: Sequence[str] | None = None) -> int:
    """Measure the cost of distillations; returns the exit status."""
    return _run(benchmark_parser().parse_args(argv), _benchmark)


def run_report(argv: Sequence[str] | None = None) -> int:
    """Write a report about runs; returns the exit status."""
    from era_mm.report import command

    return _run(command.make_parser().parse_args(argv), command.run)


def run_suite(argv: Sequence[str] | None = None) -> int:
    """Run a matrix of methods and seeds; returns the exit status."""
    return _run(suite_parser().parse_args(argv), _suite)


#: Of ``python -m era_mm``; mim starts the file of that name in tools/.
COMMANDS = {
    'train': run_train,
    'test': run_test,
    'export_student': run_export_student,
    'make_config': run_make_config,
    'print_sources': run_print_sources,
    'benchmark': run_benchmark,
    'suite': run_suite,
    'report': run_report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, or print the packages that era_mm found."""
    parser = argparse.ArgumentParser(
        prog='python -m era_mm',
        description='Run a command. Without one: print the packages that '
        'era_mm found.',
        epilog='<command> -h shows the options of a command.',
    )
    parser.add_argument('command', nargs='?', choices=COMMANDS)
    parser.add_argument('options', nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    if args.command is None:
        print_hosts()
        return 0
    return COMMANDS[args.command](args.options)


def _run(
    args: argparse.Namespace,
    command: Callable[[argparse.Namespace], int | None],
) -> int:
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    try:
        return command(args) or 0
    except KeyboardInterrupt:
        print(
            '\nstopped by Ctrl-C; --resume goes on from the last checkpoint.'
            if command is _train
            else '\nstopped by Ctrl-C.',
            file=sys.stderr,
        )
        return 128 + signal.SIGINT
    except Exception as error:
        if args.traceback:
            raise
        print(_explain(error), file=sys.stderr)
        return 1
    finally:
        leave_group()


def leave_group() -> None:
    """Leave the process group, if this process is in one."""
    distributed = sys.modules.get('torch.distributed')
    if (
        distributed is not None
        and distributed.is_available()
        and distributed.is_initialized()
    ):
        if distributed.get_backend() == 'gloo':
            # A thread of gloo that is still dropping the last gradients'
            # all-reduce needs the GIL, and torch 2.12 joins that thread
            # without giving the GIL up: the rank would hang for ever.
            time.sleep(0.5)
        distributed.destroy_process_group()


def _guard(args: argparse.Namespace) -> None:
    """Refuse checkpoints that may run code, unless the user trusts them."""
    from era_mm.core.places import guard_reading
    from era_mm.core.safe_files import TRUST, is_trusted

    if getattr(args, 'trust_checkpoint', False):
        os.environ[TRUST] = '1'
    is_trusted()
    guard_reading()


def _explain(error: BaseException) -> str:
    """One message for an error, with the file that has its traceback."""
    # str() of a KeyError shows quotes and backslashes.
    is_key = isinstance(error, KeyError) and error.args
    text = without_workers(error, str(error.args[0] if is_key else error))
    if is_own(error):
        cause = error.__cause__
        hint = '\n--traceback prints where it was raised.'
        return f'\nerror: {text}' + (
            hint if cause is not None and not is_own(cause) else ''
        )
    with tempfile.NamedTemporaryFile(
        'w', prefix='era_mm-', suffix='.traceback.txt', delete=False
    ) as file:
        traceback.print_exception(error, file=file)
    return (
        f'\nerror: {type(error).__name__}: {text}\n'
        f'The whole traceback is in {file.name}; --traceback prints it.'
    )


def _read_config(name: str, options: Sequence[str] | None) -> 'Config':
    from mmengine.config import Config, DictAction

    from era_mm.engine.preflight import find_config

    cfg = Config.fromfile(find_config(name))
    if options is not None:
        for option in options:
            if '=' not in option:
                raise UserError(
                    '--cfg-options: expected KEY=VALUE without spaces, but '
                    f'got {option!r}. Quote values with a space.'
                )
        # DictAction only works inside a parser, and importing it before the
        # arguments are parsed would make -h slow.
        parser = argparse.ArgumentParser()
        parser.add_argument('--cfg-options', nargs='+', action=DictAction)
        found: dict = {}
        for option in options:
            try:
                parsed = parser.parse_args(['--cfg-options', option])
            except (AssertionError, RecursionError):
                raise UserError(
                    f'--cfg-options: cannot read {option!r}. Expected a '
                    'number, a text, a list [a,b] or a tuple (a,b); set the '
                    'keys of a dict one by one: KEY.NAME=VALUE.'
                ) from None
            found |= parsed.cfg_options
        # In one piece: keys of one dict may belong together (_delete_).
        cfg.merge_from_dict(found)
    return cfg


def _load_config(args: argparse.Namespace) -> 'Config':
    cfg = _read_config(args.config, args.cfg_options)
    _guard(args)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', Path(cfg.filename).stem))
    return cfg


def _build_runner(cfg: 'Config', runner_class: 'type[Runner]') -> 'Runner':
    from era_mm.engine.launch import prepare_launch

    prepare_launch(cfg)
    with said_of('the config', 'Correct it.'):
        if 'runner_type' in cfg:
            from mmengine.registry import RUNNERS

            return RUNNERS.build(cfg)
        return runner_class.from_cfg(cfg)


def _train(args: argparse.Namespace) -> int:
    from era_mm.engine import preflight
    from era_mm.engine.config_check import check_config, remarks_on
    from era_mm.engine.finite_hook import add_finite_check
    from era_mm.engine.launch import use_amp
    from era_mm.engine.preflight_hook import add_preflight
    from era_mm.engine.progress_hook import progress_of
    from era_mm.engine.run_table_hook import add_run_table
    from era_mm.engine.runner import TrainingRunner
    from era_mm.engine.stop_hook import StopHook, Stopped, shielded_workers
    from era_mm.engine.whole_files import full_disk_said, guard_writing
    from era_mm.engine.work_dir import check_work_dir, held

    cfg = _load_config(args)
    check_config(cfg)
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError(
                '--auto-scale-lr: expected auto_scale_lr = '
                'dict(enable=True, base_batch_size=...) in the config, but '
                f'{args.config} has none. Add it, or omit the flag.'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume == 'auto':
        cfg.resume = True
        cfg.load_from = None
    elif args.resume is not None:
        cfg.resume = True
        cfg.load_from = args.resume
    preflight.check_checkpoints(cfg)
    preflight.check_data(cfg, ('train', 'val'))
    check_work_dir(cfg)
    guard_writing()
    with held(cfg.work_dir), full_disk_said(cfg.work_dir):
        runner = _build_runner(cfg, TrainingRunner)
        for remark in remarks_on(cfg):
            runner.logger.warning(remark)
        add_preflight(runner, cfg)
        add_finite_check(runner)
        add_run_table(runner, cfg)
        runner.register_hook(StopHook())
        try:
            with progress_of(runner), shielded_workers():
                runner.train()
        except Stopped as stopped:
            print(f'\n{stopped}', file=sys.stderr)
            return 128 + stopped.number
    return 0


def _test(args: argparse.Namespace) -> None:
    from era_mm.engine import preflight
    from era_mm.engine.config_check import check_config
    from era_mm.engine.runner import TestingRunner
    from era_mm.engine.testing_options import add_outputs, add_show, use_tta

    cfg = _load_config(args)
    check_config(cfg)
    cfg.load_from = args.checkpoint
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        raise UserError(
            f'--out: expected a name that ends in .pkl, but got {args.out!r}.'
        )
    if args.show or args.show_dir:
        add_show(cfg, args.show, args.show_dir, args.wait_time)
    if args.tta:
        use_tta(cfg)
    lacking = [
        key
        for key in ('test_dataloader', 'test_cfg', 'test_evaluator')
        if cfg.get(key) is None
    ]
    if lacking:
        raise UserError(
            f'{args.config} has no {", ".join(lacking)}, so there is nothing '
            'to test on. Add them, as in the configs of the hosts.'
        )
    preflight.check_checkpoints(cfg, training=False)
    preflight.check_data(cfg, ('test',))
    runner = _build_runner(cfg, TestingRunner)
    if args.out is not None:
        add_outputs(runner, args.out)
    runner.test()


def _export(args: argparse.Namespace) -> None:
    from era_mm.engine.export import export_student

    _guard(args)
    exported = export_student(
        _read_config(args.config, args.cfg_options),
        args.checkpoint,
        args.out,
        mode=args.mode,
        distiller=args.distiller,
        keep_align=args.keep_align,
        student=args.student,
    )
    number = sum(p.numel() for p in exported.model.parameters())
    print(f'{exported.config}\n{exported.checkpoint}')
    print(
        f'{args.mode}: {type(exported.model).__name__}, '
        f'{number / 1e6:.2f} M parameters; '
        + (
            f'needs era_mm for {", ".join(exported.needs_era_mm)}'
            if exported.needs_era_mm
            else 'needs no era_mm'
        )
    )


def _make_config(args: argparse.Namespace) -> None:
    from mmengine.logging import MMLogger

    from era_mm.engine.make_config import run

    _guard(args)
    # Messages of models being built; the report shows what matters.
    MMLogger.get_current_instance().setLevel('WARNING')
    print(
        run(
            args.student,
            args.teacher,
            method=args.method or ['era'],
            out=args.out,
            student_checkpoint=args.student_checkpoint,
            teacher_checkpoint=args.teacher_checkpoint,
        )
    )
    quoted = shlex.quote(str(args.out))
    print(f'wrote {args.out}; train it with\n  mim train era_mm {quoted}')


def _print_sources(args: argparse.Namespace) -> None:
    from era_mm.engine.host_configs import read_host_config
    from era_mm.engine.print_sources import print_sources

    _guard(args)
    print(
        print_sources(
            read_host_config(args.config),
            depth=args.depth,
            input_size=args.input_size,
        )
    )


def _benchmark(args: argparse.Namespace) -> None:
    # Silences messages of torch's profiler; torch reads it when imported.
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')
    os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')
    from era_mm.engine.benchmark import Options, measure
    from era_mm.engine.benchmark_report import check_out, show, write

    _guard(args)
    options = Options(
        batch_size=args.batch_size,
        size=args.size and tuple(args.size),
        objects=args.objects,
        iters=args.iters,
        warmup=args.warmup,
        start_iter=args.start_iter,
        threads=args.threads,
        device=args.device,
        amp=args.amp,
    )
    out = args.out and Path(args.out)
    if out:
        check_out(out)
    cfgs = [_read_config(name, args.cfg_options) for name in args.configs]
    record = measure(cfgs, options)
    show(record)
    if out:
        write(record, out)


def _suite(args: argparse.Namespace) -> None:
    from era_mm.engine.suite.command import run_suite

    try:
        done = run_suite(
            args.file,
            jobs=args.jobs,
            work_dir=args.work_dir,
            results=args.results,
            page=args.page,
            only=args.only,
            again=args.again,
            dry_run=args.dry_run,
            commit=args.commit,
        )
    except KeyboardInterrupt:
        raise UserError('stopped. Run it again to continue.') from None
    if not done:
        raise UserError(
            'some runs failed, see above. Correct what their logs name and '
            'run it again: finished runs are not repeated.'
        )
