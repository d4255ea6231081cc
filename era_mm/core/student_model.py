"""A wrapper that looks like its student from outside."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from ..layers import with_present_names
from .base_distiller import BaseDistiller
from .checkpoint import METADATA_KEY, Extras, load_strictly
from .fit import find_misfits
from .teacher import BaseTeacher

_is_start: ContextVar[bool] = ContextVar('is_start', default=False)


@contextlib.contextmanager
def start_of_run() -> Iterator[None]:
    """Files that are loaded inside are what a new run starts from.

    The new run may have other settings or another teacher than the file's.
    Extras that do not fit are left out then, and what was measured on the
    other teacher is measured again.
    """
    token = _is_start.set(True)
    try:
        yield
    finally:
        _is_start.reset(token)


def _tidy_keys(model: 'StudentModel', incompatible: Any) -> None:
    """Do not report extras as missing keys; no state dict has them."""
    own = tuple(f'distillers.{key}' for key in model.distillers.state_dict())
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not key.endswith(own)
    ]


def _is_of_norms(state_dict: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether it holds only vectors, like those ``SyncNormHook`` averages."""
    return all(
        value.ndim < 2
        for key, value in state_dict.items()
        if key.startswith(prefix)
    )


class StudentModel(BaseModel):
    """A student with teachers and distillers that looks like the student.

    Its children are the student's under their own names, a preprocessor
    that wraps the student's, and ``distillers``; its direct parameters and
    buffers are the student's. So optimiser constructors, hooks and loaders of
    the hosts find the names of the plain model. Attributes that it does not
    have are read from the student (``model.bbox_head``) and set there. Its
    ``state_dict`` is the student's, with the distillers' weights in the
    metadata; see ``era_mm/core/checkpoint.py``. A deep copy copies the
    student and shares the rest.

    Source: ours.

    Args:
        student: The student, a host model.
        teachers: The teachers by name. They follow every ``_apply`` but are
            not submodules.
        distillers: The distillers by name.
        data_preprocessor: Makes the batches.
    """

    student: nn.Module
    distillers: nn.ModuleDict
    _is_copy = False
    #: False after a file without extras was loaded, until training goes on.
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
        self.teachers: Mapping[str, BaseTeacher] = dict(teachers)
        #: Hash of the teacher that the file of a resumed run names.
        self._resumed_on: dict[str, str | None] = {}
        own = self._modules | {'distillers': nn.ModuleDict(distillers)}
        self._modules: dict[str, nn.Module | None] = student._modules | own
        # The dicts themselves, so that `_apply` on either changes both, and
        # a hook on either is called where the student loads.
        for name in (
            '_parameters',
            '_buffers',
            '_non_persistent_buffers_set',
            '_load_state_dict_pre_hooks',
        ):
            self.__dict__[name] = getattr(student, name)
        # From here on attributes that the student has are set on it.
        self.__dict__['student'] = student
        self.register_load_state_dict_post_hook(_tidy_keys)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            student = self.__dict__.get('student')
            if student is None or name.startswith('__'):
                raise
            return getattr(student, name)

    def _is_students(self, name: str) -> bool:
        """Whether an attribute is the student's and not this model's."""
        student = self.__dict__.get('student')
        return (
            student is not None
            and name not in (*self.__dict__, 'data_preprocessor', 'distillers')
            and not hasattr(type(self), name)
            and hasattr(student, name)
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._is_students(name):
            super().__setattr__(name, value)
            if name == 'training' and 'student' in self.__dict__:
                self.student.training = value
            return
        setattr(self.student, name, value)
        self._adopt(name)

    def __delattr__(self, name: str) -> None:
        if self._is_students(name):
            delattr(self.student, name)
            self._modules.pop(name, None)
            return
        super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Replace a child of the student's, or add one of its own."""
        if not self._is_students(name):
            super().add_module(name, module)
            return
        self.student.add_module(name, module)
        self._adopt(name)

    def _adopt(self, name: str) -> None:
        """Take over a child of the student."""
        if name in self.student._modules:
            self._modules[name] = self.student._modules[name]

    def train(self, mode: bool = True) -> 'StudentModel':
        """Set the mode by the student's method, where hosts freeze stages."""
        super().train(mode)
        self.student.train(mode)
        return self

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
        # Distillers are shared like the teachers: an averaged copy (EMA) is
        # a copy of the student, and modes such as T use the averaged student
        # with the current extras.
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

        EMA walks the parameters of the model and its copy in parallel,
        freezes those of the copy and writes into them. So a copy lists
        stand-ins for the shared extras. They have the same values, and
        changing them does not change the originals.
        """
        extras = f'{prefix}.distillers.' if prefix else 'distillers.'
        for name, parameter in super().named_parameters(
            prefix, recurse, **kwargs
        ):
            if self._is_copy and name.startswith(extras):
                parameter = parameter.detach().clone()
            yield name, parameter

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
        metadata[prefix[:-1]] = {
            **metadata[prefix[:-1]],
            METADATA_KEY: self._extras(),
        }
        return state

    def _extras(self) -> Extras:
        extras = Extras()
        for name, distiller in self.distillers.items():
            entry: dict[str, Any] = {
                'type': type(distiller).__name__,
                'state_dict': dict(distiller.state_dict()),
            }
            if distiller.inner is not None:
                entry['inner'] = dict(distiller.inner.state_dict())
                entry['inner_optimizer'] = (
                    distiller.inner_optimizer.state_dict()
                )
            if distiller.needs_teacher:
                teacher = self.teachers[distiller.teacher]
                entry['measured_on'] = self._measured_on(name)
                # A head that came from a file must be in the next file, too.
                if teacher.brought:
                    entry['teacher'] = dict(teacher.brought)
            extras[name] = entry
        return extras

    def _measured_on(self, name: str) -> str | None:
        """Hash of the teacher of all that a distiller measured, or None.

        None if the teacher of a resumed run is not that of its file: what it
        measured is then of either or of both.
        """
        teacher = self.teachers[self.distillers[name].teacher]
        present = teacher.loaded_fingerprint
        return (
            present if self._resumed_on.get(name, present) == present else None
        )

    def _load_extras(self, extras: Mapping) -> None:
        self.has_extras = True
        if self._is_copy and _is_start.get():
            # The model itself, whose extras they are, loads the same file.
            return
        for name, distiller in self.distillers.items():
            entry = extras.get(name)
            if entry is None or entry['type'] != type(distiller).__name__:
                self.has_extras = False
                print_log(
                    f'The checkpoint has no extras of distiller {name!r} '
                    f'({type(distiller).__name__}); they are not changed.',
                    logger='current',
                    level=logging.WARNING,
                )
                continue
            state = with_present_names(distiller, entry['state_dict'])
            if _is_start.get():
                misfits = self._misfits(distiller, state, entry)
                if misfits:
                    self.has_extras = False
                    print_log(
                        f'The new run starts without the extras of distiller '
                        f'{name!r} ({type(distiller).__name__}) in the '
                        f'checkpoint, which do not fit: {"; ".join(misfits)}.',
                        logger='current',
                        level=logging.WARNING,
                    )
                    continue
            load_strictly(
                distiller,
                state,
                name=f'extras of {name!r} in the checkpoint',
                advice='Give the config that the run was trained with. If it '
                'is that one, the file is of an older era_mm, with which it '
                'must be used (CHANGELOG.md).',
            )
            if 'teacher' in entry:
                self.teachers[distiller.teacher].take(entry['teacher'])
            if distiller.inner is not None:
                distiller.inner.load_state_dict(entry['inner'])
                # As for the run's own optimiser: a new run has its settings.
                if not _is_start.get():
                    distiller.inner_optimizer.load_state_dict(
                        entry['inner_optimizer']
                    )
            if not distiller.needs_teacher:
                continue
            if _is_start.get():
                self._measure_again(name, entry.get('measured_on'))
            else:
                self._resumed_on[name] = entry.get('measured_on')

    @staticmethod
    def _misfits(
        distiller: BaseDistiller, state: Mapping[str, Tensor], entry: Mapping
    ) -> list[str]:
        """How a file's extras differ from a distiller's."""
        misfits = find_misfits(distiller.state_dict(), state)
        if distiller.inner is not None:
            misfits += find_misfits(
                distiller.inner.state_dict(), entry.get('inner', {})
            )
        return misfits

    def _measure_again(self, name: str, measured_on: str | None) -> None:
        """Forget what a file's distiller measured on another teacher."""
        distiller = self.distillers[name]
        teacher = self.teachers[distiller.teacher]
        teacher.load()
        if teacher.loaded_fingerprint == measured_on:
            return
        if distiller.measure_again():
            of = 'an unknown' if measured_on is None else 'another'
            print_log(
                f'What distiller {name!r} ({type(distiller).__name__}) had '
                f'measured when the checkpoint was written is of {of} '
                f'teacher, so it is measured again on the {teacher.name}.',
                logger='current',
                level=logging.WARNING,
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
        # mmengine and torch both walk the modules and call this method, and
        # neither calls an overridden load_state_dict(). Children come next;
        # first the student's own hooks rename keys of older files.
        if not _is_of_norms(state_dict, prefix):
            self._load_extras(local_metadata.get(METADATA_KEY) or {})
        self.student._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        # In torch 2.1 a norm whose counter is missing would start from 0.
        own = self.distillers.state_dict(prefix=f'{prefix}distillers.')
        for key, value in own.items():
            if key.endswith('num_batches_tracked'):
                state_dict.setdefault(key, value)
