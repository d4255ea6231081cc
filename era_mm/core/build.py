"""From configs to students, teachers and distillers."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from ..errors import said_of
from .base_distiller import BaseDistiller
from .host_models import HostModel, resolve_model_config
from .teacher import BaseTeacher, Teacher
from .utils import preserve_rng

#: Host models that cannot be a student, and why.
_NO_STUDENTS = {
    'BaseRetriever': (
        "mmpretrain's hook updates the prototypes of its own class only, so "
        'they would stay those of the first validation. Distil a classifier.'
    ),
    'SemiBaseDetector': (
        'it has its own teacher, and batches of several branches. '
        'Distil the detector in it, on labelled images: '
        '`student=_base_.model.detector`; a `train_dataloader` (with '
        '`_delete_=True`) of the labelled data set, whose pipeline ends with '
        'PackDetInputs instead of MultiBranch, and a DefaultSampler; '
        "`val_cfg=dict(type='ValLoop')`; and `custom_hooks` without "
        'MeanTeacherHook.'
    ),
}


def distillation_kind(model: Mapping) -> str | None:
    """Which distillation a model's config describes.

    Args:
        model: The config of a model.

    Returns:
        ``'Distillation'`` or ``'MutualDistillation'``, the type's name
        without its scope; None for a model of a host.
    """
    kind = model.get('type')
    name = (
        kind.__name__
        if isinstance(kind, type)
        else str(kind).rpartition('.')[2]
    )
    return name if name.endswith('Distillation') else None


def check_name(name: str, role: str) -> None:
    """Refuse names that cannot prefix logged quantities.

    Args:
        name: The name.
        role: What the name is for, as the message calls it.

    Raises:
        ValueError: It holds "loss" or a dot.
    """
    if 'loss' in name or '.' in name:
        # mmengine adds up every logged key that has "loss" in it.
        raise ValueError(
            f'A {role} must not be named {name!r}: names prefix the logged '
            'quantities, so they may hold neither "loss" nor a dot. Choose '
            'another name.'
        )


def as_named_configs(value: Any, role: str, key: str) -> dict[str, Any]:
    """Configs by name, from one config or from a dict of named ones.

    Args:
        value: One config, which has ``key``, a dict of named ones, or None.
        role: What the configs describe; also the name of a single one.
        key: The key that each must have.

    Raises:
        TypeError: ``value`` is neither.
        ValueError: A name that cannot prefix logged quantities, or an entry
            without ``key``.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(
            f'`{role}` must be a dict with {key!r}, or a dict of such dicts '
            f'by name, but got {value!r}.'
        )
    entries = {role: value} if key in value else dict(value)
    for name, entry in entries.items():
        check_name(name, role)
        if not isinstance(entry, Mapping) or key not in entry:
            raise ValueError(
                f'`{role}` {name!r} must be a dict with {key!r}, but got '
                f'{entry!r}.'
            )
    return entries


def build_distillers(config: Mapping | None) -> dict[str, BaseDistiller]:
    """The distillers by name; the random state is not changed.

    Args:
        config: One distiller's config, or a dict of named ones.

    Raises:
        TypeError: One is not a distiller.
    """
    with preserve_rng():
        distillers = {
            name: MODELS.build(entry)
            for name, entry in as_named_configs(
                config, 'distiller', 'type'
            ).items()
        }
    for name, distiller in distillers.items():
        if not isinstance(distiller, BaseDistiller):
            raise TypeError(
                f'Distiller {name!r} must be a BaseDistiller, but got '
                f'{type(distiller).__name__}.'
            )
    return distillers


def build_teachers(config: Mapping | None) -> dict[str, Teacher]:
    """The teachers by name; their weights are not loaded yet.

    Args:
        config: Arguments of :class:`Teacher`, or a dict of named ones.
    """
    return {
        name: Teacher(**entry, name=name)
        for name, entry in as_named_configs(
            config, 'teacher', 'config'
        ).items()
    }


def build_student(
    student: Mapping | str,
    data_preprocessor: Mapping | None,
    distillers: Mapping[str, BaseDistiller],
) -> HostModel:
    """The student, as changed by the distillers, and its config.

    It draws the same random numbers as the plain model.

    Args:
        student: See ``Distillation``.
        data_preprocessor: Likewise.
        distillers: Each may change the config.

    Raises:
        ValueError: The student is a distillation itself, a semi-supervised
            detector or a retriever.
    """
    with preserve_rng():
        config, scope = _student_config(student, data_preprocessor, distillers)
    # Detectors write into the config that they are built from.
    with (
        DefaultScope.overwrite_default_scope(scope),
        said_of('The student cannot be built', 'Correct its config.'),
    ):
        module = MODELS.build(copy.deepcopy(config))
    for cls in type(module).__mro__:
        if cls.__name__ in _NO_STUDENTS:
            raise ValueError(
                f'{type(module).__name__} cannot be a student: '
                + _NO_STUDENTS[cls.__name__]
            )
    return HostModel(config, module)


def student_config_of(model: Mapping) -> tuple[ConfigDict, str | None]:
    """The host model whose weights a distillation's checkpoints hold.

    The config's ``student``, as changed by methods that keep a module at
    inference. Neither teacher nor weights are needed.

    Args:
        model: The config of a ``Distillation``.

    Returns:
        Its config, and the scope of its types (None: the current one).
    """
    with preserve_rng():
        return _student_config(
            model['student'],
            model.get('data_preprocessor'),
            build_distillers(model.get('distiller')),
        )


def _student_config(
    student: Mapping | str,
    data_preprocessor: Mapping | None,
    distillers: Mapping[str, BaseDistiller],
) -> tuple[ConfigDict, str | None]:
    config, scope = resolve_model_config(student)
    if distillation_kind(config) == 'Distillation':
        raise ValueError(
            '`student` is a Distillation itself. Give the plain model '
            "config: usually `student=_base_.model` of the user's own "
            'config.'
        )
    if data_preprocessor is not None:
        config.setdefault('data_preprocessor', data_preprocessor)
    with DefaultScope.overwrite_default_scope(scope):
        for distiller in distillers.values():
            config = distiller.student_config(config)
    return config, scope


class Inheritance:
    """Modules of a student that start from the teachers' weights.

    Where names and shapes match. They are trained like the rest.

    Source: ours; MGD and others in the lineage start detectors so.

    Args:
        inherit: A list of modules, such as ``['neck', 'bbox_head']``, or
            with several teachers a dict from module to teacher. None: none.
        student: The student.
        teachers: The teachers by name.

    Raises:
        ValueError: An unknown teacher, or a module of which no tensor matches
            the teacher's.
    """

    def __init__(
        self,
        inherit: Sequence[str] | Mapping[str, str] | None,
        *,
        student: nn.Module,
        teachers: Mapping[str, BaseTeacher],
    ) -> None:
        self._teachers = dict(teachers)
        #: Keys of the student to copy, by teacher and module.
        self._keys: dict[str, dict[str, list[str]]] = {}
        own = student.state_dict()
        for module, name in self._by_module(inherit).items():
            if name not in teachers:
                raise ValueError(
                    f'`inherit` takes {module!r} from a teacher {name!r}, but '
                    f'there are {sorted(teachers)}.'
                )
            theirs = teachers[name].model.state_dict()
            keys = [key for key in own if key.startswith(f'{module}.')]
            match = [
                key
                for key in keys
                if key in theirs and theirs[key].shape == own[key].shape
            ]
            if not match:
                raise ValueError(
                    f'The student can inherit nothing of {module!r} from '
                    f'{name!r}: none of its {len(keys)} tensors has the name '
                    'and shape of one of the teacher. Give modules that are '
                    'the same in both, usually the neck and the head.'
                )
            self._keys.setdefault(name, {})[module] = match

    def _by_module(
        self, inherit: Sequence[str] | Mapping[str, str] | None
    ) -> Mapping[str, str]:
        if not inherit:
            return {}
        if isinstance(inherit, Mapping):
            return inherit
        if isinstance(inherit, str):
            inherit = [inherit]
        if len(self._teachers) != 1:
            raise ValueError(
                f'`inherit` {list(inherit)} does not name a teacher, '
                f'and there are {sorted(self._teachers)}. Give one teacher, '
                'or a dict {module: teacher}.'
            )
        return dict.fromkeys(inherit, next(iter(self._teachers)))

    def __bool__(self) -> bool:
        return bool(self._keys)

    @torch.no_grad()
    def apply(self, student: nn.Module) -> None:
        """Copy the weights; those of the teachers must be loaded.

        Args:
            student: The student.
        """
        own = student.state_dict()
        for name, modules in self._keys.items():
            theirs = self._teachers[name].model.state_dict()
            for module, keys in modules.items():
                for key in keys:
                    own[key].copy_(theirs[key])
                total = sum(key.startswith(f'{module}.') for key in own)
                print_log(
                    f'The student inherits {len(keys)} of {total} tensors of '
                    f'{module!r} from {name!r}.',
                    logger='current',
                )
