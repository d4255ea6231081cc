"""Measures what the steps of a distillation cost, side by side.

Each round runs every step once, in random order; steps are compared within
a round. Weights, images and ground truth are random: no file is needed.
"""

import contextlib
import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope

from era_mm.core.utils import errors_only, preserve_rng
from era_mm.engine.benchmark_models import (
    Distilled,
    Student,
    Trained,
    check_configs,
    name_of,
    seed,
)
from era_mm.engine.benchmark_report import (
    machine,
    ratio,
    step_memory,
    step_times,
    timed,
)
from era_mm.engine.host_configs import image_size
from era_mm.engine.peak_memory import gradient_bytes, peak_of, teacher_bytes
from era_mm.engine.random_batch import random_batch
from era_mm.errors import UserError
from era_mm.hosts import versions

#: The iteration at which a benchmark begins, unless something starts later.
START_ITER = 1000
#: The epoch for heads that behave differently in their first epochs (TOOD).
EPOCH = 10
#: Steps of which the largest peak is taken: some methods draw at random.
MEMORY_STEPS = 3


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Args:
        batch_size: Images per step. None: as the first config trains.
        size: Height and width of the images, in pixels. None: what the first
            config's data pipeline makes, see
            :func:`~era_mm.engine.host_configs.image_size`.
        objects: Objects per image, for detectors.
        iters: Rounds that are measured.
        warmup: Rounds of training steps before.
        start_iter: The iteration number of the first round. None: 1000, or
            later if a distiller has phases or schedules that begin later.
        threads: CPU threads. None: one on a CPU, unchanged with a GPU.
        device: 'cpu' or 'cuda'. None: a GPU if there is one.
        amp: Train in mixed precision.

    Raises:
        UserError: A number is too small, or the device does not exist.
    """

    batch_size: int | None = None
    size: tuple[int, int] | None = None
    objects: int = 5
    iters: int = 50
    warmup: int = 30
    start_iter: int | None = None
    threads: int | None = None
    device: str | None = None
    amp: bool = False

    def __post_init__(self) -> None:
        least = dict(batch_size=1, objects=0, iters=1, warmup=0, threads=1)
        for name, bound in {**least, 'start_iter': 0, 'size': 1}.items():
            given = getattr(self, name)
            number = min(given) if isinstance(given, tuple) else given
            if number is not None and number < bound:
                raise UserError(
                    f'--{name.replace("_", "-")}: expected {bound} or more, '
                    f'but got {number}.'
                )
        if self.device not in (None, 'cpu', 'cuda'):
            raise UserError(
                f"--device: expected 'cpu' or 'cuda', but got {self.device!r}."
            )
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise UserError(
                '--device cuda: expected a GPU, but torch sees none. Omit '
                'the flag, or see docs/installation.md.'
            )

    @property
    def torch_device(self) -> torch.device:
        """Where everything runs."""
        available = 'cuda' if torch.cuda.is_available() else 'cpu'
        return torch.device(self.device or available)


class Row(NamedTuple):
    """A function that each round runs once.

    Args:
        prepare: Converts a batch to the input of ``run``; not measured.
        run: The function that is measured.
    """

    prepare: Callable[[Any], Any]
    run: Callable[[Any], Any]


class Rounds:
    """Runs rows side by side, on a new batch in every round.

    All rows of a round see the same batch, iteration and random numbers.
    Their order changes, so that no row always follows the same one.

    Args:
        draw: Makes a batch.
        iteration: Iteration number of the first round.
    """

    def __init__(
        self, draw: Callable[[], dict[str, list]], iteration: int
    ) -> None:
        self.draw = draw
        self.iteration = iteration
        self._order = random.Random(0)

    def run(
        self,
        rows: Mapping[str, Row],
        number: int,
        measure: Callable[[Callable[[], Any]], float],
    ) -> dict[str, list[float]]:
        """The result of ``measure`` for each row in each round.

        Args:
            rows: Rows by name.
            number: Number of rounds.
            measure: Calls its argument and returns a value.
        """
        values: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(number):
            MessageHub.get_current_instance().update_info(
                'iter', self.iteration
            )
            batch = self.draw()
            for name in self._order.sample(list(rows), len(rows)):
                seed(self.iteration)
                data = rows[name].prepare(batch)
                values[name].append(measure(partial(rows[name].run, data)))
            self.iteration += 1
        return values


def clock(run: Callable[[], Any], device: torch.device) -> float:
    """Time of a call in ms, with all that it starts on the device."""
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    # To 0.1 us.
    return round((time.perf_counter() - began) * 1000, 4)


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def measure(
    cfgs: Sequence[Config],
    options: Options,
    alone: contextlib.AbstractContextManager | None = None,
) -> dict[str, Any]:
    """Measure the distillations of one student.

    Times are in ms. Memory is in bytes, the peak of a step:

        peak  = what is kept between steps (weights, buffers, optimiser
                state, also of the teachers) + the peak allocation on top
        floor = the plain student's peak + the teachers' weights + their
                features + extras

    extras are what the distillation keeps and trains in addition to the plain
    student: weights, buffers, optimiser state and gradients, those of inner
    modules included. The largest of three steps is taken.

    The caller's random state and threads are restored afterwards.

    Args:
        cfgs: Whole configs of distillations; the plain student is trained
            with the first one's ``optim_wrapper``.
        options: See :class:`Options`.
        alone: Entered for the measurement, when the models have been built.
            None: nothing.

    Returns:
        ``versions``, ``machine``, ``setting``; of the ``plain`` student
        ``model``, ``params``, ``step_ms``, ``predict_ms``, ``peak``; and in
        ``distillers`` for each config ``config``, ``distillers`` and
        ``teachers`` (types by name), ``params``, what
        :func:`~era_mm.engine.benchmark_report.step_times` gives,
        ``predict_ms``, ``predict_ratio`` and ``memory``, see
        :func:`~era_mm.engine.benchmark_report.step_memory`.

    Raises:
        UserError: Configs that are not distillations, have different students
            or no image size or optimiser; or a loss that is not finite.
    """
    check_configs(cfgs)
    setting = _setting(cfgs[0], options)
    device = options.torch_device
    # Messages of models being built are not of interest here.
    with preserve_rng(), errors_only(), _threads(options), _iterations():
        with DefaultScope.overwrite_default_scope(_scope(cfgs[0])):
            plain = Student(cfgs[0], device, options.amp)
        subjects = []
        for cfg in cfgs:
            with DefaultScope.overwrite_default_scope(_scope(cfg)):
                subjects.append(Distilled(cfg, device, options.amp))
        for subject in subjects:
            # A method without a module at inference deploys the plain student.
            assert not subject.is_plain or subject.params == plain.params
        if setting['start_iter'] is None:
            setting['start_iter'] = max(
                START_ITER, *(subject.late for subject in subjects)
            )
        with alone or contextlib.nullcontext():
            found = _run(plain, subjects, setting, device)
        return dict(
            versions=versions(),
            machine=machine(device),
            setting=setting,
            **found,
        )


def _scope(cfg: Config) -> str | None:
    return cfg.get('default_scope')


def _run(
    plain: Student,
    subjects: Sequence[Distilled],
    setting: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw() -> dict[str, list]:
        return random_batch(
            plain.deployed,
            setting['batch_size'],
            setting['size'],
            setting['objects'],
            generator,
        )

    def timer(run: Callable[[], Any]) -> float:
        return clock(run, device)

    def peak(run: Callable[[], Any]) -> float:
        return peak_of(run, device)

    models: list[Trained] = [plain, *subjects]
    steps = {
        f'{model.name} step': Row(copy.deepcopy, model.step)
        for model in models
    }
    rows = steps | {
        f'{model.name} predict': Row(copy.deepcopy, model.predict)
        for model in models
    }
    for subject in subjects:
        if subject.teachers:
            rows[f'{subject.name} teach'] = Row(
                subject.preprocess, subject.teach
            )
    rounds = Rounds(draw, setting['start_iter'])
    print(f'{setting["warmup"]} rounds to warm up ...', flush=True)
    rounds.run(steps, setting['warmup'], timer)
    # What does not train needs no further warm-up.
    once = rounds.run(rows, 2, timer)
    for model in models:
        model.check()
    seconds = sum(values[-1] for values in once.values()) / 1000
    print(
        f'{setting["iters"]} rounds of about {seconds:.2f} s ...', flush=True
    )
    times = rounds.run(rows, setting['iters'], timer)
    peaks = {
        name: int(max(values))
        for name, values in rounds.run(steps, MEMORY_STEPS, peak).items()
    }
    for model in models:
        model.check()
        peaks[f'{model.name} step'] += model.state
    for subject in subjects:
        peaks[f'{subject.name} step'] += teacher_bytes(subject.model)
    return dict(
        plain=dict(
            model=type(plain.model).__name__,
            params=plain.params,
            step_ms=timed(times[f'{plain.name} step']),
            predict_ms=timed(times[f'{plain.name} predict']),
            peak=peaks[f'{plain.name} step'],
        ),
        distillers=[
            _of_subject(subject, plain, times, peaks, draw())
            for subject in subjects
        ],
    )


def _of_subject(
    subject: Distilled,
    plain: Student,
    times: Mapping[str, list[float]],
    peaks: Mapping[str, int],
    batch: Any,
) -> dict[str, Any]:
    name, model = subject.name, subject.model
    predict = times[f'{name} predict']
    plain_step = times[f'{plain.name} step']
    return dict(
        config=name,
        distillers={k: type(v).__name__ for k, v in model.distillers.items()},
        teachers={
            k: type(v.model).__name__ for k, v in subject.teachers.items()
        },
        params=subject.params,
        **step_times(
            plain=plain_step,
            teacher=times.get(f'{name} teach', [0.0] * len(plain_step)),
            step=times[f'{name} step'],
        ),
        predict_ms=timed(predict),
        predict_ratio=ratio(predict, times[f'{plain.name} predict']),
        memory=step_memory(
            peak=peaks[f'{name} step'],
            plain_peak=peaks[f'{plain.name} step'],
            teacher_weights=teacher_bytes(model),
            teacher_feats=subject.teacher_feats(batch),
            extras=subject.state
            - plain.state
            + gradient_bytes(model)
            - gradient_bytes(plain.model),
        ),
    )


def _setting(cfg: Config, options: Options) -> dict[str, Any]:
    """The options, completed from the config."""
    setting = asdict(options)
    for key in ('threads', 'device'):
        # The machine's, see there.
        del setting[key]
    if options.size is None:
        found = image_size(cfg)
        if found is None:
            raise UserError(
                f'--size: the pipelines of {name_of(cfg)} do not tell the '
                'size of their images. Give --size HEIGHT WIDTH.'
            )
        height, width, origin = found
        print(f'images of {height} x {width} (height x width), as in {origin}')
        setting |= dict(size=(height, width), size_from=origin)
    else:
        setting['size_from'] = '--size'
    if options.batch_size is None:
        loader = cfg.get('train_dataloader') or {}
        setting['batch_size'] = loader.get('batch_size')
        if setting['batch_size'] is None:
            raise UserError(
                f'--batch-size: {name_of(cfg)} has no '
                '`train_dataloader.batch_size`. Give --batch-size.'
            )
    return setting


# -- what is put back ------------------------------------------------------


@contextlib.contextmanager
def _threads(options: Options) -> Iterator[None]:
    before = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    elif options.torch_device.type == 'cpu':
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _iterations() -> Iterator[None]:
    """Restore the progress of a run afterwards.

    There is no ``max_iters``: what lasts for a share of the run is active.
    """
    hub = MessageHub.get_current_instance()
    before = {key: hub.get_info(key) for key in ('iter', 'epoch', 'max_iters')}
    hub.pop_info('max_iters')
    hub.update_info('epoch', EPOCH)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                hub.pop_info(key)
            else:
                hub.update_info(key, value)
