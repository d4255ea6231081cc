"""Checks the keys and values of a config before anything is built."""

import difflib
import functools
import inspect
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.runner import Runner

from era_mm.core import distillation_kind
from era_mm.engine.finite_hook import FiniteHook
from era_mm.engine.preflight_hook import PreflightHook
from era_mm.engine.run_table_hook import RunTableHook
from era_mm.errors import UserError
from era_mm.validation import problems_of

#: Top-level keys of era_mm, and those of the hosts that mmengine lacks.
OURS = ('preflight', 'check_finite', 'report', 'strict_load')
HOSTS = (
    'auto_scale_lr',
    'find_unused_parameters',
    'custom_imports',
    'tta_model',
    'tta_pipeline',
    'data_preprocessor',
    'runner_type',
    'model_wrapper_cfg',
    'efficient_conv_bn_eval',
    'activation_checkpointing',
    'compile',
    # Names in the hosts' configs for parts of other entries.
    'train_pipeline',
    'val_pipeline',
    'test_pipeline',
)

#: Hooks of the hosts for one student, and why they cannot have two.
OF_ONE_STUDENT = {
    'PreciseBNHook': 'it would measure the norms of the first student alone',
    'SimSiamHook': 'it knows one optimiser',
    'SwAVHook': 'it keeps the queue of one loss',
}


def check_config(cfg: Config) -> None:
    """Refuse invalid arguments of our classes, and misspelt top-level keys.

    And hooks that cannot be used with ``MutualDistillation``.

    Every dict whose ``type`` is one of era_mm is compared with the signature
    of its class, as are ``preflight``, ``check_finite`` and ``report``.

    Args:
        cfg: A whole config.

    Raises:
        UserError: All problems, each with its key.
    """
    problems = [
        *_misspelt(cfg),
        *_wrong_arguments(cfg.to_dict()),
        *_hooks_of_one_student(cfg),
    ]
    for key, hook in (
        ('preflight', PreflightHook),
        ('check_finite', FiniteHook),
        ('report', RunTableHook),
    ):
        value = cfg.get(key, True)
        if isinstance(value, Mapping):
            problems += _of_class(hook, value, key)
        elif not isinstance(value, bool):
            problems.append(
                f'{key}: expected True, False, or a dict with arguments of '
                f'era_mm.{hook.__name__}, but got {value!r}'
            )
    strict = cfg.get('strict_load', True)
    if not isinstance(strict, bool):
        problems.append(
            f'strict_load: expected True or False, but got {strict!r}'
        )
    if problems:
        raise UserError(
            'the config has values that cannot be used:\n'
            + '\n'.join(f'  {problem}' for problem in problems)
        )


def _misspelt(cfg: Config) -> Iterator[str]:
    """Unknown keys that are similar to a known one.

    A config may have its own names at the top level, so other unknown keys
    are accepted.
    """
    known = {
        *list(inspect.signature(Runner.__init__).parameters)[1:],
        *OURS,
        *HOSTS,
    }
    for key in cfg:
        if key in known:
            continue
        # Two letters that changed places weigh too much in a short name.
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.87) or [
            name for name in known if sorted(name) == sorted(key)
        ]
        # Names such as train_pipeline_1e are parts of hosts' configs.
        is_longer = bool(near) and near[0] in key and near[0] in cfg
        if near and (near[0] in OURS or not is_longer):
            yield f'{key}: no such key, did you mean {near[0]}?'


def _hooks_of_one_student(cfg: Config) -> Iterator[str]:
    """Hooks that a ``MutualDistillation`` cannot have."""
    if distillation_kind(cfg.get('model') or {}) != 'MutualDistillation':
        return
    for index, hook in enumerate(cfg.get('custom_hooks') or []):
        kind = hook.get('type') if isinstance(hook, Mapping) else type(hook)
        name = getattr(kind, '__name__', str(kind)).rpartition('.')[2]
        if name in OF_ONE_STUDENT:
            yield (
                f'custom_hooks[{index}]: {name} is not for '
                f'MutualDistillation: {OF_ONE_STUDENT[name]}; remove it'
            )


def _wrong_arguments(node: Any, key: str = '') -> Iterator[str]:
    if isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _wrong_arguments(value, f'{key}[{index}]')
    if not isinstance(node, Mapping):
        return
    kind = node.get('type')
    if isinstance(kind, str) and kind.startswith('era_mm.'):
        known = own_classes()
        cls = known.get(kind)
        if cls is not None:
            yield from _of_class(cls, node, key)
        elif near := difflib.get_close_matches(kind, known, n=1):
            yield (
                f'{key}.type: era_mm has no {kind!r}, did you mean '
                f'{near[0]!r}?'
            )
    for part, value in node.items():
        yield from _wrong_arguments(value, f'{key}.{part}'.lstrip('.'))


@functools.cache
def own_classes() -> dict[str, type]:
    """Every class of ours, as configs call it."""
    found: dict[str, type] = {}
    for parent in vars(mmengine.registry).values():
        own = getattr(parent, '_children', {}).get('era_mm')
        if own is not None:
            own.import_from_location()
            found |= {
                f'era_mm.{name}': cls
                for name, cls in own.module_dict.items()
                if inspect.isclass(cls)
            }
    return found


def _of_class(cls: type, node: Mapping, key: str) -> Iterator[str]:
    init: Any = cls.__init__  # type: ignore[misc]
    # Not for classes that only inherit a host's signature.
    module = getattr(inspect.unwrap(init), '__module__', '')
    if not module.startswith('era_mm'):
        return
    parameters = inspect.signature(init).parameters
    arguments = {k: v for k, v in node.items() if k != 'type'}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = list(parameters)[1:]
    for name in arguments:
        if name in names or open_ended or name in ('_scope_', '_delete_'):
            continue
        cut = getattr(cls, 'CUT', {}).get(name)
        if cut is not None:
            yield (
                f'{key}.{name}: {cls.__name__} has it no more: {cut}; remove '
                'the key'
            )
            continue
        near = difflib.get_close_matches(name, names, n=1)
        yield f'{key}.{name}: {cls.__name__} has no such key' + (
            f', did you mean {near[0]!r}?'
            if near
            else f' ({", ".join(names)})'
        )
    for name, text in problems_of(cls, init, arguments).items():
        yield f'{key}.{name}: {text}'


def remarks_on(cfg: Config) -> list[str]:
    """Values of the host's keys that make a run pointless, a sentence each."""
    found = []
    train = cfg.get('train_cfg') or {}
    for key in ('max_epochs', 'max_iters'):
        value = train.get(key)
        if isinstance(value, numbers.Real) and float(value) < 1:
            found.append(f'train_cfg.{key} is {value}: nothing is trained.')
    clip = (cfg.get('optim_wrapper') or {}).get('clip_grad') or {}
    norm = clip.get('max_norm')
    if isinstance(norm, numbers.Real) and not float(norm) > 0:
        found.append(
            f'optim_wrapper.clip_grad.max_norm is {norm}: this removes or '
            'reverses every gradient. Expected a positive number.'
        )
    for key, node in _preprocessors(cfg.to_dict()):
        std = node.get('std')
        if std is not None and any(
            not isinstance(value, numbers.Real) or not float(value) > 0
            for value in (std if isinstance(std, list | tuple) else [std])
        ):
            found.append(
                f'{key}.std is {std}: images are divided by it. '
                'Expected positive numbers.'
            )
    return found + list(_idle_schedules(cfg))


def _idle_schedules(cfg: Config) -> Iterator[str]:
    """Learning-rate schedules of which nothing lies inside the run."""
    train = cfg.get('train_cfg') or {}
    schedules = cfg.get('param_scheduler') or []
    if isinstance(schedules, Mapping):
        schedules = [schedules]
    for index, schedule in enumerate(schedules):
        if not isinstance(schedule, Mapping):
            continue
        unit = 'epochs' if schedule.get('by_epoch', True) else 'iters'
        last = train.get(f'max_{unit}')
        if not isinstance(last, int) or last < 1:
            continue
        milestones = schedule.get('milestones') or []
        for key, start in (
            ('begin', schedule.get('begin', 0)),
            ('milestones', min(milestones, default=0)),
        ):
            if isinstance(start, int) and start >= last:
                yield (
                    f'param_scheduler[{index}].{key} is '
                    f'{schedule[key]}, but the run has {last} {unit}: '
                    'that schedule never changes anything.'
                )


def _preprocessors(node: Any, key: str = '') -> Iterator[tuple[str, Mapping]]:
    if isinstance(node, Mapping):
        for part, value in node.items():
            dotted = f'{key}.{part}'.lstrip('.')
            if part == 'data_preprocessor' and isinstance(value, Mapping):
                yield dotted, value
            yield from _preprocessors(value, dotted)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _preprocessors(value, f'{key}[{index}]')
