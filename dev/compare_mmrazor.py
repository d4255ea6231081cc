"""What a training step costs here and in mmrazor 1.0.0, for the same job.

The job is PKD on the neck. Each pair is trained side by side, in one process
and on the same batches, from the same weights: by a distillation of era_mm,
and by mmrazor's two algorithms with mmrazor's own loss and recorders:

- `FpnTeacherDistill`, which its PKD configs use. The teacher stops at its
  neck, as it does in era_mm.
- `SingleTeacherDistill`, its general one. The teacher also computes its
  losses.

mmrazor is for the `openmmlab` profile. It stays outside of the environment of
the tests:

    make setup PROFILE=openmmlab
    .venv-openmmlab/bin/pip install --no-deps --target /tmp/mmrazor \
        mmrazor==1.0.0 ordered-set
    CUDA_VISIBLE_DEVICES= PYTHONPATH=/tmp/mmrazor .venv-openmmlab/bin/python \
        -m dev.compare_mmrazor --out results/mmrazor.json
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import sys
import types
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from era_mm.core.utils import errors_only
from era_mm.engine.benchmark import Rounds, Row, clock
from era_mm.engine.benchmark_models import Distilled, Student, Trained
from era_mm.engine.benchmark_report import (
    check_out,
    machine,
    ratio,
    step_times,
    timed,
    write,
)
from era_mm.engine.random_batch import random_batch
from era_mm.errors import UserError
from era_mm.hosts import installed_version, versions

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
VERSION = '1.0.0'
#: Algorithm of mmrazor -> its name in the file.
ALGORITHMS = {
    'FpnTeacherDistill': 'mmrazor_fpn',
    'SingleTeacherDistill': 'mmrazor_single',
}
#: Of the first loss, for which all models have the same weights.
TOLERANCE = 1e-5
#: mmrazor's quantisation needs a torch before 2, and distillation does not
#: need it. What is imported from these modules is an empty class.
QUANTISATION = (
    'engine.runner.quantization_loops',
    'structures.quantization',
    'models.algorithms.quantization',
    'models.fake_quants',
    'models.observers',
    'models.quantizers',
)


class Pair(NamedTuple):
    """What is trained.

    Args:
        config: Config of a distillation; its distiller is not used.
        size: Height and width of the images.
        batch_size: Images per step.
        rounds: Rounds that are measured.
        warmup: Rounds before.
    """

    config: str
    size: tuple[int, int]
    batch_size: int
    rounds: int
    warmup: int


PAIRS = {
    'demo': Pair(
        'baselines/pkd_retinanet_r18w32_r18w16_digits.py',
        (128, 128),
        8,
        200,
        30,
    ),
    'flagship': Pair('era_retinanet_r101_r50.py', (256, 320), 2, 40, 5),
}


class _Empty(types.ModuleType):
    __all__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (), {})


def import_mmrazor() -> None:
    """Import mmrazor's algorithms, with empty modules for its quantisation.

    Raises:
        UserError: It is not there, or is another version.
    """
    found = installed_version('mmrazor')
    if str(found) != VERSION:
        raise UserError(
            f'mmrazor: expected version {VERSION}, but found {found}. The '
            f'first lines of {__file__} say how to install it.'
        )
    names = [f'mmrazor.{name}' for name in QUANTISATION]
    sys.modules.update({name: _Empty(name) for name in names})
    importlib.import_module('mmrazor.models')


def own_config(pair: Pair) -> Config:
    """The pair's config with era_mm's PKD."""
    cfg = Config.fromfile(CONFIGS / pair.config)
    cfg.model.distiller = ConfigDict(
        type='era_mm.FeatureImitationDistiller', measure='pearson'
    )
    cfg.model.teacher.checkpoint = 'random'
    return cfg


def mmrazor_config(
    algorithm: str, levels: int, weight: float
) -> dict[str, Any]:
    """Config of PKD on the neck, without student and teacher."""

    def feature(index: int, from_student: bool) -> dict[str, Any]:
        return dict(recorder='neck', data_idx=index, from_student=from_student)

    names = {f'loss_pkd_{index}': index for index in range(levels)}
    recorders = dict(neck=dict(type='ModuleOutputs', source='neck'))
    return dict(
        type=f'mmrazor.{algorithm}',
        _scope_='mmrazor',
        distiller=dict(
            type='ConfigurableDistiller',
            student_recorders=recorders,
            teacher_recorders=copy.deepcopy(recorders),
            distill_losses={
                name: dict(type='PKDLoss', loss_weight=weight)
                for name in names
            },
            loss_forward_mappings={
                name: dict(
                    preds_S=feature(index, from_student=True),
                    preds_T=feature(index, from_student=False),
                )
                for name, index in names.items()
            },
        ),
    )


def build_mmrazor(own: Distilled, algorithm: str, cfg: Config) -> Trained:
    """The same student, teacher and optimiser, trained by mmrazor.

    It gets copies of the built models, so it has their weights.
    """
    student = copy.deepcopy(own.model.student)
    teacher = copy.deepcopy(own.model.teachers['teacher'].model)
    pkd = own.model.distillers['distiller']
    config = mmrazor_config(algorithm, pkd.num_levels, pkd.loss_weight)
    with DefaultScope.overwrite_default_scope('mmrazor'):
        model = MODELS.build(
            dict(config, architecture=student, teacher=teacher)
        )
    train = model.train

    def train_and_return(mode: bool = True) -> nn.Module:
        train(mode)
        return model

    # mmrazor's returns nothing, against torch's contract.
    model.train = train_and_return
    return Trained(
        ALGORITHMS[algorithm],
        model,
        copy.deepcopy(student),
        cfg,
        torch.device('cpu'),
        amp=False,
    )


def first_losses(model: Trained, batch: Any) -> dict[str, float]:
    """The losses of a batch: what the student's head gives, and PKD's."""
    data = model.model.data_preprocessor(copy.deepcopy(batch), True)
    losses = model.model(**data, mode='loss')
    total, _ = model.model.parse_losses(losses)
    pkd = sum(
        float(value.detach())
        for name, value in losses.items()
        if 'imitation' in name or 'pkd' in name
    )
    return dict(total=float(total.detach()), pkd=pkd)


def check_same(found: dict[str, dict[str, float]]) -> None:
    """Refuse to compare different jobs.

    Raises:
        UserError: The losses of two models differ.
    """
    first, *others = found.values()
    for losses in others:
        for name, value in losses.items():
            if not math.isclose(value, first[name], rel_tol=TOLERANCE):
                raise UserError(
                    f'The jobs differ, so their times cannot be compared: '
                    f'{found}.'
                )


def measure(pair: Pair, threads: int) -> dict[str, Any]:
    """Train a pair side by side, and measure its steps.

    Returns:
        ``setting``; the ``losses`` of the first batch by model; ``plain_ms``
        and, of era_mm, what
        :func:`~era_mm.engine.benchmark_report.step_times` gives; and for each
        algorithm of mmrazor ``step_ms``, ``ratio`` of era_mm's step to its
        step, and ``ratio_to_floor`` of its step to that of the plain student
        and the teacher's forward pass.
    """
    torch.set_num_threads(threads)
    cfg = own_config(pair)
    device = torch.device('cpu')
    with (
        errors_only(),
        DefaultScope.overwrite_default_scope(cfg.default_scope),
    ):
        plain = Student(cfg, device, amp=False)
        own = Distilled(cfg, device, amp=False)
        models: list[Trained] = [plain, own]
        models += [build_mmrazor(own, name, cfg) for name in ALGORITHMS]
    generator = torch.Generator().manual_seed(0)

    def draw() -> dict[str, list]:
        return random_batch(
            plain.deployed, pair.batch_size, pair.size, 5, generator
        )

    batch = draw()
    losses = {
        name: first_losses(model, batch)
        for name, model in zip(
            ('era_mm', *ALGORITHMS.values()), models[1:], strict=True
        )
    }
    check_same(losses)
    rows = {model.name: Row(copy.deepcopy, model.step) for model in models}
    rows['teach'] = Row(own.preprocess, own.teach)
    rounds = Rounds(draw, 1000)
    timer = partial(clock, device=torch.device('cpu'))
    rounds.run(rows, pair.warmup, timer)
    times = rounds.run(rows, pair.rounds, timer)
    for model in models:
        model.check()
    steps = step_times(
        plain=times[plain.name], teacher=times['teach'], step=times[own.name]
    )
    floor = [
        a + b for a, b in zip(times[plain.name], times['teach'], strict=True)
    ]
    return dict(
        setting=pair._asdict(),
        losses=losses,
        plain_ms=timed(times[plain.name]),
        era_mm=steps,
        **{
            name: dict(
                step_ms=timed(times[name]),
                ratio=ratio(times[own.name], times[name]),
                ratio_to_floor=ratio(times[name], floor),
            )
            for name in ALGORITHMS.values()
        },
    )


def table(record: dict[str, Any]) -> list[str]:
    """A record as the rows of the table in docs/benchmark.md.

    Medians; of the ratio to mmrazor's step also the 10th and 90th percentile.
    """
    rows = [
        '| pair | step | ms | to `a + b` | step of era_mm to it |',
        '| --- | --- | --- | --- | --- |',
    ]
    for name, found in record['pairs'].items():
        own = found['era_mm']
        height, width = found['setting']['size']
        rows += [
            f'| {name}, {found["setting"]["batch_size"]} x {height} x {width} '
            f'| `a`, plain | {found["plain_ms"]["median"]:.1f} | | |',
            f'| | `b`, teacher | {own["teacher_ms"]["median"]:.1f} | | |',
            f'| | era_mm | {own["step_ms"]["median"]:.1f} '
            f'| {own["ratio"]["median"]:.3f} | |',
        ]
        for algorithm, key in ALGORITHMS.items():
            low, mid, high = (
                f'{found[key]["ratio"][part]:.3f}'
                for part in ('p10', 'median', 'p90')
            )
            rows.append(
                f'| | mmrazor, `{algorithm}` '
                f'| {found[key]["step_ms"]["median"]:.1f} '
                f'| {found[key]["ratio_to_floor"]["median"]:.3f} '
                f'| {mid} ({low} to {high}) |'
            )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the pairs, write everything and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--pairs', nargs='+', choices=PAIRS, default=list(PAIRS)
    )
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', type=Path, required=True, help='JSON')
    args = parser.parse_args(argv)
    check_out(args.out)
    import_mmrazor()
    pairs = {name: measure(PAIRS[name], args.threads) for name in args.pairs}
    record = dict(
        versions=versions() | dict(mmrazor=VERSION),
        machine=machine(torch.device('cpu')),
        pairs=pairs,
    )
    write(record, args.out)
    print('\n'.join(table(record)))


if __name__ == '__main__':
    main()
