"""Two students that teach each other, each with its own optimiser."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.optim import (
    DefaultOptimWrapperConstructor,
    OptimWrapperDict,
    build_optim_wrapper,
)
from torch import Tensor, nn

from ..registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from .base_distiller import BaseDistiller
from .build import build_distillers, build_student, check_name
from .host_models import HostModel
from .step import DistilledStudent
from .teacher import BaseTeacher
from .utils import broadcast_buffers, evaluating, preserve_rng


class Peer(BaseTeacher):
    """The other student as a teacher, with its current weights.

    It runs in eval mode and without gradient, so teaching does not change
    it, norm statistics included; all ranks use the statistics of the first.
    Its own half trains, moves and saves it, so nothing is loaded or moved
    here.

    Source: ours. DML's released loops run both networks in train mode.
    """

    def extract(
        self, inputs: Tensor, data_samples: list | None = None
    ) -> dict[str, tuple[Tensor, ...]]:
        """Features of a batch, without gradient, in eval mode."""
        broadcast_buffers(self.model)
        with evaluating(self.model):
            return super().extract(inputs, data_samples)


class _Both:
    """A part that both students have, for hooks that know one model.

    What is set on it is set on each student's, and a call is a call of each.

    Source: ours.

    Args:
        parts: The part of each student.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.__dict__['_parts'] = tuple(parts)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # Hooks ask whether a head is of their kind.
        kinds = {type(part) for part in self._parts}
        return kinds.pop() if len(kinds) == 1 else _Both

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return _joined([getattr(part, name) for part in self._parts], name)

    def __setattr__(self, name: str, value: Any) -> None:
        _set_on_each(self._parts, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _joined([part(*args, **kwargs) for part in self._parts], 'it')

    def __bool__(self) -> bool:
        return _joined([bool(part) for part in self._parts], 'it')

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(
            'A hook reads a value of the two students as one. Attributes and '
            f'calls reach both, but a {type(self._parts[0]).__name__} has no '
            'common value. Leave the hook out.'
        )

    __iter__ = __len__ = __getitem__ = __contains__ = _refuse
    __int__ = __float__ = __eq__ = _refuse
    __hash__ = object.__hash__


def _joined(values: Sequence[Any], name: str) -> Any:
    """One value for what each of two students has under a name.

    Raises:
        RuntimeError: Two settings that differ.
    """
    first, second = values
    if isinstance(first, (tuple, list)) and first == second:
        return first
    if not all(isinstance(v, (int, float, str, type(None))) for v in values):
        return _Both(values)
    if first != second:
        raise RuntimeError(
            f'The two students have different values of {name!r}, {first!r} '
            f'and {second!r}, but a hook reads one for both. Give both the '
            'same, or leave the hook out.'
        )
    return first


def _set_on_each(owners: Sequence[Any], name: str, value: Any) -> None:
    # The second gets a copy: a loss may have a state.
    values = (
        value._parts if type(value) is _Both else (value, copy.deepcopy(value))
    )
    for owner, own in zip(owners, values, strict=True):
        setattr(owner, name, own)


class _Preprocessors(BaseDataPreprocessor):
    """The first student's batches; what hooks set on it is set on both.

    Source: ours.

    Args:
        parts: The preprocessor of each half, which stays theirs.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.__dict__['_parts'] = tuple(parts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or '_parts' not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._parts[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or '_parts' not in self.__dict__:
            super().__setattr__(name, value)
        else:
            _set_on_each(self._parts, name, value)

    def forward(self, data: Any, training: bool = False) -> Any:
        """A batch for the first student."""
        return self._parts[0](data, training)


def _build_methods(config: Any) -> dict[str, BaseDistiller]:
    distillers = build_distillers(copy.deepcopy(config))
    for name, method in distillers.items():
        if method.pretrain_iters:
            raise ValueError(
                f'Distiller {name!r} ({type(method).__name__}) pre-trains '
                f'for {method.pretrain_iters} iterations, but in '
                'MutualDistillation the teacher is a student, which changes '
                'in every step. Set pretrain_iters=0.'
            )
    return distillers


@MODELS.register_module()
class MutualDistillation(BaseModel):
    """Trains two students that learn from each other, in turns.

        turn of the first:   one step on  L_1 + distillers(f_1, sg f_2)
        turn of the second:  one step on  L_2 + distillers(f_2, sg f_1')

    L_i are the losses of student i alone; f_1' is the feature of the first
    after its own turn. Each student has its own optimiser, its own data
    preprocessor and its own distillers, whose teacher is the other student.

    A checkpoint's ``state_dict`` has both students, under
    ``students.<name>.``, with the keys of their hosts; ``students_of`` and
    ``era_mm.StudentFilesHook`` write each as a plain host checkpoint. Metrics
    and predictions are those of the first student; ``era_mm.ModesHook`` adds
    the second's under its name.

    What both students have is read and set as if they were one model, so that
    hooks of the hosts reach both: ``model.bbox_head.use_l1 = True``.

    With all distillation weights 0 the first student's run equals that of
    its plain twin with the same seed, unless the second draws random numbers
    in its turns (dropout, box samplers). The second starts from other weights.

    Source: turns with a fresh forward pass are DML's (arXiv 1706.00384), as
    IE-KD's [official code] has it; the rest is ours.

    Args:
        students: Two host model configs by name, such as
            ``dict(first=..., second=...)``.
        distiller: As in :class:`Distillation`, for both students; or one for
            each student's name.
        data_preprocessor: The students', where the host keeps it outside the
            model (mmpretrain).
        input_size: See :class:`Distillation`.

    Raises:
        ValueError: Not two students, a name that cannot prefix logged
            quantities, a distiller with a pre-training phase, or pairs that
            do not fit.
    """

    def __init__(
        self,
        students: Mapping[str, Any],
        distiller: Mapping[str, Any],
        data_preprocessor: dict | None = None,
        input_size: int | tuple[int, int] | None = None,
    ) -> None:
        names = _check_names(students)
        distillers = _by_student(distiller, names)

        methods = {name: _build_methods(distillers[name]) for name in names}

        def build(name: str) -> HostModel:
            return build_student(
                students[name], data_preprocessor, methods[name]
            )

        models = {names[0]: build(names[0])}
        with preserve_rng():
            # From the random state after the first: two students of the
            # same architecture must start from different weights.
            models[names[1]] = build(names[1])
            halves = {
                name: DistilledStudent(
                    models[name],
                    teachers={
                        'teacher': Peer(
                            models[other].module, models[other].config, other
                        )
                    },
                    distillers=methods[name],
                    input_size=input_size,
                )
                for name, other in zip(names, reversed(names), strict=True)
            }
            super().__init__()
        self.students = nn.ModuleDict(halves)
        self.data_preprocessor = _Preprocessors(
            [half.data_preprocessor for half in halves.values()]
        )
        self.active_modes: tuple[str, ...] = ()
        self.mode_predictions: dict[str, list] = {}

    @property
    def first(self) -> DistilledStudent:
        """The half whose student is evaluated."""
        return next(iter(self.students.values()))

    def init_weights(self) -> None:
        """Initialise the first student as a plain run does, then the rest."""
        first, second = self.students.values()
        first.init_weights()
        with preserve_rng():
            second.init_weights()

    # -- steps -------------------------------------------------------------

    def train_step(
        self,
        data: Any,
        optim_wrapper: Any,
        turns: Mapping[str, nn.Module] | None = None,
    ) -> dict[str, Tensor]:
        """Each student's turn: forward, backward, one optimiser step.

        Args:
            data: What the dataloader gives.
            optim_wrapper: One optimiser wrapper per student.
            turns: What to call for each student in its turn, if halves are
                wrapped (DDP). None: the halves themselves.

        Returns:
            Each student's losses under ``<name>.``, and their sum.

        Raises:
            TypeError: Only one optimiser is given.
        """
        if not isinstance(optim_wrapper, OptimWrapperDict):
            raise TypeError(
                'MutualDistillation needs an optimiser for each of '
                f'{list(self.students)}, but got one '
                f'{type(optim_wrapper).__name__}. Set '
                'optim_wrapper.constructor='
                f"'era_mm.{MutualOptimWrapperConstructor.__name__}'."
            )
        losses: dict[str, Tensor] = {}
        logged: dict[str, Tensor] = {}
        for name, half in self.students.items():
            call = half if turns is None else turns[name]
            batch = half.data_preprocessor(_own(data), True)
            wrapper = optim_wrapper[name]
            with wrapper.optim_context(call):
                total, values = half.parse_losses(call(**batch, mode='loss'))
            wrapper.update_params(total)
            losses[name] = values.pop('loss')
            logged |= {f'{name}.{key}': value for key, value in values.items()}
        return {'loss': torch.stack(list(losses.values())).sum(), **logged}

    def val_step(self, data: Any) -> list:
        """The first student's predictions; others in ``mode_predictions``."""
        # Hosts write predictions into the samples that they are given.
        batches = {name: _own(data) for name in self.active_modes}
        self.mode_predictions = {
            name: self.students[name].val_step(batch)
            for name, batch in batches.items()
        }
        return self.first.val_step(data)

    def test_step(self, data: Any) -> list:
        """As :meth:`val_step`."""
        return self.val_step(data)

    def forward(
        self,
        inputs: Tensor,
        data_samples: list | None = None,
        mode: str = 'tensor',
    ) -> Any:
        """The first student's 'tensor' or 'predict'.

        Raises:
            RuntimeError: In mode 'loss'. There is no single loss: the second
                student's depends on the first's update. Or in mode 'tensor'
                while it trains: only the first student would run.
        """
        if mode == 'loss':
            raise RuntimeError(
                'MutualDistillation updates its students in turns, so '
                'mmengine must call its `train_step`. Train with '
                "`model_wrapper_cfg=dict(type='era_mm.MutualDataParallel')`, "
                'as tools/train.py sets it.'
            )
        if mode == 'tensor' and self.training:
            raise RuntimeError(
                'A forward pass of MutualDistillation is that of its first '
                'student, so what it changes in train mode (the statistics '
                "of norms) would leave out the second's. Remove the hook that "
                'asks for it (PreciseBNHook).'
            )
        return self.first(inputs, data_samples, mode=mode)

    def check_modes(self, modes: list[str] | tuple[str, ...]) -> None:
        """Refuse modes other than the names of the further students."""
        for mode in modes:
            if mode not in list(self.students)[1:]:
                raise ValueError(
                    f'{mode!r} cannot be evaluated with the first student. '
                    f'Known: {list(self.students)[1:]}.'
                )

    def absent_modes(self) -> dict[str, str]:
        """None: each student has predictions."""
        return {}

    # -- module bookkeeping ------------------------------------------------

    def _halves_with(self, name: str) -> list[DistilledStudent]:
        """The halves, if the student of each has such an attribute."""
        halves = self.__dict__.get('_modules', {}).get('students') or {}
        found = [h for h in halves.values() if hasattr(h.student, name)]
        return found if len(found) == len(halves) else []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            halves = [] if name.startswith('__') else self._halves_with(name)
            if not halves:
                raise
            return _joined([getattr(h.student, name) for h in halves], name)

    def __setattr__(self, name: str, value: Any) -> None:
        modules = self.__dict__.get('_modules', {})
        if isinstance(modules.get(name), _Preprocessors):
            halves = list(self.students.values())
            _set_on_each(halves, name, value)
            value = _Preprocessors([half.data_preprocessor for half in halves])
        is_own = (
            name in self.__dict__
            or name in self.__dict__.get('_modules', {})
            or hasattr(type(self), name)
        )
        halves = [] if is_own else self._halves_with(name)
        if halves:
            _set_on_each(halves, name, value)
        else:
            super().__setattr__(name, value)

    def named_parameters(
        self, prefix: str = '', recurse: bool = True, **kwargs: Any
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that the halves list, with ``state_dict`` names.

        EMA freezes all parameters that a copy lists, so a half lists
        stand-ins for those that it shares.
        """
        start = f'{prefix}.' if prefix else ''
        for name, half in self.students.items():
            yield from half.named_parameters(
                f'{start}students.{name}', recurse, **kwargs
            )


def _own(data: Any) -> Any:
    """A batch whose samples may be written to; images are shared."""
    return {**data, 'data_samples': copy.deepcopy(data.get('data_samples'))}


def _check_names(students: Any) -> list[str]:
    if not isinstance(students, Mapping) or len(students) != 2:
        raise ValueError(
            '`students` must be a dict of two model configs by name, but got '
            f'{list(students) if isinstance(students, Mapping) else students}'
            '.'
        )
    for name in students:
        check_name(name, 'student')
    return list(students)


def _by_student(
    distiller: Mapping[str, Any], names: list[str]
) -> dict[str, Any]:
    if set(distiller) == set(names):
        return dict(distiller)
    if 'type' in distiller:
        return dict.fromkeys(names, distiller)
    raise ValueError(
        '`distiller` must be one config with `type`, for both students, or a '
        f'dict with one for each of {names}, but has {list(distiller)}.'
    )


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MutualOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """One optimiser wrapper per student of a ``MutualDistillation``.

    The settings of ``optim_wrapper`` apply to each student, or each has its
    own under its name::

        optim_wrapper = dict(
            constructor='era_mm.MutualOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=0.1))
        optim_wrapper = dict(
            constructor='era_mm.MutualOptimWrapperConstructor',
            first=dict(optimizer=dict(type='SGD', lr=0.1)),
            second=dict(optimizer=dict(type='SGD', lr=0.02)))

    Source: ours.

    Args:
        optim_wrapper_cfg: Settings of the wrapper and its ``optimizer``, or
            settings by student.
        paramwise_cfg: As in mmengine, the same for each student.

    Raises:
        TypeError: The model is not a ``MutualDistillation``.
        ValueError: Settings for some students only.
    """

    def __init__(
        self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None
    ) -> None:
        self.settings = dict(optim_wrapper_cfg)
        if paramwise_cfg is not None:
            self.settings['paramwise_cfg'] = paramwise_cfg

    def __call__(self, model: nn.Module) -> OptimWrapperDict:
        """The wrappers by student."""
        model = getattr(model, 'module', model)
        if not isinstance(model, MutualDistillation):
            raise TypeError(
                f'{type(self).__name__} is for era_mm.MutualDistillation, but '
                f'the model is {type(model).__name__}. Remove '
                '`optim_wrapper.constructor`.'
            )
        shared = {
            key: value
            for key, value in self.settings.items()
            if key not in model.students
        }
        own = {name: self.settings.get(name, {}) for name in model.students}
        wrappers = {}
        for name, half in model.students.items():
            settings = {**shared, **own[name]}
            if 'optimizer' not in settings:
                raise ValueError(
                    f'`optim_wrapper` has no `optimizer` for student '
                    f'{name!r}. Give one for all, or one under each of '
                    f'{list(model.students)}.'
                )
            wrappers[name] = build_optim_wrapper(half, settings)
        return OptimWrapperDict(**wrappers)
