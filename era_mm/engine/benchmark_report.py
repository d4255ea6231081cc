"""Results of a benchmark: statistics, a table and a file."""

import contextlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from era_mm.engine.whole_files import write_whole
from era_mm.errors import UserError

MIB = 2**20
#: Columns that no table needs.
MOST_COLUMNS = 500


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile over the rounds.

    Percentiles are interpolated linearly, as in numpy.

    Args:
        values: One value per round.

    Returns:
        ``median``, ``p10``, ``p90``.
    """
    low, median, high = (float(np.percentile(values, q)) for q in (10, 50, 90))
    return dict(median=median, p10=low, p90=high)


def timed(values: Sequence[float]) -> dict[str, Any]:
    """The :func:`spread` of measured times, and all of them (``rounds``)."""
    return {**spread(values), 'rounds': list(values)}


def step_times(
    *,
    plain: Sequence[float],
    teacher: Sequence[float],
    step: Sequence[float],
) -> dict[str, dict[str, Any]]:
    """Time of a distiller's step relative to its lower bound.

        floor = plain + teacher,   ratio = step / floor

    for each round, so a temporary slowdown of the machine affects both.

    Args:
        plain: The plain student's step in each round, in ms.
        teacher: The teacher's forward pass.
        step: The distiller's step.

    Returns:
        ``teacher_ms`` and ``step_ms`` as :func:`timed` gives them,
        ``floor_ms`` and ``ratio`` as :func:`spread`.
    """
    floor = [a + b for a, b in zip(plain, teacher, strict=True)]
    return dict(
        teacher_ms=timed(teacher),
        floor_ms=spread(floor),
        step_ms=timed(step),
        ratio=ratio(step, floor),
    )


def ratio(
    values: Sequence[float], others: Sequence[float]
) -> dict[str, float]:
    """The :func:`spread` of the ratio, round by round."""
    return spread([v / o for v, o in zip(values, others, strict=True)])


def step_memory(
    *,
    peak: int,
    plain_peak: int,
    teacher_weights: int,
    teacher_feats: int,
    extras: int,
) -> dict[str, float]:
    """Peak memory of a distiller's step relative to its lower bound.

        floor = plain_peak + teacher_weights + teacher_feats + extras

    Args:
        peak: Peak of the distiller's step, weights, optimiser state and
            teachers included; in bytes, like all of these.
        plain_peak: Peak of the plain student's step.
        teacher_weights: Weights of all teachers, buffers included.
        teacher_feats: The teachers' features for one batch, number of
            elements times element size.
        extras: Weights that the distillation trains in addition to the plain
            student, with their gradients and optimiser states.

    Returns:
        These values, ``floor``, and ``ratio`` = peak / floor.
    """
    floor = plain_peak + teacher_weights + teacher_feats + extras
    return dict(
        peak=peak,
        floor=floor,
        ratio=peak / floor,
        plain_peak=plain_peak,
        teacher_weights=teacher_weights,
        teacher_feats=teacher_feats,
        extras=extras,
    )


def cpu_model() -> str:
    """Name of the processor, and the instruction set that torch uses on it.

    Virtual machines often have the same name for processors of several
    generations ('AMD EPYC'), on which a step takes one or three times as long.
    The name is the architecture's if the system gives none.
    """
    return f'{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}'


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """The processor that was used, and the CPU threads."""
    found = dict(
        device=device.type, cpu=cpu_model(), threads=torch.get_num_threads()
    )
    if device.type == 'cuda':
        found['gpu'] = torch.cuda.get_device_name(device)
    return found


def table(record: dict[str, Any]) -> Table:
    """A record of :func:`era_mm.engine.benchmark.measure` as a table.

    Times are medians with the 10th and 90th percentile; memory is the peak.
    """
    machine, setting = record['machine'], record['setting']
    height, width = setting['size']
    where = machine.get('gpu') or (
        f'{machine["cpu"]}, threads: {machine["threads"]}'
    )
    result = Table(
        'step',
        *('ms', '10..90 %', 'to a + b', '10..90 %', 'MiB', 'to floor'),
        title=f'{setting["batch_size"]} images of {height}x{width}, '
        f'{setting["iters"]} rounds, {where}'
        + (', mixed precision' if setting['amp'] else ''),
        box=box.SIMPLE,
    )
    for column in result.columns:
        column.no_wrap = True
    for column in result.columns[1:]:
        column.justify = 'right'
    plain = record['plain']
    result.add_row(
        f'a: {plain["model"]}, plain',
        *_shown(plain['step_ms'], 2),
        *('', '', _mib(plain['peak']), ''),
    )
    for entry in record['distillers']:
        memory = entry['memory']
        result.add_section()
        if entry['teachers']:
            teachers = ', '.join(entry['teachers'].values())
            result.add_row(
                f'b: {teachers}, forward', *_shown(entry['teacher_ms'], 2)
            )
        result.add_row(
            'a + b, floor',
            *_shown(entry['floor_ms'], 2),
            *('1', '', _mib(memory['floor']), '1'),
        )
        result.add_row(
            entry['config'],
            *_shown(entry['step_ms'], 2),
            *_shown(entry['ratio'], 3),
            *(_mib(memory['peak']), f'{memory["ratio"]:.3f}'),
        )
    result.add_section()
    result.add_row(
        f'prediction, plain, {plain["params"] / 1e6:.2f} M parameters',
        *_shown(plain['predict_ms'], 2),
        '1',
    )
    for entry in record['distillers']:
        result.add_row(
            f'  {entry["config"]}, {entry["params"] / 1e6:.2f} M',
            *_shown(entry['predict_ms'], 2),
            *_shown(entry['predict_ratio'], 3),
        )
    return result


def _shown(values: dict[str, float], digits: int) -> tuple[str, str]:
    median, low, high = (
        f'{values[key]:.{digits}f}' for key in ('median', 'p10', 'p90')
    )
    return median, f'{low}..{high}'


def _mib(size: int) -> str:
    return f'{size / MIB:.1f}'


def show(record: dict[str, Any]) -> None:
    """Print the :func:`table`, as wide as needed."""
    shown = table(record)
    console = Console()
    needed = Console(width=MOST_COLUMNS).measure(shown).maximum
    # A narrow terminal then wraps lines, instead of cutting off digits.
    console.width = max(console.width, needed)
    console.print(shown)


def check_out(file: Path) -> None:
    """Refuse a path that cannot be written to, before the measurement.

    Raises:
        UserError: There is no such folder, or the path is a folder.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(
            f'--out: expected a file in a folder that exists, but got {file}. '
            'Create the folder, or give another path.'
        )


def write(record: dict[str, Any], file: Path) -> None:
    """Write a record as JSON, completely or not at all."""
    write_whole(file, (json.dumps(record, indent=1) + '\n').encode())
