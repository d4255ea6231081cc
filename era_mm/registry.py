"""Registries of era_mm, all children of mmengine's (scope ``era_mm``).

A type is written ``era_mm.MBRNet`` in a config; mmengine then imports this
module by itself and ``locations`` import the rest.
"""

import difflib
import functools
import inspect
from typing import Any

from mmengine import registry as mmengine_registry

from era_mm.validation import check_arguments

LOCATIONS = [
    'era_mm.core',
    'era_mm.methods',
    'era_mm.models',
    'era_mm.hooks',
    'era_mm.engine',
]


def explain_unknown_keys(cls: type) -> type:
    """Let a class say what it takes when a config has something else.

    Python's own message names the unknown key alone; a user needs the nearest
    known one. What a class names in ``CUT``, options of before, it explains.
    Values are checked by :mod:`era_mm.validation`. Classes whose
    ``__init__`` takes ``**kwargs`` stay as they are.
    """
    init = cls.__dict__.get('__init__')
    if init is None:
        return cls
    parameters = list(inspect.signature(init).parameters.values())[1:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return cls
    known = [p.name for p in parameters]

    @functools.wraps(init)
    def checked_init(self, *args: Any, **kwargs: Any) -> None:
        for key in kwargs:
            if key in known:
                continue
            cut = getattr(cls, 'CUT', {}).get(key)
            if cut is not None:
                raise TypeError(
                    f'{cls.__name__} has no {key!r} any more: {cut}. Remove '
                    'the key.'
                )
            near = difflib.get_close_matches(key, known, n=3)
            hint = (
                f'Did you mean {" or ".join(map(repr, near))}?'
                if near
                else f'Known keys: {", ".join(known)}.'
            )
            raise TypeError(
                f'{cls.__name__} has no config key {key!r}. {hint}'
            )
        check_arguments(type(self), init, args, kwargs, ranges=False)
        init(self, *args, **kwargs)
        check_arguments(type(self), init, args, kwargs, ranges=True)

    cls.__init__ = checked_init  # type: ignore[misc]
    return cls


class Registry(mmengine_registry.Registry):
    """mmengine's registry; what it registers explains unknown config keys."""

    def register_module(self, name=None, force=False, module=None):
        if module is not None:
            return super().register_module(
                name, force, explain_unknown_keys(module)
            )
        register = super().register_module(name, force)

        def decorator(cls):
            return register(explain_unknown_keys(cls))

        return decorator


def _child(name: str) -> Registry:
    parent = getattr(mmengine_registry, name)
    return Registry(
        parent.name, parent=parent, scope='era_mm', locations=LOCATIONS
    )


MODELS = _child('MODELS')
HOOKS = _child('HOOKS')
MODEL_WRAPPERS = _child('MODEL_WRAPPERS')
OPTIM_WRAPPER_CONSTRUCTORS = _child('OPTIM_WRAPPER_CONSTRUCTORS')
