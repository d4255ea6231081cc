"""What a step of ERA costs on a GPU, at the flagship's shapes.

    python -m dev.gpu_benchmark settings era_gfl_r101_r50 --out FILE
    python -m dev.gpu_benchmark variants era_retinanet_r101_r50 --out FILE
    python -m dev.gpu_benchmark compiled era_retinanet_r101_r50 --out FILE
    python -m dev.gpu_benchmark profile era_retinanet_r101_r50 --out FILE

- `settings`: the config's step, measured as by `tools/benchmark.py`.
- `variants`: other ways to compute the same step, side by side in each round.
- `compiled`: the same with `torch.compile`, which first takes a minute.
- `profile`: the kernels that take the time, of the plain step and of ERA's.

Weights, images and objects are random. With `--lock FILE` several of these
processes start together, build their models, and take turns on the GPU.
`dev/gpu.sh` runs them all.
"""

import argparse
import contextlib
import copy
import fcntl
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function

from era_mm.core.utils import errors_only
from era_mm.engine.benchmark import (
    START_ITER,
    Options,
    Rounds,
    Row,
    clock,
    measure,
)
from era_mm.engine.benchmark_models import Distilled, Student, Trained, seed
from era_mm.engine.benchmark_report import (
    machine,
    show,
    step_times,
    timed,
    write,
)
from era_mm.engine.preflight import find_config
from era_mm.engine.random_batch import random_batch
from era_mm.engine.suite.command import commit_of_code
from era_mm.hosts import versions
from era_mm.layers import FirstBatches
from era_mm.methods.era.bottleneck import BottleneckBranches

#: Rounds to warm up: cuDNN and the allocator; `settings` needs those on which
#: ERA measures statistics and units, which the others skip.
WARMUP = 5
MEASURED = 21
#: Objects per image.
OBJECTS = 5
#: Steps under the profiler, and kernels that are kept.
PROFILED, KERNELS = 3, 25
#: What a profile is split into.
PARTS = ('teacher', 'distiller')


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='gpu_benchmark', description=__doc__.splitlines()[0]
    )
    parser.add_argument('stage', choices=sorted(STAGES))
    parser.add_argument('config')
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--lock', type=Path)
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--amp', action='store_true')
    parser.add_argument('--size', type=int, nargs=2, default=[800, 1333])
    parser.add_argument('--iters', type=int, default=10)
    parser.add_argument('--warmup', type=int, default=WARMUP)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cuda')
    args = parser.parse_args(argv)
    record = STAGES[args.stage](args)
    write(dict(stage=args.stage, commit=commit_of_code(), **record), args.out)
    return 0


# -- stages ----------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The config as it is."""
    record = measure(
        [config_of(args)],
        Options(
            batch_size=args.batch_size,
            size=tuple(args.size),
            objects=OBJECTS,
            iters=args.iters,
            warmup=max(args.warmup, MEASURED),
            device=args.device,
            amp=args.amp,
        ),
        alone=turn(args),
    )
    show(record)
    return record


#: The first of all variants; its teacher is part of everyone's floor.
SHIPPED = 'as shipped'
#: Name -> changes of the config.
VARIANTS: dict[str, dict[str, Any]] = {
    SHIPPED: {},
    "twi_steps='all'": {'model.distiller.twi_steps': 'all'},
    "twi_steps='none'": {'model.distiller.twi_steps': 'none'},
    "teacher's dtype='bfloat16'": {'model.teacher.dtype': 'bfloat16'},
    'channels_last': {},
    'branches in a loop': {},
}
COMPILED: dict[str, dict[str, Any]] = {
    SHIPPED: {},
    'compiled branches': {},
    'compiled teacher': {},
}


def variants(
    args: argparse.Namespace, among: dict[str, dict[str, Any]] = VARIANTS
) -> dict[str, Any]:
    """Other ways to compute the step, side by side."""
    device = torch.device(args.device)
    with errors_only():
        first = config_of(args)
        with DefaultScope.overwrite_default_scope(first.default_scope):
            models: dict[str, Trained] = {
                'plain': Student(first, device, args.amp),
                'plain, channels_last': Student(first, device, args.amp),
            }
            for name, changes in among.items():
                cfg = config_of(args)
                cfg.merge_from_dict(changes)
                models[name] = Distilled(cfg, device, args.amp)
        for name, model in models.items():
            _change(name, model)
            _skip_first_batches(model)
        with turn(args):
            times = _time_steps(models, args)
    found = [
        dict(
            name=name,
            own_teacher_ms=timed(times[f'{name}, teacher']),
            **step_times(
                plain=times['plain'],
                teacher=times[f'{SHIPPED}, teacher'],
                step=times[name],
            ),
        )
        for name in among
    ]
    for variant in found:
        print(
            f'{variant["name"]:<28} {variant["step_ms"]["median"]:8.2f} ms '
            f'{variant["ratio"]["median"]:6.3f}'
        )
    return dict(
        _about(args),
        plain_ms=timed(times['plain']),
        plain_channels_last_ms=timed(times['plain, channels_last']),
        variants=found,
    )


def profiles(args: argparse.Namespace) -> dict[str, Any]:
    """The kernels of the plain step and of the distillation's."""
    device = torch.device(args.device)
    with errors_only():
        cfg = config_of(args)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            subject = Distilled(cfg, device, args.amp)
            models: dict[str, Trained] = {
                'plain': Student(cfg, device, args.amp),
                'era': subject,
            }
        _label(subject)
        _skip_first_batches(subject)
        rounds, rows = _rounds_of(models, args)
        record = _about(args)
        with turn(args):
            rounds.run(rows, args.warmup, partial(clock, device=device))
            for name, row in rows.items():
                record[name] = _profiled(rounds, row, device)
    return record


STAGES: dict[str, Callable[..., dict[str, Any]]] = dict(
    settings=settings,
    variants=variants,
    compiled=partial(variants, among=COMPILED),
    profile=profiles,
)


# -- how -------------------------------------------------------------------


@contextlib.contextmanager
def turn(args: argparse.Namespace) -> Iterator[None]:
    """Have the GPU alone."""
    with contextlib.ExitStack() as stack:
        if args.lock is not None:
            file = stack.enter_context(args.lock.open('w'))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def config_of(args: argparse.Namespace) -> Config:
    """The config of a stage, anew."""
    with contextlib.redirect_stdout(sys.stderr):
        return Config.fromfile(find_config(args.config))


def _about(args: argparse.Namespace) -> dict[str, Any]:
    return dict(
        config=args.config,
        versions=versions(),
        machine=machine(torch.device(args.device)),
        setting=dict(
            batch_size=args.batch_size,
            size=tuple(args.size),
            objects=OBJECTS,
            iters=args.iters,
            warmup=args.warmup,
            amp=args.amp,
        ),
    )


def _rounds_of(
    models: dict[str, Trained], args: argparse.Namespace
) -> tuple[Rounds, dict[str, Row]]:
    generator = torch.Generator().manual_seed(0)
    rounds = Rounds(
        lambda: random_batch(
            models['plain'].deployed,
            args.batch_size,
            tuple(args.size),
            OBJECTS,
            generator,
        ),
        START_ITER,
    )
    return rounds, {
        name: Row(copy.deepcopy, model.step) for name, model in models.items()
    }


def _time_steps(
    models: dict[str, Trained], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Times of the steps and of the teachers, in ms, by round."""
    timer = partial(clock, device=torch.device(args.device))
    rounds, rows = _rounds_of(models, args)
    rounds.run(rows, args.warmup, timer)
    for name, model in models.items():
        if isinstance(model, Distilled):
            rows[f'{name}, teacher'] = Row(model.preprocess, model.teach)
    rounds.run(rows, 2, timer)
    times = rounds.run(rows, args.iters, timer)
    for model in models.values():
        model.check()
    return times


def _change(name: str, model: Trained) -> None:
    """Compute in the way that a variant is named after."""
    if name.endswith('channels_last'):
        model.model.to(memory_format=torch.channels_last)
    if not isinstance(model, Distilled):
        return
    distiller = model.model.distillers['distiller']
    branches = distiller.mbrnet.branches
    if name == 'branches in a loop':
        branches._hidden = lambda feats: looped(branches, feats)
    elif name == 'compiled branches':
        branches._hidden = torch.compile(branches._hidden)
    elif name == 'compiled teacher':
        for teacher in model.model.teachers.values():
            teacher.model.backbone.compile()


def _skip_first_batches(model: Trained) -> None:
    """Measure statistics and units on two batches only."""
    for module in model.model.modules():
        if isinstance(module, FirstBatches):
            module.number = 2


def looped(
    branches: BottleneckBranches, feats: Sequence[Tensor]
) -> list[Tensor]:
    """The first layers of the branches, one branch after the other.

    Only without norms.
    """
    number = branches.num_branches
    levels = []
    for feat, reduce, spatial in zip(
        feats, branches.reduce, branches.spatial, strict=True
    ):
        first, second = (
            zip(
                layer[0].weight.chunk(number),
                layer[0].bias.chunk(number),
                strict=True,
            )
            for layer in (reduce, spatial)
        )
        found = [
            functional.conv2d(
                functional.conv2d(feat, w1, b1).relu(), w2, b2, padding=1
            ).relu()
            for (w1, b1), (w2, b2) in zip(first, second, strict=True)
        ]
        levels.append(torch.cat(found, dim=1))
    return levels


def _label(subject: Distilled) -> None:
    """Name the parts of a step in a profile."""
    wiring = subject.model.wiring
    distiller = subject.model.distillers['distiller']
    for owner, method, part in (
        (wiring, 'teach', 'teacher'),
        # In two halves, or in one.
        (distiller, 'early_loss', 'distiller'),
        (distiller, 'late_loss', 'distiller'),
        (distiller, 'loss', 'distiller'),
    ):
        setattr(owner, method, _labelled(getattr(owner, method), part))


def _labelled(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(part):
            return function(*args, **kwargs)

    return run


def _profiled(
    rounds: Rounds, row: Row, device: torch.device
) -> dict[str, Any]:
    """Time of the kernels of a step, in ms, and of the whole."""
    on_gpu = device.type == 'cuda'
    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    batch = rounds.draw()
    seed(rounds.iteration)
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            clock(partial(row.run, row.prepare(batch)), device)
    events = profiler.key_averages()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # Before torch 2.4 they are called `cuda_time_total`.
    name = 'cpu'
    if on_gpu:
        name = 'device' if hasattr(events[0], 'device_time_total') else 'cuda'
    total, own = f'{name}_time_total', f'self_{name}_time_total'
    # Ranges are shown on the device too; they are no kernels.
    kernels = [
        event
        for event in events
        if event.device_type == kind
        and event.key not in PARTS
        # Which torch 2.1 does not tell.
        and not getattr(event, 'is_user_annotation', False)
    ]

    def per_step(microseconds: float) -> float:
        return round(microseconds / 1000 / PROFILED, 4)

    kernels.sort(key=lambda event: getattr(event, own), reverse=True)
    return dict(
        kernels_ms=per_step(sum(getattr(event, own) for event in kernels)),
        launches=sum(event.count for event in kernels) / PROFILED,
        parts={
            event.key: per_step(getattr(event, total))
            for event in events
            if event.key in PARTS and event.device_type == DeviceType.CPU
        },
        kernels=[
            dict(
                name=event.key,
                calls=event.count / PROFILED,
                ms=per_step(getattr(event, own)),
            )
            for event in kernels[:KERNELS]
        ],
    )


if __name__ == '__main__':
    sys.exit(main())
