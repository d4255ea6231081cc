"""Checks types and ranges of config values against class signatures.

A class that is registered with us, or has ``explain_unknown_keys``, needs no
code for its checks: types come from the annotations of ``__init__``, ranges
from the names of its parameters. If a name has another meaning in a class,
set its ``RANGES``::

    class MyDistiller(BaseDistiller):
        RANGES = {'alpha': (0, 1)}
"""

import collections.abc
import fnmatch
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

from era_mm.errors import UserError

#: Smallest and largest value by the name of a parameter; the first match is
#: used, also for each number of a list. Numbers must always be finite.
RANGES: dict[str, tuple[float, float]] = {
    '*weight': (0, math.inf),
    '*weights': (0, math.inf),
    'temperature': (1e-6, math.inf),
    'num_*': (0, math.inf),
    '*_iters': (0, math.inf),
    '*interval': (1, math.inf),
    'interval': (1, math.inf),
    'input_size': (1, math.inf),
    '*channels': (1, math.inf),
    'seconds': (0, math.inf),
    'momentum': (0, 1),
    'lr': (0, math.inf),
    'scale': (0, math.inf),
    'start': (0, math.inf),
    'ramp': (0, math.inf),
    'gamma': (0, math.inf),
}


#: Parameters whose dict is built by its ``type``.
TYPED = ('norm_cfg', 'act_cfg')


class ArgumentError(UserError, TypeError):
    """An argument of a wrong type, or out of its range."""


def find_fault(value: Any, hint: Any) -> str:
    """What an annotation expects, if a value does not match it; else ''.

    Python's own types and those of ``typing`` are checked. Other classes
    (modules, runners) do not come from a config.
    """
    hint = _without_extras(hint)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty:
        return ''
    if hint is None or hint is type(None):
        return '' if value is None else 'None'
    if origin in (Union, types.UnionType):
        faults = [find_fault(value, part) for part in parts]
        if '' in faults:
            return ''
        # For a list with a wrong number, name the number, not 'a list'.
        deep = [fault for fault in faults if fault.startswith('in ')]
        return deep[0] if deep else ' or '.join(dict.fromkeys(faults))
    if origin is Literal:
        return '' if value in parts else f'one of {parts}'
    if hint is bool:
        return '' if isinstance(value, bool) else 'True or False'
    if hint in (int, float):
        return _fault_in_number(value, hint)
    if hint is str:
        return '' if isinstance(value, str) else 'a string'
    kind = origin or hint
    if not isinstance(kind, type):
        return ''
    if issubclass(kind, collections.abc.Mapping):
        return _fault_in_mapping(value, parts)
    if issubclass(kind, collections.abc.Sequence):
        return _fault_in_sequence(value, kind, parts)
    return ''


def _without_extras(hint: Any) -> Any:
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return hint


def _fault_in_number(value: Any, hint: type) -> str:
    kind = numbers.Integral if hint is int else numbers.Real
    name = 'a whole number' if hint is int else 'a number'
    if isinstance(value, bool) or not isinstance(value, kind):
        return name
    return '' if math.isfinite(value) else f'{name} that is finite'


def _fault_in_mapping(value: Any, parts: tuple) -> str:
    if not isinstance(value, Mapping):
        return 'a dict'
    if len(parts) != 2:
        return ''
    for key, item in value.items():
        if fault := find_fault(key, parts[0]):
            return f'in the dict {fault} as key'
        if fault := find_fault(item, parts[1]):
            return f'in entry {key!r} {fault.removeprefix("in it ")}'
    return ''


def _fault_in_sequence(value: Any, kind: type, parts: tuple) -> str:
    # A string is a sequence, but never meant as one. Config files do not
    # distinguish lists and tuples.
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return 'a list'
    is_fixed = kind is tuple and parts and parts[-1] is not Ellipsis
    if is_fixed and len(value) != len(parts):
        return f'{len(parts)} values'
    hints = parts if is_fixed else parts[:1] * len(value)
    for item, hint in zip(value, hints, strict=False):
        if fault := find_fault(item, hint):
            return f'in the list {fault.removeprefix("in the list ")}'
    return ''


def find_outside(value: Any, least: float, greatest: float) -> str:
    """The range of a number, or of a list's numbers, if one is outside."""
    if isinstance(value, Mapping):
        values: list[Any] = list(value.values())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        values = list(value)
    else:
        values = [value]
    for item in values:
        if isinstance(item, bool) or not isinstance(item, numbers.Real):
            continue
        if not least <= float(item) <= greatest:
            if greatest == math.inf:
                return f'at least {least:g}'
            return f'between {least:g} and {greatest:g}'
    return ''


def range_of(cls: type, name: str) -> tuple[float, float] | None:
    """The range of a parameter: the class's own, else that of its name."""
    own = getattr(cls, 'RANGES', {})
    if name in own:
        return own[name]
    for pattern, limits in RANGES.items():
        if fnmatch.fnmatchcase(name, pattern):
            return limits
    return None


def hints_of(init: Callable) -> dict[str, Any]:
    """The annotations of a function, if they can be resolved."""
    try:
        return typing.get_type_hints(inspect.unwrap(init), include_extras=True)
    except Exception:
        # A name that only a type checker imports.
        return {}


def problems_of(
    cls: type,
    init: Callable,
    arguments: Mapping[str, Any],
    ranges: bool = True,
) -> dict[str, str]:
    """Problems with the arguments of a class, by name.

    Args:
        cls: The class.
        init: Its ``__init__``, or that of a base class that takes them.
        arguments: Arguments by name. Those that are not in the signature are
            ignored.
        ranges: Whether to check ranges as well as types.

    Returns:
        For each wrong argument what was expected and what was given.
    """
    hints = hints_of(init)
    defaults = inspect.signature(init).parameters
    found = {}
    for name, value in arguments.items():
        if name not in defaults or value is defaults[name].default:
            continue
        fault = find_fault(value, hints.get(name, Any))
        limits = range_of(cls, name)
        if not fault and ranges and limits is not None:
            fault = find_outside(value, *limits)
        if not fault and name in TYPED and isinstance(value, Mapping):
            fault = '' if 'type' in value else "a dict with 'type'"
        if fault:
            found[name] = f'expected {fault}, but got {value!r}'
    return found


def check_arguments(
    cls: type,
    init: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    ranges: bool,
) -> None:
    """Refuse wrong arguments of a class.

    Types are checked before the class gets them, ranges afterwards, so that a
    class can raise a more specific error first.

    Raises:
        ArgumentError: Some have a wrong type, are not finite or out of range.
    """
    names = list(inspect.signature(init).parameters)[1:]
    arguments = dict(zip(names, args, strict=False)) | dict(kwargs)
    found = problems_of(cls, init, arguments, ranges)
    if found:
        raise ArgumentError(
            f'{cls.__name__}: '
            + '; '.join(f'`{name}`: {text}' for name, text in found.items())
            + '.'
        )
