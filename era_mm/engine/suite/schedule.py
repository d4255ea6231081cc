"""Makes the schedule of a run longer or shorter."""

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from era_mm.errors import UserError

#: Schedulers that are a warm-up if they begin with the run.
_WARM_UPS = ('LinearLR', 'ConstantLR')
#: Keys of a model that are counted in iterations of its own schedule.
_OWN_TIMES = ('pretrain_iters', 'phases')


def length_of(cfg: Config) -> tuple[str, int]:
    """Length of a run: 'epochs' or 'iters', and the number."""
    for unit in ('epochs', 'iters'):
        number = cfg.train_cfg.get(f'max_{unit}')
        if number is not None:
            return unit, number
    raise UserError(
        f'{cfg.filename}: expected `train_cfg.max_epochs` or '
        f'`train_cfg.max_iters`, but got {dict(cfg.train_cfg)}.'
    )


def stretch(cfg: Config, factor: float) -> None:
    """Make a run ``factor`` times as long, with its learning rate schedule.

    Everything that is counted in the loop's own unit is multiplied: the
    length, and milestones, begin and end of each scheduler. A warm-up in
    iterations, in a run of epochs, does not change.

    Source: ours.

    Args:
        cfg: A whole config; changed in place.
        factor: Factor above 0.

    Raises:
        UserError: The length would not be a whole number, or the model has a
            phase in iterations, whose length in a longer run is not defined.
    """
    if factor == 1:
        return
    unit, length = length_of(cfg)
    own = sorted(set(_own_times(cfg.get('model', {}))))
    if own:
        raise UserError(
            f'schedule: {cfg.filename} sets {", ".join(own)} in iterations, '
            f'and their length in a run {factor} times as long is not '
            'defined. Exclude the method from this schedule (schedule=1, or '
            '`pairs`), or give a separate config for it.'
        )
    loop = cfg.train_cfg
    if loop.get('val_interval') == length:
        loop.val_interval = _times(cfg, length, factor, unit)
    loop[f'max_{unit}'] = _times(cfg, length, factor, unit)
    schedulers = cfg.get('param_scheduler') or []
    for scheduler in (
        schedulers if isinstance(schedulers, list) else [schedulers]
    ):
        _stretch_one(cfg, scheduler, factor, unit)


def _stretch_one(
    cfg: Config, scheduler: dict[str, Any], factor: float, unit: str
) -> None:
    by_epoch = scheduler.get('by_epoch', True)
    kind = str(scheduler['type']).rpartition('.')[2]
    if by_epoch != (unit == 'epochs'):
        if not by_epoch and kind in _WARM_UPS and not scheduler.get('begin'):
            return
        raise UserError(
            f'schedule: {cfg.filename} counts its run in {unit} and '
            f'{kind} in the other unit, so it cannot be made {factor} '
            'times as long. Give a config of that length.'
        )
    for key in ('begin', 'end', 'T_max', 'step_size', 'total_iters'):
        if scheduler.get(key) is not None:
            scheduler[key] = _times(cfg, scheduler[key], factor, key)
    for key in ('milestones', 'periods'):
        if key in scheduler:
            scheduler[key] = [
                _times(cfg, step, factor, key) for step in scheduler[key]
            ]


def _times(cfg: Config, number: int, factor: float, what: str) -> int:
    # Schedulers without an end have a huge one.
    if number >= 10**9:
        return number
    product = number * factor
    if abs(product - round(product)) > 1e-6 or (number and round(product) < 1):
        raise UserError(
            f'schedule: {factor} times the {what} {number} of {cfg.filename} '
            f'is {product:g}; expected a whole number of at least 1.'
        )
    return round(product)


def _own_times(model: Any) -> Iterator[str]:
    if isinstance(model, dict):
        for key, value in model.items():
            if key in _OWN_TIMES and value:
                yield key
            yield from _own_times(value)
    elif isinstance(model, list | tuple):
        for value in model:
            yield from _own_times(value)
