"""What was found: the file of results, and the page made from it."""

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dev.sweep_zoo.families import CHOSEN, LEFT_OUT, PARTNERS, SMALL_FIRST
from dev.sweep_zoo.trial import (
    BATCH,
    CELLS,
    MEMORY_GIB,
    MOST,
    SIZES,
    TIMEOUT_S,
    Cell,
)
from era_mm.errors import UserError


class Results:
    """What was found: a file of JSON lines.

    The first line names the hosts and the families to try, each other line
    is a cell. It is written anew after every cell, so that a sweep goes on
    where it was stopped.

    Args:
        path: The file.
        hosts: Names and versions of the hosts. None: those of the file.
        families: What there is to try. None: as in the file.

    Raises:
        UserError: It holds results of other hosts.
    """

    def __init__(
        self,
        path: Path,
        hosts: str | None = None,
        families: Sequence[str] | None = None,
    ) -> None:
        self.path = path
        self.cells: dict[tuple[str, str], dict[str, Any]] = {}
        head: dict[str, Any] = dict(hosts='', families=[])
        if path.exists():
            first, *lines = path.read_text().splitlines()
            head = json.loads(first)
            if hosts not in (None, head['hosts']):
                raise UserError(
                    f'--results: {path} holds results of {head["hosts"]}, '
                    f'but installed are {hosts}. Give another file to start '
                    'afresh.'
                )
            for record in map(json.loads, lines):
                self.cells[record['family'], record['cell']] = record
        self.hosts = head['hosts'] if hosts is None else hosts
        self.families = head['families'] if families is None else families

    def add(self, cell: Cell, found: Mapping[str, Any]) -> None:
        """Keep what became of a cell, and write the file."""
        self.cells[cell.key] = dict(
            family=cell.family, config=cell.config, cell=cell.kind, **found
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        records = [dict(hosts=self.hosts, families=self.families)]
        for cells in self.by_family().values():
            records += [cells[kind] for kind in CELLS if kind in cells]
        part = self.path.with_name(f'{self.path.name}.part')
        part.write_text(''.join(json.dumps(r) + '\n' for r in records))
        part.replace(self.path)

    def by_family(self) -> dict[str, dict[str, dict]]:
        """Results of each family by kind of cell; none where not tried."""
        families: dict[str, dict[str, dict]] = {f: {} for f in self.families}
        for (family, kind), record in self.cells.items():
            if family in families:
                families[family][kind] = record
        return families


# -- the table ----------------------------------------------------------------

SHOWN = {
    'plain': 'plain',
    'self': 'with itself',
    'teacher': 'as teacher',
    'student': 'as student',
}
HEADER = """\
# The hosts' model zoos

Which models of the hosts' own zoos can be distilled, tried out family by
family: one config of each folder of `.mim/configs`, alone and in three pairs.
`dev/sweep_zoo` wrote this page; it is not edited by hand.

Hosts: {hosts}.

{counts}

A family counts where its own plain model runs here. It *works* where all its
pairs do; it is *refused* where one pair is, with a reason; it *fails* where
anything else goes wrong.

Columns:

- **plain**: the host's own model: two training steps and a prediction for each
  image.
- **with itself**: student and teacher from two copies of the config.
- **as teacher**: of a {detector} or {classifier} student.
- **as student**: of the same as a teacher.
- In a pair, `make_config` writes the config (method `era`), and the model that
  it describes makes two training steps, with the optimiser of the student's
  config, and predicts each image. *works, TWI*: the teacher's head is reused;
  *works*: it is not, for one of the reasons below the table.

All on a CPU, on batches of {batch} images of noise with random weights, so
that nothing is downloaded. Batch norms of backbone and neck have the
statistics of such a batch, with variances of 1 at least. As many images are
predicted at once as the config's test loader gives. Detectors get the first
of {sizes} (height x width) that the plain model takes. Changed in the configs:
pre-trained weights left out; SyncBN made BN (it needs a GPU);
`BatchFixedSizePad` and `BatchResize` set to the images' size; mixed precision
turned off; learning rates of 1e-5 and gradients clipped to a norm of 1,
because with random weights they may be of any size; and to save time
{most} at most.
Each trial has a process of its own, {memory} GiB and {timeout} s at most.

Of a folder the config of the smallest model by its name: the one with the
first of these words, then the shortest, then by the alphabet: {words}.
Chosen otherwise:

{chosen}

To regenerate: `python -m dev.sweep_zoo`, or one family again with
`--only mmdet::fcos`; results are kept in `results/zoo.jsonl`, and
`--table-only` writes the page from them.
"""


def verdict(cells: Mapping[str, Mapping]) -> str:
    """What a family's results come to.

    Args:
        cells: By kind.

    Returns:
        'works', 'refused', 'fails', 'host' (it does not run here) or 'open'
        (not all was tried).
    """
    found = [cells.get(kind, {}).get('result', 'open') for kind in CELLS]
    if found[0] != 'works':
        return str(found[0])
    for result in ('fails', 'open', 'refused'):
        if result in found:
            return result
    return 'works'


def count(families: Mapping[str, Mapping]) -> str:
    """The table of counts."""
    rows = [
        '| host | families that run | works | refused | fails | host does not '
        'run here | not yet wholly tried |',
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for host in PARTNERS:
        found = [
            verdict(cells)
            for family, cells in families.items()
            if family.startswith(f'{host}::')
        ]
        if not found:
            continue
        runs = [v for v in found if v not in ('host', 'open')]
        works = runs.count('works')
        share = f'{100 * works / len(runs):.1f} %' if runs else '-'
        rows.append(
            f'| {host} | {len(runs)} | {works} ({share}) | '
            f'{runs.count("refused")} | {runs.count("fails")} | '
            f'{found.count("host")} | {found.count("open")} |'
        )
    return '\n'.join(rows)


def _shown(record: Mapping | None) -> str:
    if record is None:
        return '-'
    if record['result'] == 'host':
        return 'host does not run here'
    if record.get('twi'):
        return 'works, TWI'
    return str(record['result'])


def _escaped(text: str) -> str:
    return text.replace('|', '\\|').replace('<', '&lt;')


def _reasons(families: Mapping[str, Mapping]) -> Iterator[str]:
    for family, cells in families.items():
        for kind in CELLS:
            record = cells.get(kind)
            if record and record['result'] != 'works':
                yield (
                    f'- `{family}`, {SHOWN[kind]}: {_shown(record)}: '
                    f'{_escaped(record["detail"])}'
                )


def _without_twi(families: Mapping[str, Mapping]) -> list[str]:
    """A line for each reason, with the families of each kind of pair."""
    found: dict[str, dict[str, list[str]]] = {}
    for family, cells in families.items():
        for kind in CELLS[1:]:
            record = cells.get(kind)
            if record and record['result'] == 'works' and not record['twi']:
                reason = record['detail'].removeprefix('not reused: ')
                kinds = found.setdefault(reason, {})
                kinds.setdefault(SHOWN[kind], []).append(f'`{family}`')
    return [
        f'- {_escaped(reason)}: '
        + '; '.join(f'{kind} {", ".join(of)}' for kind, of in kinds.items())
        for reason, kinds in found.items()
    ]


def page(results: Results) -> str:
    """The whole of ``docs/zoo.md``."""
    families = results.by_family()
    text = HEADER.format(
        hosts=results.hosts,
        counts=count(families),
        detector=Path(PARTNERS['mmdet']).stem,
        classifier=Path(PARTNERS['mmpretrain']).stem,
        batch=BATCH,
        sizes=', '.join(f'{height}x{width}' for height, width in SIZES),
        most=', '.join(f'`{key}={most}`' for key, most in MOST.items()),
        memory=MEMORY_GIB,
        timeout=TIMEOUT_S,
        words=', '.join(SMALL_FIRST),
        chosen='\n'.join(
            f'- `{family}`: `{config}` ({reason})'
            for family, (config, reason) in sorted(CHOSEN.items())
        ),
    )
    parts = [text]
    for host in PARTNERS:
        own = {
            family: cells
            for family, cells in families.items()
            if family.startswith(f'{host}::')
        }
        rows = [
            f'| `{family.partition("::")[2]}` '
            f'| `{next(iter(cells.values()))["config"].partition("/")[2]}` | '
            + ' | '.join(_shown(cells.get(kind)) for kind in CELLS)
            + ' |'
            for family, cells in own.items()
            if cells
        ]
        waiting = [
            f'`{f.partition("::")[2]}`' for f, c in own.items() if not c
        ]
        if waiting:
            rows.append(f'\nNot tried yet: {", ".join(waiting)}.')
        left_out = [
            f'- `{family.partition("::")[2]}`: {reason}'
            for family, reason in LEFT_OUT.items()
            if family.startswith(f'{host}::')
        ]
        heads = ['family', 'config', *SHOWN.values()]
        parts += [
            f'## {host}\n',
            f'| {" | ".join(heads)} |\n|{" --- |" * len(heads)}\n'
            + '\n'.join(rows)
            + '\n',
            f'### Left out of {host}\n',
            '\n'.join(left_out) + '\n',
        ]
    for title, lines in (
        ('What does not work', list(_reasons(families))),
        ("Where the teacher's head is not reused", _without_twi(families)),
    ):
        parts += [f'## {title}\n', '\n'.join(lines) or 'Nothing.', '']
    return '\n'.join(parts).rstrip() + '\n'


def host_versions() -> str:
    """Distributions of the hosts, with versions."""
    import mmcv
    import mmdet
    import mmengine
    import mmpretrain
    import torch

    modules = (mmdet, mmpretrain, mmengine, mmcv, torch)
    by_module = importlib.metadata.packages_distributions()
    return ', '.join(
        f'{by_module[m.__name__][0]} '
        f'{importlib.metadata.version(by_module[m.__name__][0])}'
        for m in modules
    )
