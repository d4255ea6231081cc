"""How a model with a student in it *is* that student from outside."""

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import nn

from .base_distiller import BaseDistiller
from .checkpoint import METADATA_KEY, Extras, load_strictly
from .teacher import BaseTeacher


def _tidy_keys(model: 'StudentModel', incompatible: Any) -> None:
    """Report keys as the file has them; extras are not in its state dict."""
    own = tuple(f'distillers.{key}' for key in model.distillers.state_dict())
    missing = [
        key.replace('student.', '', 1)
        for key in incompatible.missing_keys
        if not key.endswith(own)
    ]
    unexpected = [
        key.replace('student.', '', 1) for key in incompatible.unexpected_keys
    ]
    incompatible.missing_keys[:] = missing
    incompatible.unexpected_keys[:] = unexpected


class StudentModel(BaseModel):
    """A student with teachers and distillers, and the student to others.

    Attributes that it does not have are the student's (``model.bbox_head``),
    so hooks of the hosts find what they look for. Its ``state_dict`` is the
    student's own, with the distillers' weights in the metadata; see
    ``era_mm/core/checkpoint.py``. Its parameters go by the student's names. A
    copy is one of the student and shares the rest.

    Source: ours.

    Args:
        student: The student, a host model.
        teachers: The teachers by name; followed by every ``_apply``, and no
            modules of this one.
        distillers: The distillers by name.
        data_preprocessor: Makes the batches.
    """

    _is_copy = False
    #: False once a file without extras was loaded and nothing trained since.
    has_extras = True

    def __init__(
        self,
        student: nn.Module,
        *,
        teachers: Mapping[str, BaseTeacher],
        distillers: Mapping[str, BaseDistiller],
        data_preprocessor: nn.Module,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.student = student
        self.teachers: Mapping[str, BaseTeacher] = dict(teachers)
        self.distillers = nn.ModuleDict(distillers)
        self.register_load_state_dict_post_hook(_tidy_keys)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            student = self.__dict__.get('_modules', {}).get('student')
            if student is None or name.startswith('__'):
                raise
            return getattr(student, name)

    def inner_modules(self) -> list[nn.Module]:
        """The distillers' inner modules, which are not registered."""
        return [
            distiller.inner
            for distiller in self.distillers.values()
            if distiller.inner is not None
        ]

    def _apply(self, fn: Any, recurse: bool = True) -> 'StudentModel':
        super()._apply(fn, recurse)
        for teacher in self.teachers.values():
            teacher.apply_(fn)
        for module in self.inner_modules():
            module._apply(fn)
        return self

    def __deepcopy__(self, memo: dict) -> 'StudentModel':
        # Distillers are shared as the teachers are: an averaged copy (EMA) is
        # a copy of the student, and modes such as T join the averaged student
        # with the extras as they are.
        memo[id(self.distillers)] = self.distillers
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        clone._is_copy = True
        return clone

    def named_parameters(
        self, prefix: str = '', recurse: bool = True, **kwargs: Any
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The student's under its own names, then the extras'.

        Optimiser constructors of the hosts decide by names that begin with
        ``backbone``.

        What averages a copy (EMA) walks the parameters of both models in
        parallel, freezes the copy's and writes into them. So a copy lists
        stand-ins for the shared extras: equal in value, and nothing that is
        done to them reaches the original.
        """
        start = f'{prefix}.' if prefix else ''
        for name, parameter in super().named_parameters(
            prefix, recurse, **kwargs
        ):
            if self._is_copy and name.startswith(f'{start}distillers.'):
                parameter = parameter.detach().clone()
            own = name.removeprefix(f'{start}student.')
            yield (name if own == name else start + own), parameter

    def state_dict(
        self,
        *args: Any,
        destination: Any = None,
        prefix: str = '',
        keep_vars: bool = False,
    ) -> Any:
        """The student's own state dict, extras in its metadata."""
        state = self.student.state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        metadata = state._metadata
        # Module versions, under the names that loading into this model uses.
        for key in list(metadata):
            if key == prefix[:-1] or key.startswith(prefix):
                suffix = key[len(prefix) :]
                alias = f'{prefix}student' + (f'.{suffix}' if suffix else '')
                metadata[alias] = metadata[key]
        metadata[prefix[:-1]] = {
            **metadata[prefix[:-1]],
            METADATA_KEY: self._extras(),
        }
        return state

    def _extras(self) -> Extras:
        extras = Extras()
        for name, distiller in self.distillers.items():
            entry = {
                'type': type(distiller).__name__,
                'state_dict': dict(distiller.state_dict()),
            }
            if distiller.inner is not None:
                entry['inner'] = dict(distiller.inner.state_dict())
                entry['inner_optimizer'] = (
                    distiller.inner_optimizer.state_dict()
                )
            # A head that a file brought must be in the next file, too.
            if distiller.needs_teacher:
                brought = self.teachers[distiller.teacher].brought
                if brought:
                    entry['teacher'] = dict(brought)
            extras[name] = entry
        return extras

    def _load_extras(self, extras: Mapping) -> None:
        self.has_extras = True
        for name, distiller in self.distillers.items():
            entry = extras.get(name)
            if entry is None or entry['type'] != type(distiller).__name__:
                self.has_extras = False
                print_log(
                    f'The checkpoint has no extras of distiller {name!r} '
                    f'({type(distiller).__name__}); they keep their values.',
                    logger='current',
                    level=logging.WARNING,
                )
                continue
            load_strictly(
                distiller,
                entry['state_dict'],
                name=f'extras of {name!r} in the checkpoint',
            )
            if 'teacher' in entry:
                self.teachers[distiller.teacher].take(entry['teacher'])
            if distiller.inner is not None:
                distiller.inner.load_state_dict(entry['inner'])
                distiller.inner_optimizer.load_state_dict(
                    entry['inner_optimizer']
                )

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list,
        unexpected_keys: list,
        error_msgs: list,
    ) -> None:
        # mmengine and torch both walk the modules and call this one, and
        # neither calls an overridden load_state_dict().
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f'{prefix}student.{key[len(prefix) :]}'] = (
                state_dict.pop(key)
            )
        self._load_extras(local_metadata.get(METADATA_KEY) or {})
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
