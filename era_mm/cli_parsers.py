"""The options of the commands."""

import argparse
from pathlib import Path


def train_parser() -> argparse.ArgumentParser:
    """Of ``train``."""
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
        help='resume from this checkpoint, or without a file from the newest '
        'complete checkpoint in the work dir',
    )
    return parser


def test_parser() -> argparse.ArgumentParser:
    """Of ``test``."""
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
        help='seconds for which --show keeps an image open (default: 2)',
    )
    parser.add_argument(
        '--tta', action='store_true', help='test-time augmentation'
    )
    return parser


def export_parser() -> argparse.ArgumentParser:
    """Of ``export``."""
    parser = argparse.ArgumentParser(
        prog='export_student',
        description='Write the student of a distillation as an ordinary '
        'model of the host: PREFIX.py and PREFIX.pth.',
    )
    parser.add_argument(
        'config', help='path or base name of the config it was trained with'
    )
    parser.add_argument(
        'checkpoint', help='path or URL of a checkpoint of its training'
    )
    parser.add_argument(
        '--mode',
        default='S',
        help='S: the student alone; or a mode that the distiller exports. '
        "ERA: E0, with the teacher's head, the align layer folded in; T, with "
        'MBRNet and the head (needs era_mm). (default: S)',
    )
    parser.add_argument(
        '--out',
        required=True,
        metavar='PREFIX',
        help='path to write to, without extension',
    )
    parser.add_argument(
        '--distiller',
        metavar='NAME',
        help='the distiller, if several offer the mode',
    )
    parser.add_argument(
        '--student',
        metavar='NAME',
        help='which of the two students of a mutual distillation',
    )
    parser.add_argument(
        '--keep-align',
        action='store_true',
        help='with E0: keep the align layer as a stock layer after the '
        'neck, also if it cannot be folded',
    )
    _add_trust(parser)
    _add_config_options(parser)
    # A single process has no ranks, unlike the common flags assume.
    parser.set_defaults(local_rank=0)
    return parser


def make_config_parser() -> argparse.ArgumentParser:
    """Of ``make_config``."""
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
        help='a method with a teacher, by the name of its module in '
        'era_mm/methods, or a recipe on logits: kl, dist, dkd, lskd '
        '(default: era); may be given several times; an unknown name lists '
        'all',
    )
    parser.add_argument(
        '--out', required=True, metavar='FILE', help='where to write, a .py'
    )
    _add_trust(parser)
    _add_traceback(parser)
    parser.set_defaults(local_rank=0)
    return parser


def print_sources_parser() -> argparse.ArgumentParser:
    """Of ``print_sources``."""
    parser = argparse.ArgumentParser(
        prog='print_sources',
        description='List the modules of a model with the shapes of their '
        'outputs, to choose a `source` from. C x H x W /stride, without the '
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
        help='maximum number of parts of a name (default: 2)',
    )
    parser.add_argument(
        '--input-size',
        type=int,
        metavar='PIXELS',
        help="side of the image (default: the crop of a classifier's "
        'pipeline; 256 for detectors)',
    )
    _add_traceback(parser)
    parser.set_defaults(local_rank=0)
    return parser


def benchmark_parser() -> argparse.ArgumentParser:
    """Of ``benchmark``."""
    parser = argparse.ArgumentParser(
        prog='benchmark',
        description='Measure time and memory of distillations relative to a '
        'lower bound: the plain step of their student (a) and the '
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
        help='size of the images in pixels (default: from the data pipeline '
        'of the first config)',
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
        help='iteration number of the first step (default: 1000, or later '
        'if a schedule or phase ends later)',
    )
    parser.add_argument(
        '--threads',
        type=int,
        metavar='N',
        help='CPU threads (default: 1; unchanged with a GPU)',
    )
    parser.add_argument(
        '--device',
        choices=['cpu', 'cuda'],
        help='where to run (default: on a GPU if there is one)',
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


def suite_parser() -> argparse.ArgumentParser:
    """Of ``suite``."""
    parser = argparse.ArgumentParser(
        prog='suite',
        description='Run a matrix of methods, pairs and seeds, and write its '
        'rows and the page of all results. Finished runs are not repeated; '
        'interrupted ones are resumed.',
    )
    parser.add_argument('file', help='the suite file, see docs/suite.md')
    parser.add_argument(
        '--jobs',
        type=int,
        metavar='N',
        help='number of concurrent runs, with one thread each; a GPU is '
        'shared (default: number of cores). 0: run nothing, write the page',
    )
    parser.add_argument(
        '--only',
        nargs='+',
        default=[],
        metavar='PATTERN',
        help="run only these cells, e.g. 'w32_w16/era*/s0'",
    )
    parser.add_argument(
        '--again',
        nargs='+',
        default=[],
        metavar='PATTERN',
        help='run these cells again, from the beginning',
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
        help='folder of the runs (default: work_dirs/suites/<name>)',
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
        help='the page to write (default: docs/results.md)',
    )
    parser.add_argument(
        '--commit',
        help='commit to write in the rows (default: from git)',
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
    _add_trust(parser)
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


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read checkpoints that hold more than weights and may run any '
        'code (ERA_MM_TRUST_CHECKPOINT=1 in the environment does the same)',
    )


def _add_traceback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--traceback',
        action='store_true',
        help='print the whole traceback of an error',
    )
