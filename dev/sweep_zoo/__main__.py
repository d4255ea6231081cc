"""Try every family of the hosts' model zoos, alone and in pairs.

python -m dev.sweep_zoo --only mmdet::fcos
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dev.sweep_zoo.families import PARTNERS, config_of, folders
from dev.sweep_zoo.page import Results, host_versions, page
from dev.sweep_zoo.trial import (
    CELLS,
    MEMORY_GIB,
    TIMEOUT_S,
    Cell,
    finish,
)
from era_mm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def sweep(args: argparse.Namespace) -> None:
    """Try what has no result yet, or what was asked for."""
    # Before the processes part, so that each need not.
    import mmdet.apis
    import mmdet.testing  # noqa: F401
    import torch
    from mmdet.utils import register_all_modules
    from mmpretrain.utils import register_all_modules as register_classifiers

    import era_mm.engine.make_config  # noqa: F401

    register_all_modules(init_default_scope=False)
    register_classifiers(init_default_scope=False)

    torch.set_num_threads(1)
    args.logs.mkdir(parents=True, exist_ok=True)
    configs = {
        family: config
        for host in PARTNERS
        for family in folders(host)
        if (config := config_of(family)) is not None
    }
    results = Results(args.results, host_versions(), list(configs))

    def is_wanted(cell: Cell) -> bool:
        known = results.cells.get(cell.key)
        if known is None or known['config'] != cell.config:
            # Without the plain model there is nothing to go on from.
            return cell.kind in ('plain', *args.cells)
        again = args.only and not (args.failed and known['result'] == 'works')
        return bool(again) and cell.kind in args.cells

    def run(*cells: Cell) -> None:
        for cell, found in finish(
            [cell for cell in cells if is_wanted(cell)],
            args.jobs,
            timeout=args.timeout,
            memory=args.memory,
            logs=args.logs,
        ):
            results.add(cell, found)
            print(*cell.key, found['result'], found.get('detail', ''))
            sys.stdout.flush()

    for family, config in configs.items():
        if not _is_asked(family, args.only):
            continue
        run(Cell(family, config, 'plain'))
        plain = results.cells[family, 'plain']
        if plain['result'] == 'works':
            size = tuple(plain['size'])
            run(*(Cell(family, config, kind, size) for kind in CELLS[1:]))


def _is_asked(family: str, only: Sequence[str]) -> bool:
    return not only or family in only or family.partition('::')[2] in only


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--only',
        nargs='+',
        default=[],
        metavar='NAME',
        help='families to try again: mmdet::fcos, or fcos',
    )
    parser.add_argument(
        '--cells',
        nargs='+',
        default=CELLS,
        choices=CELLS,
        help='try these alone, and the plain model where it is new',
    )
    parser.add_argument(
        '--failed',
        action='store_true',
        help='of --only, try again what does not work',
    )
    parser.add_argument(
        '--table-only', action='store_true', help='only write the page'
    )
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--timeout', type=float, default=TIMEOUT_S)
    parser.add_argument(
        '--memory', type=int, default=MEMORY_GIB, help='GiB of a trial'
    )
    parser.add_argument('--out', type=Path, default=ROOT / 'docs/zoo.md')
    parser.add_argument(
        '--results', type=Path, default=ROOT / 'results/zoo.jsonl'
    )
    parser.add_argument(
        '--logs',
        type=Path,
        default=ROOT / 'work_dirs/sweep_zoo',
        help='what the trials print',
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool."""
    args = parse_args(argv)
    try:
        if not args.table_only:
            sweep(args)
        args.out.write_text(page(Results(args.results)))
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
