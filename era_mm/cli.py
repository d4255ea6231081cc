"""``train`` and ``test``, with the flags of mmdet's scripts, and the tools.

Nothing heavy is imported before the arguments are parsed: mim asks for
``train.py -h`` before every run.
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from era_mm.errors import UserError
from era_mm.hosts import print_hosts

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

# What a wrong config raises while mmengine builds things from it. Other
# errors keep their traceback on the screen.
CONFIG_ERRORS = (
    UserError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OSError,
    ImportError,
    SyntaxError,
)


def run_train(argv: Sequence[str] | None = None) -> int:
    """Train the model of a config; the exit status is returned."""
    return _run(_train_parser().parse_args(argv), _train)


def run_test(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint; the exit status is returned."""
    return _run(_test_parser().parse_args(argv), _test)


def run_export_student(argv: Sequence[str] | None = None) -> int:
    """Write a student as a plain host model; the exit status is returned."""
    return _run(_export_parser().parse_args(argv), _export)


def run_make_config(argv: Sequence[str] | None = None) -> int:
    """Write the config of a distillation; the exit status is returned."""
    return _run(_make_config_parser().parse_args(argv), _make_config)


def run_print_sources(argv: Sequence[str] | None = None) -> int:
    """List a model's modules and shapes; the exit status is returned."""
    return _run(_print_sources_parser().parse_args(argv), _print_sources)


def run_benchmark(argv: Sequence[str] | None = None) -> int:
    """Measure what distillations cost; the exit status is returned."""
    return _run(_benchmark_parser().parse_args(argv), _benchmark)


def run_suite(argv: Sequence[str] | None = None) -> int:
    """Run a matrix of methods and seeds; the exit status is returned."""
    return _run(_suite_parser().parse_args(argv), _suite)


#: Of ``python -m era_mm``; mim starts the file of that name in tools/.
COMMANDS = {
    'train': run_train,
    'test': run_test,
    'export_student': run_export_student,
    'make_config': run_make_config,
    'print_sources': run_print_sources,
    'benchmark': run_benchmark,
    'suite': run_suite,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, or print the packages that era_mm found."""
    parser = argparse.ArgumentParser(
        prog='python -m era_mm',
        description='Run a command. Without one: print the packages that '
        'era_mm found.',
        epilog='<command> -h tells the options of a command.',
    )
    parser.add_argument('command', nargs='?', choices=COMMANDS)
    parser.add_argument('options', nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    if args.command is None:
        print_hosts()
        return 0
    return COMMANDS[args.command](args.options)


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='train', description='Train the model of a config.'
    )
    parser.add_argument('config', help='path or base name of a config')
    _add_common(parser)
    parser.add_argument(
        '--amp', action='store_true', help='train in mixed precision'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the total batch size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint, or without one from the last '
        'checkpoint in the work dir',
    )
    return parser


def _test_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='test', description='Evaluate a checkpoint.'
    )
    parser.add_argument('config', help='path or base name of a config')
    parser.add_argument('checkpoint', help='path or URL of a checkpoint')
    _add_common(parser)
    parser.add_argument(
        '--out', metavar='FILE', help='write all predictions to this .pkl'
    )
    parser.add_argument(
        '--show', action='store_true', help='show each prediction in a window'
    )
    parser.add_argument(
        '--show-dir', metavar='DIR', help='write painted images here'
    )
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        metavar='SECONDS',
        help='how long --show keeps an image up (default: 2)',
    )
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation'
    )
    return parser


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='export_student',
        description='Write what a distillation has trained as an ordinary '
        'model of the host: PREFIX.py and PREFIX.pth.',
    )
    parser.add_argument(
        'config', help='path or base name of the config it was trained with'
    )
    parser.add_argument(
        'checkpoint', help='path or URL of what the training has written'
    )
    parser.add_argument(
        '--mode',
        choices=['S', 'E0', 'T'],
        default='S',
        help="S: the student alone. E0: with the teacher's head, the align "
        'layer folded in. T: with MBRNet and the head (needs era_mm). '
        '(default: S)',
    )
    parser.add_argument(
        '--out',
        required=True,
        metavar='PREFIX',
        help='where to write, without extension',
    )
    parser.add_argument(
        '--distiller',
        metavar='NAME',
        help='whose mode, where the config has several distillers',
    )
    parser.add_argument(
        '--student',
        metavar='NAME',
        help='which of two students that taught each other',
    )
    parser.add_argument(
        '--keep-align',
        action='store_true',
        help='with E0: leave the align layer as a stock layer behind the '
        'neck, also where it cannot be folded',
    )
    _add_config_options(parser)
    # Of the flags that every command knows, a single process has no ranks.
    parser.set_defaults(local_rank=0)
    return parser


def _make_config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='make_config',
        description='Write the config that distils one model into another. '
        "It inherits the student's own config.",
    )
    reference = "path of a host config, or 'mmdet::...', 'mmpretrain::...'"
    parser.add_argument(
        '--student', required=True, metavar='CONFIG', help=reference
    )
    parser.add_argument(
        '--teacher', required=True, metavar='CONFIG', help=reference
    )
    parser.add_argument(
        '--student-checkpoint',
        metavar='FILE',
        help='path or URL of weights that the student starts from',
    )
    parser.add_argument(
        '--teacher-checkpoint',
        metavar='FILE',
        help="path or URL of the teacher's weights (default: what the host "
        "publishes for a teacher given as 'mmdet::...')",
    )
    parser.add_argument(
        '--method',
        action='append',
        metavar='NAME',
        help='how to distil: a method with a teacher, by the name of its '
        'module in era_mm/methods (default: era); may be given several '
        'times; a wrong name shows all',
    )
    parser.add_argument(
        '--out', required=True, metavar='FILE', help='where to write, a .py'
    )
    _add_traceback(parser)
    parser.set_defaults(local_rank=0)
    return parser


def _print_sources_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='print_sources',
        description='List the modules of a model with the shapes they put '
        'out, to choose a `source` from. C x H x W /stride, without the '
        'batch.',
    )
    parser.add_argument(
        'config',
        help="path or base name of a config, a distillation's or a host's, "
        "or 'mmdet::...'",
    )
    parser.add_argument(
        '--depth',
        type=int,
        default=2,
        help='how many parts a name may have (default: 2)',
    )
    parser.add_argument(
        '--input-size',
        type=int,
        metavar='PIXELS',
        help="side of the image (default: what a classifier's pipeline "
        'crops; 256 for detectors)',
    )
    _add_traceback(parser)
    parser.set_defaults(local_rank=0)
    return parser


def _benchmark_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='benchmark',
        description='Measure time and memory of distillations beside what '
        'they cannot do without: the plain step of their student (a) and the '
        "teacher's forward pass (b). No data and no weights are needed.",
    )
    parser.add_argument(
        'configs',
        nargs='+',
        metavar='config',
        help='path or base name of the config of a distillation; several '
        'must have the same student',
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        metavar='N',
        help='images per step (default: as the first config trains)',
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help="of the images, in pixels (default: as the first config's data "
        'pipeline makes them)',
    )
    parser.add_argument(
        '--objects',
        type=int,
        default=5,
        metavar='N',
        help='objects per image of a detector (default: 5)',
    )
    parser.add_argument(
        '--iters',
        type=int,
        default=50,
        metavar='N',
        help='rounds that are measured; each runs every step once '
        '(default: 50)',
    )
    parser.add_argument(
        '--warmup',
        type=int,
        default=30,
        metavar='N',
        help='rounds of training steps before (default: 30)',
    )
    parser.add_argument(
        '--start-iter',
        type=int,
        metavar='N',
        help='iteration that the first step takes itself for (default: 1000, '
        'or later where a schedule or phase is not over by then)',
    )
    parser.add_argument(
        '--threads',
        type=int,
        metavar='N',
        help='threads of the CPU (default: 1; with a GPU as they are)',
    )
    parser.add_argument(
        '--device',
        choices=['cpu', 'cuda'],
        help='where to run (default: on a GPU, where there is one)',
    )
    parser.add_argument(
        '--amp', action='store_true', help='train in mixed precision'
    )
    parser.add_argument(
        '--out', metavar='FILE', help='write everything measured to this JSON'
    )
    _add_config_options(parser)
    parser.set_defaults(local_rank=0)
    return parser


def _suite_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='suite',
        description='Run a matrix of methods, pairs and seeds, and write its '
        'rows and the page of all results. What is finished is not run '
        'again; what was interrupted goes on.',
    )
    parser.add_argument('file', help='the suite file, see docs/suite.md')
    parser.add_argument(
        '--jobs',
        type=int,
        metavar='N',
        help='runs at a time, one thread each; a GPU is shared (default: as '
        'many as there are cores). 0: run nothing, write the page',
    )
    parser.add_argument(
        '--only',
        nargs='+',
        default=[],
        metavar='PATTERN',
        help="run these cells only, e.g. 'w32_w16/era*/s0'",
    )
    parser.add_argument(
        '--again',
        nargs='+',
        default=[],
        metavar='PATTERN',
        help='run these cells once more, from the beginning',
    )
    parser.add_argument(
        '--dry-run',
        action='store_true',
        help='list the cells and what would be run',
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        metavar='DIR',
        help='where the runs write (default: work_dirs/suites/<name>)',
    )
    parser.add_argument(
        '--results',
        type=Path,
        default=Path('results'),
        metavar='DIR',
        help='folder of the rows (default: results)',
    )
    parser.add_argument(
        '--page',
        type=Path,
        default=Path('docs/results.md'),
        metavar='FILE',
        help='the page that is made of them (default: docs/results.md)',
    )
    parser.add_argument(
        '--commit',
        help='what the rows call the code (default: what git says)',
    )
    _add_traceback(parser)
    parser.set_defaults(local_rank=0)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--work-dir',
        metavar='DIR',
        help='where logs and checkpoints go (default: the work_dir of the '
        'config, else work_dirs/<config name>)',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the ranks were started (default: none)',
    )
    # torch.distributed.launch passes either spelling, by its version.
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help=argparse.SUPPRESS,
    )
    _add_config_options(parser)


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='override config entries, e.g. train_cfg.max_epochs=3 '
        'model.backbone.depth=18 key="[a,b]"',
    )
    _add_traceback(parser)


def _add_traceback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--traceback',
        action='store_true',
        help='print the whole traceback of an error',
    )


def _run(
    args: argparse.Namespace, command: Callable[[argparse.Namespace], None]
) -> int:
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    try:
        command(args)
    except CONFIG_ERRORS as error:
        if args.traceback:
            raise
        print(_explain(error), file=sys.stderr)
        return 1
    finally:
        leave_group()
    return 0


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


def _explain(error: BaseException) -> str:
    """One message for an error, and where its traceback was kept."""
    # str() of a KeyError shows quotes and backslashes.
    text = error.args[0] if isinstance(error, KeyError) else error
    if isinstance(error, UserError):
        return f'\nerror: {text}'
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
                    f'got {option!r}. Quote values that hold a space.'
                )
        # DictAction only works inside a parser, and importing it before the
        # arguments are parsed would make -h slow.
        parser = argparse.ArgumentParser()
        parser.add_argument('--cfg-options', nargs='+', action=DictAction)
        parsed = parser.parse_args(['--cfg-options', *options])
        cfg.merge_from_dict(parsed.cfg_options)
    return cfg


def _load_config(args: argparse.Namespace) -> 'Config':
    cfg = _read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', Path(cfg.filename).stem))
    return cfg


def _build_runner(cfg: 'Config', runner_class: 'type[Runner]') -> 'Runner':
    from era_mm.engine.launch import prepare_launch

    prepare_launch(cfg)
    if 'runner_type' in cfg:
        from mmengine.registry import RUNNERS

        return RUNNERS.build(cfg)
    return runner_class.from_cfg(cfg)


def _train(args: argparse.Namespace) -> None:
    from era_mm.engine import preflight
    from era_mm.engine.launch import use_amp
    from era_mm.engine.preflight_hook import add_preflight
    from era_mm.engine.runner import TrainingRunner

    cfg = _load_config(args)
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError(
                '--auto-scale-lr: expected auto_scale_lr = '
                'dict(enable=True, base_batch_size=...) in the config, but '
                f'{args.config} has none. Add it, or leave the flag out.'
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
    runner = _build_runner(cfg, TrainingRunner)
    add_preflight(runner, cfg)
    runner.train()


def _test(args: argparse.Namespace) -> None:
    from mmengine.runner import Runner

    from era_mm.engine import preflight
    from era_mm.engine.testing_options import add_outputs, add_show, use_tta

    cfg = _load_config(args)
    cfg.load_from = args.checkpoint
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        raise UserError(
            f'--out: expected a name that ends in .pkl, but got {args.out!r}.'
        )
    if args.show or args.show_dir:
        add_show(cfg, args.show, args.show_dir, args.wait_time)
    if args.tta:
        use_tta(cfg)
    preflight.check_checkpoints(cfg, training=False)
    preflight.check_data(cfg, ('test',))
    runner = _build_runner(cfg, Runner)
    if args.out is not None:
        add_outputs(runner, args.out)
    runner.test()


def _export(args: argparse.Namespace) -> None:
    from era_mm.engine.export import export_student

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

    # What models say when they are built; the report says what matters.
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

    print(
        print_sources(
            read_host_config(args.config),
            depth=args.depth,
            input_size=args.input_size,
        )
    )


def _benchmark(args: argparse.Namespace) -> None:
    # What torch's profiler would say on the screen of itself; torch reads it
    # when it is imported.
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')
    os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')
    from era_mm.engine.benchmark import Options, measure
    from era_mm.engine.benchmark_report import check_out, show, write

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
        raise UserError('stopped. Run it again to go on from here.') from None
    if not done:
        raise UserError(
            'some runs failed, see above. Mend what their logs name and run '
            'it again: finished runs are not repeated.'
        )
