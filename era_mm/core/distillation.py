"""The model that mmengine trains: a student, teachers, and distillers."""

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.dist import broadcast
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModel
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from ..registry import MODELS
from .base_distiller import BaseDistiller
from .checkpoint import METADATA_KEY, Extras, load_strictly
from .data_preprocessor import DistillationDataPreprocessor
from .dry_run import explained
from .phase import Phase, resting
from .recorder import Recorder
from .rerun import Rerun
from .teacher import Teacher, forward_until, resolve_model_config
from .utils import (
    blank_sample,
    broadcast_buffers,
    evaluating,
    preserve_rng,
)


def _named(value: Any, name: str, key: str) -> dict[str, Any]:
    """A dict of named entries from one entry (it has ``key``) or from such."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(
            f'`{name}` must be a dict with {key!r}, or a dict of such dicts '
            f'by name, but got {value!r}.'
        )
    entries = {name: value} if key in value else dict(value)
    for entry_name, entry in entries.items():
        if 'loss' in entry_name or '.' in entry_name:
            # mmengine adds up every logged key that has "loss" in it.
            raise ValueError(
                f'A {name} must not be named {entry_name!r}: names prefix '
                'the logged quantities, so they may hold neither "loss" nor '
                'a dot. Choose another name.'
            )
        if not isinstance(entry, Mapping) or key not in entry:
            raise ValueError(
                f'`{name}` {entry_name!r} must be a dict with {key!r}, but '
                f'got {entry!r}.'
            )
    return entries


def _build_distillers(config: dict | None) -> dict[str, BaseDistiller]:
    distillers = {
        name: MMENGINE_MODELS.build(cfg)
        for name, cfg in _named(config, 'distiller', 'type').items()
    }
    for name, distiller in distillers.items():
        if not isinstance(distiller, BaseDistiller):
            raise TypeError(
                f'Distiller {name!r} must be a BaseDistiller, but is '
                f'{type(distiller).__name__}.'
            )
    return distillers


def _student_config(
    student: Mapping | str,
    data_preprocessor: Mapping | None,
    distillers: Mapping[str, BaseDistiller],
) -> tuple[ConfigDict, str | None]:
    config, scope = resolve_model_config(student)
    kind = str(config.get('type', '')).rpartition('.')[2]
    if kind == Distillation.__name__:
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


def student_config_of(model: Mapping) -> tuple[ConfigDict, str | None]:
    """The host model whose weights a distillation's files hold.

    The config's ``student``, or what a method makes of it that keeps a
    module at inference. Neither teacher nor weights are needed.

    Args:
        model: The config of a ``Distillation``.

    Returns:
        Its config, and the scope in which its types are looked up (None: the
        current one).
    """
    with preserve_rng():
        return _student_config(
            model['student'],
            model.get('data_preprocessor'),
            _build_distillers(model.get('distiller')),
        )


def _shapes_of(
    feats: Mapping[str, tuple[Tensor, ...]],
) -> dict[str, list[tuple[int, ...]]]:
    return {
        source: [tuple(level.shape) for level in levels]
        for source, levels in feats.items()
    }


def _learns(loss: Any) -> bool:
    """Whether a loss, a tensor or a list of them, has a gradient."""
    parts = loss if isinstance(loss, (list, tuple)) else [loss]
    return any(part.requires_grad for part in parts)


def _tidy_keys(model: 'Distillation', incompatible: Any) -> None:
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


@MODELS.register_module()
class Distillation(BaseModel):
    """Trains a student with the help of distillers; *is* the student else.

        loss = student's own losses + the distillers' losses
        predict, tensor = the student's, untouched

    With all distillation weights 0, losses and weights are those of the plain
    student, bit for bit: building and initialising teacher and distillers
    does not touch the random state that the student's run sees.

    Attributes that it does not have are the student's (``model.bbox_head``),
    so hooks of the hosts find what they look for. Its ``state_dict`` is the
    student's own; see ``era_mm/core/checkpoint.py``.

    Source: ours.

    Args:
        student: A host model config, as the user's own config has it; or a
            reference ('mmdet::...' or a path).
        distiller: One distiller config, or a dict of named ones. None only
            together with ``inherit``: the student then trains as a plain one
            from an inherited start.
        teacher: Arguments of :class:`~era_mm.core.teacher.Teacher`
            (``config``, ``checkpoint``, ``dtype``), or a dict of named ones;
            None for methods that need none.
        data_preprocessor: The student's, where the host keeps it beside the
            model (mmpretrain).
        input_size: Height and width of the dry run that finds the channels,
            in pixels.
        inference_mode: Whose predictions :meth:`predict` returns: None for
            the student's own, or one of the distillers' modes.
        inherit: Modules of the student that start from the teacher's weights
            where names and shapes match, such as ``['neck', 'bbox_head']``;
            a list, or a dict from module to teacher where there are several.
            They stay trainable. None: all start as in a plain run. [ours];
            MGD and others in the lineage start detectors so.

    Raises:
        ValueError: Pairs that do not fit, sources that do not exist, a
            distiller without its teacher, an inherited module that has
            nothing in common with the teacher's.
    """

    _is_copy = False
    _phase_name = ''
    #: False once a file without extras was loaded and nothing trained since.
    _has_extras = True

    def __init__(
        self,
        student: dict | str,
        distiller: dict | None = None,
        teacher: dict | None = None,
        data_preprocessor: dict | None = None,
        input_size: int | tuple[int, int] = 64,
        inference_mode: str | None = None,
        inherit: str | Sequence[str] | dict[str, str] | None = None,
    ) -> None:
        with preserve_rng():
            distillers = _build_distillers(distiller)
        # The student comes first: it must find the random state of a plain
        # run.
        student_model, config = self._build_student(
            student, data_preprocessor, distillers
        )
        with preserve_rng():
            teachers = self._build_teachers(teacher)
            preprocessor = DistillationDataPreprocessor(
                student_model.data_preprocessor, teachers
            )
            super().__init__(data_preprocessor=preprocessor)
            self.student = student_model
            self.teachers = teachers
            self.distillers = nn.ModuleDict(distillers)
            #: Host config of :attr:`student`.
            self.student_config = config
            self._inherited = self._plan_inheritance(inherit)
            self._prepare(input_size)
        self.inference_mode: str | None = None
        self.active_modes: tuple[str, ...] = ()
        self.mode_predictions: dict[str, list] = {}
        if inference_mode is not None:
            self.check_modes([inference_mode])
            self.inference_mode = inference_mode
        self._watch_gradients()
        self.register_load_state_dict_post_hook(_tidy_keys)

    @staticmethod
    def _build_student(
        student: Any,
        data_preprocessor: Mapping | None,
        distillers: Mapping[str, BaseDistiller],
    ) -> tuple[nn.Module, ConfigDict]:
        """The student, and the config of the host model that it is."""
        with preserve_rng():
            config, scope = _student_config(
                student, data_preprocessor, distillers
            )
        # Detectors write into the config that they are built from.
        with DefaultScope.overwrite_default_scope(scope):
            return MMENGINE_MODELS.build(copy.deepcopy(config)), config

    @staticmethod
    def _build_teachers(teacher: dict | None) -> dict[str, Teacher]:
        return {
            name: Teacher(**cfg, name=name)
            for name, cfg in _named(teacher, 'teacher', 'config').items()
        }

    def _prepare(self, input_size: int | tuple[int, int]) -> None:
        """Wire the recorders and let each distiller meet its pair."""
        distillers = dict(self.distillers.items())
        if not distillers and not self._inherited:
            raise ValueError(
                '`distiller` is empty; give at least one. (Only with '
                '`inherit` there may be none.)'
            )
        for distiller in distillers.values():
            if distiller.needs_teacher and (
                distiller.teacher not in self.teachers
            ):
                raise ValueError(
                    f'{type(distiller).__name__} learns from a teacher named '
                    f'{distiller.teacher!r}, but the model has '
                    f'{sorted(self.teachers) or "none"}. Set '
                    '`model.teacher`.'
                )
        pairs: dict[str, dict[str, Any]] = {
            name: dict(
                student=self.student,
                teacher=self.teachers[distiller.teacher].model
                if distiller.needs_teacher
                else None,
            )
            for name, distiller in distillers.items()
        }
        for name, distiller in distillers.items():
            distiller.choose_sources(**pairs[name])
        self._student_recorder = Recorder(
            self.student, self._all_sources(), owner='student'
        )
        size = (
            (input_size, input_size)
            if isinstance(input_size, int)
            else tuple(input_size)
        )
        inputs = torch.zeros(1, 3, *size)
        samples = [blank_sample(*size)]
        recorder = self._student_recorder
        own_run = explained('student', size)
        with own_run, torch.no_grad(), evaluating(self.student), recorder:
            forward_until(self.student, inputs, recorder.sources, samples)
        student_feats = recorder.pop()
        teacher_feats: dict[str, dict] = {}
        for name, teacher in self.teachers.items():
            teacher.record(
                dict.fromkeys(
                    source
                    for distiller in distillers.values()
                    if distiller.teacher == name
                    for source in distiller.teacher_sources
                )
            )
            if teacher.is_recorded:
                with explained(name, size):
                    teacher_feats[name] = teacher.extract(inputs, samples)
        self.dry_run_size = size
        #: What each source put out in the dry run, a shape per level.
        self.student_shapes = _shapes_of(student_feats)
        #: The same by teacher.
        self.teacher_shapes = {
            name: _shapes_of(feats) for name, feats in teacher_feats.items()
        }
        for name, distiller in distillers.items():
            distiller.prepare(
                **pairs[name],
                **distiller.connect(
                    **self._feats_of(distiller, student_feats, teacher_feats),
                    is_dry_run=True,
                ),
            )
            distiller.set_up_inner()
        # Some are found to be of no use only when the pair is met.
        self._student_recorder = Recorder(
            self.student, self._all_sources(), owner='student'
        )

    def _all_sources(self) -> dict[str, None]:
        """What is recorded of the student, each once, in order."""
        return dict.fromkeys(
            source
            for distiller in self.distillers.values()
            for source in distiller.student_sources
        )

    def init_weights(self) -> None:
        """Initialise the student as a plain run does, then the extras.

        mmengine calls it before training and not before testing, so it is
        also where the teachers take their weights in.
        """
        self.student.init_weights()
        with preserve_rng():
            for distiller in self.distillers.values():
                distiller.init_weights()
        # mmengine does this for what `state_dict` holds, the student.
        for distiller in self.distillers.values():
            for module in (distiller, distiller.inner):
                for tensor in module.state_dict().values() if module else ():
                    broadcast(tensor)
        self.load_teachers()
        self._inherit()

    def load_teachers(self) -> None:
        """Take the teachers' weights in, if they are not yet."""
        for teacher in self.teachers.values():
            teacher.load()

    def _plan_inheritance(
        self, inherit: str | Sequence[str] | dict[str, str] | None
    ) -> dict[str, dict[str, list[str]]]:
        """Keys of the student to take over, by teacher and module."""
        if not inherit:
            return {}
        if isinstance(inherit, str):
            inherit = [inherit]
        if not isinstance(inherit, Mapping):
            if len(self.teachers) != 1:
                raise ValueError(
                    f'`inherit` {list(inherit)} does not say from which '
                    f'teacher, and there are {sorted(self.teachers)}. Give '
                    'one teacher, or a dict {module: teacher}.'
                )
            inherit = dict.fromkeys(inherit, next(iter(self.teachers)))
        own = self.student.state_dict()
        plan: dict[str, dict[str, list[str]]] = {}
        for module, name in inherit.items():
            if name not in self.teachers:
                raise ValueError(
                    f'`inherit` takes {module!r} from a teacher {name!r}, but '
                    f'there are {sorted(self.teachers)}.'
                )
            theirs = self.teachers[name].model.state_dict()
            keys = [key for key in own if key.startswith(f'{module}.')]
            match = [
                key
                for key in keys
                if key in theirs and theirs[key].shape == own[key].shape
            ]
            if not match:
                raise ValueError(
                    f'The student can inherit nothing of {module!r} from '
                    f'{name!r}: of its {len(keys)} tensors there, none has '
                    'the name and shape of one of the teacher. Give modules '
                    'that are alike in both, usually the neck and the head.'
                )
            plan.setdefault(name, {})[module] = match
        return plan

    @torch.no_grad()
    def _inherit(self) -> None:
        own = self.student.state_dict()
        for name, modules in self._inherited.items():
            theirs = self.teachers[name].model.state_dict()
            for module, keys in modules.items():
                for key in keys:
                    own[key].copy_(theirs[key])
                total = sum(key.startswith(f'{module}.') for key in own)
                print_log(
                    f'The student inherits {len(keys)} of {total} tensors of '
                    f'{module!r} from {name!r}.',
                    logger='current',
                )

    # -- forward -----------------------------------------------------------

    def forward(
        self,
        inputs: Tensor,
        data_samples: list | None = None,
        mode: str = 'tensor',
        teacher_inputs: dict[str, Tensor] | None = None,
    ) -> Any:
        """As the hosts' models: 'loss', 'predict' or 'tensor'.

        Args:
            inputs: The student's batch.
            data_samples: Ground truth and meta data.
            mode: What to compute.
            teacher_inputs: Batches of teachers that see other tensors than
                the student; the preprocessor makes them.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples or [], teacher_inputs)
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        return self.student(inputs, data_samples, mode=mode)

    def loss(
        self,
        inputs: Tensor,
        data_samples: list,
        teacher_inputs: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The student's losses under their own names, and the distillers'.

        Raises:
            RuntimeError: A trainable extra got no gradient in the step
                before; the student trains in a pre-training phase.
        """
        if self.pretraining:
            raise RuntimeError(
                'In its pre-training phase '
                f'({self._pretrain_iters()} iterations) this model must not '
                'update the student, so mmengine has to call '
                '`pretrain_step`. Train with '
                "`model_wrapper_cfg=dict(type='era_mm.DistillationDataParallel"
                "')`, as tools/train.py sets it."
            )
        self._check_gradients()
        teacher_feats = self._teach(inputs, data_samples, teacher_inputs)
        step = self.step
        for distiller in self.distillers.values():
            distiller.step = step
        phase = self._phase()
        is_learning = self.training and torch.is_grad_enabled()
        if is_learning and phase.name != self._phase_name:
            for name in phase.frozen:
                broadcast_buffers(self.student.get_submodule(name))
        frozen = resting(self.student, phase.frozen)
        with frozen, self._student_recorder as recorder:
            if phase.task:
                losses = dict(self.student(inputs, data_samples, mode='loss'))
            else:
                losses = {}
                forward_until(
                    self.student, inputs, recorder.sources, data_samples
                )
        student_feats = recorder.pop()
        if is_learning:
            if not phase.frozen:
                self._check_graph(student_feats)
            self._has_extras = True
        idle = []
        for name, distiller in self.distillers.items():
            recorded = self._feats_of(distiller, student_feats, teacher_feats)
            feats = distiller.connect(**recorded)
            if is_learning and not any(
                _learns(maps) for maps in feats['student_feats'].values()
            ):
                idle.append(name)
                continue
            if (
                distiller.inner is not None
                and not distiller.freeze_inner
                and self.training
            ):
                distiller.rerun = Rerun(
                    self.student,
                    self._student_recorder,
                    inputs,
                    data_samples,
                    connect=functools.partial(
                        distiller.connect_like, recorded['teacher_feats']
                    ),
                )
                distiller.inner_step(**feats, data_samples=data_samples)
                distiller.rerun = None
            terms = distiller.scheduled(
                distiller.loss(**feats, data_samples=data_samples), step
            )
            for key, value in terms.items():
                if len(self.distillers) > 1:
                    key = f'{name}.{key}'
                if key in losses:
                    raise ValueError(
                        f'{type(distiller).__name__} names a loss {key!r}, '
                        'which the student has already. Name it '
                        'loss_<method>_<term>.'
                    )
                losses[key] = value
        if is_learning:
            self._check_phase(phase, idle, losses)
        return losses

    # -- phases ------------------------------------------------------------

    @property
    def has_phases(self) -> bool:
        """Whether parts of the student rest in some steps."""
        return any(d.has_phases for d in self.distillers.values())

    def _phase(self) -> Phase:
        """What the distillers ask for now, taken together."""
        phases = (distiller.phase() for distiller in self.distillers.values())
        return Phase.together(phase for phase in phases if phase is not None)

    def _check_phase(
        self, phase: Phase, idle: list[str], losses: dict[str, Any]
    ) -> None:
        """Say which phase begins; refuse one in which nothing learns."""
        if phase.frozen and not any(
            _learns(value) for key, value in losses.items() if 'loss' in key
        ):
            raise RuntimeError(
                f'Phase {phase.name!r} trains nothing: it freezes '
                f'{", ".join(phase.frozen)}, and no loss has a gradient '
                'elsewhere. Give the term that trains the rest a weight, or '
                'leave the phase out.'
            )
        if phase.name != self._phase_name:
            self._phase_name = phase.name
            print_log(
                f'Phase {phase.name!r} from iteration {self.step} on. '
                f'Frozen: {", ".join(phase.frozen) or "nothing"}. '
                f'Distillers at rest: {", ".join(idle) or "none"}.',
                logger='current',
            )

    @staticmethod
    def _check_graph(student_feats: dict[str, tuple[Tensor, ...]]) -> None:
        """Refuse sources whose losses could not train the student."""
        for source, feats in student_feats.items():
            if not any(feat.requires_grad for feat in feats):
                raise RuntimeError(
                    f"The student's output at {source!r} has no gradient, so "
                    'distilling it would train nothing. It lies in a frozen '
                    'stage (`frozen_stages`) or inside a part under '
                    'activation checkpointing (`with_cp`, '
                    '`activation_checkpointing`): choose another source, or '
                    'turn that off.'
                )

    def _teach(
        self,
        inputs: Tensor,
        data_samples: list | None,
        teacher_inputs: dict[str, Tensor] | None,
        load: bool = True,
    ) -> dict[str, dict]:
        if load:
            self.load_teachers()
        own = teacher_inputs or {}
        return {
            name: teacher.extract(own.get(name, inputs), data_samples)
            for name, teacher in self.teachers.items()
            # One that is there for `inherit` alone is not asked.
            if teacher.is_recorded
        }

    @staticmethod
    def _feats_of(
        distiller: BaseDistiller, student_feats: dict, teacher_feats: dict
    ) -> dict[str, dict]:
        return {
            'student_feats': {
                source: student_feats[source]
                for source in distiller.student_sources
            },
            'teacher_feats': {
                source: teacher_feats[distiller.teacher][source]
                for source in distiller.teacher_sources
            },
        }

    # -- prediction --------------------------------------------------------

    def _modes_of(self, name: str) -> dict[str, str]:
        """A distiller's modes by the names they have in this model.

        With several distillers they are prefixed, as the losses are.
        """
        modes = self.distillers[name].inference_modes()
        prefix = f'{name}.' if len(self.distillers) > 1 else ''
        return {f'{prefix}{mode}': mode for mode in modes}

    def check_modes(self, modes: list[str] | tuple[str, ...]) -> None:
        """Refuse inference modes that no distiller offers."""
        known = [m for name in self.distillers for m in self._modes_of(name)]
        for mode in modes:
            if mode not in known:
                raise ValueError(
                    f'Inference mode {mode!r} is not offered. Known: '
                    f'{["S", *known]} (S is the student alone and always '
                    'there).'
                )

    def predict(
        self, inputs: Tensor, data_samples: list | None = None
    ) -> list:
        """The student's predictions, or those of ``inference_mode``.

        Predictions of ``active_modes``, from the same features, are left in
        ``mode_predictions``.
        """
        modes = dict.fromkeys(self.active_modes)
        if self.inference_mode is not None:
            modes[self.inference_mode] = None
        if not modes:
            return self.student(inputs, data_samples, mode='predict')
        if not self._has_extras:
            raise RuntimeError(
                f'The modes {list(modes)} need what the distillers have '
                'learnt, but the loaded checkpoint has a plain student only. '
                'Load a file that the distillation has written, or ask for '
                'no mode.'
            )
        # The modes may use the teacher; the student alone does not.
        self.load_teachers()
        blank = [sample.new() for sample in data_samples or []]
        asked = {
            name: {k: v for k, v in self._modes_of(name).items() if k in modes}
            for name in self.distillers
        }
        recorder = Recorder(
            self.student,
            dict.fromkeys(
                source
                for name, distiller in self.distillers.items()
                if asked[name]
                for source in distiller.predict_sources
            ),
            owner='student',
        )
        with recorder:
            if self.inference_mode is None:
                predictions = self.student(
                    inputs, data_samples, mode='predict'
                )
            else:
                forward_until(
                    self.student, inputs, recorder.sources, data_samples
                )
        student_feats = recorder.pop()
        found: dict[str, list] = {}
        for name, distiller in self.distillers.items():
            own = asked[name]
            if own:
                predictions_of = distiller.predict(
                    tuple(own.values()),
                    student=self.student,
                    student_feats=distiller.connect_student(
                        {
                            source: student_feats[source]
                            for source in distiller.predict_sources
                        }
                    ),
                    data_samples=blank,
                )
                found |= {k: predictions_of[v] for k, v in own.items()}
        self.mode_predictions = found
        if self.inference_mode is None:
            return predictions
        return found[self.inference_mode]

    # -- phases and steps --------------------------------------------------

    @property
    def step(self) -> int:
        """The run's global iteration; 0 outside an mmengine run."""
        return int(MessageHub.get_current_instance().get_info('iter', 0))

    def _pretrain_iters(self) -> int:
        return max(
            (d.pretrain_iters for d in self.distillers.values()), default=0
        )

    @property
    def pretraining(self) -> bool:
        """Whether only inner modules train now."""
        return self.step < self._pretrain_iters()

    def pretrain_step(self, data: Any) -> dict[str, Tensor]:
        """One step of the pre-training phase; the student stays as it is.

        Args:
            data: What the dataloader gives.
        """
        data = self.data_preprocessor(data, True)
        data_samples = data['data_samples']
        feats_of = self.record(**data)
        log_vars = {}
        for name, distiller in self.distillers.items():
            if self.step < distiller.pretrain_iters:
                feats = feats_of(distiller)
                loss = distiller.inner_step(**feats, data_samples=data_samples)
                log_vars[f'{name}.pretrain'] = loss
        return {'loss': sum(log_vars.values()), **log_vars}

    def record(
        self,
        inputs: Tensor,
        data_samples: list | None = None,
        teacher_inputs: dict[str, Tensor] | None = None,
        load: bool = True,
    ) -> Callable[[BaseDistiller], dict[str, Any]]:
        """Features of a batch in eval mode, without gradient.

        Args:
            inputs: As of :meth:`forward`, as are the others.
            data_samples: Ground truth and meta data.
            teacher_inputs: Batches of teachers that see other tensors.
            load: Whether teachers take their weights in, if they are not yet.

        Returns:
            What gives a distiller its ``student_feats`` and
            ``teacher_feats``.
        """
        with torch.no_grad(), evaluating(self.student):
            teacher_feats = self._teach(
                inputs, data_samples, teacher_inputs, load=load
            )
            with self._student_recorder as recorder:
                forward_until(
                    self.student, inputs, recorder.sources, data_samples
                )
        student_feats = recorder.pop()

        def feats_of(distiller: BaseDistiller) -> dict:
            feats: dict[str, Any] = self._feats_of(
                distiller, student_feats, teacher_feats
            )
            return distiller.connect(**feats)

        return feats_of

    @torch.no_grad()
    def compare(self, data: Any) -> dict[str, Tensor]:
        """What the distillers measure on a batch of validation, by name.

        Only those that measure anything (``BaseDistiller.compare``).

        Args:
            data: What the dataloader gives.
        """
        measuring = {
            name: distiller
            for name, distiller in self.distillers.items()
            if type(distiller).compare is not BaseDistiller.compare
            # Validation alone need not have the teacher's weights.
            and all(teacher.is_loaded for teacher in self.teachers.values())
        }
        if not measuring:
            return {}
        feats_of = self.record(
            **self.data_preprocessor.with_teachers(data, training=False)
        )
        found = {
            name: distiller.compare(**feats_of(distiller))
            for name, distiller in measuring.items()
        }
        return {k: value for k, value in found.items() if value is not None}

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Mmengine's step, or one of the pre-training phase."""
        if self.pretraining:
            return self.pretrain_step(data)
        return super().train_step(data, optim_wrapper)

    # -- gradients of the extras -------------------------------------------

    def _watch_gradients(self) -> None:
        """Note which trainable extras the first step reaches.

        A hook on the tensors and not a look at ``grad``: by the time the next
        step begins mmengine has cleared it.
        """
        self._unreached = {}
        self._gradient_handles = []
        for name, parameter in self.distillers.named_parameters():
            if parameter.requires_grad:
                self._unreached[name] = 'distillers.' + name
                self._gradient_handles.append(
                    parameter.register_hook(self._reached(name))
                )
        self._watched_steps = 0

    def _reached(self, name: str) -> Any:
        def mark(gradient: Tensor) -> None:
            self._unreached.pop(name, None)

        return mark

    def _check_gradients(self) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        if self._watched_steps > 1:
            return
        # The distillers still have the step before, whose gradients these are.
        if self._phase().frozen:
            return
        self._watched_steps += 1
        if self._watched_steps == 1:
            return
        for handle in self._gradient_handles:
            handle.remove()
        self._gradient_handles = []
        if self._unreached:
            names = list(self._unreached.values())
            raise RuntimeError(
                f'{len(names)} trainable extras got no gradient in the first '
                f'step: {", ".join(names[:4])}'
                + (', ...' if len(names) > 4 else '')
                + '. Every parameter that a distiller makes must take part '
                'in its loss; build only what is used.'
            )

    # -- module bookkeeping ------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            student = self.__dict__.get('_modules', {}).get('student')
            if student is None or name.startswith('__'):
                raise
            return getattr(student, name)

    def _inner_modules(self) -> list[nn.Module]:
        distillers = self._modules.get('distillers') or {}
        return [d.inner for d in distillers.values() if d.inner is not None]

    def _apply(self, fn: Any, recurse: bool = True) -> 'Distillation':
        super()._apply(fn, recurse)
        for teacher in self.teachers.values():
            teacher.apply_(fn)
        for module in self._inner_modules():
            module._apply(fn)
        return self

    def __deepcopy__(self, memo: dict) -> 'Distillation':
        # Distillers are shared as the teachers are: an averaged copy (EMA) is
        # a copy of the student, and modes such as T join the averaged student
        # with the extras as they are.
        memo[id(self.distillers)] = self.distillers
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        state = dict(self.__dict__)
        state['_gradient_handles'] = []
        clone.__dict__.update(copy.deepcopy(state, memo))
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
        self._has_extras = True
        for name, distiller in self.distillers.items():
            entry = extras.get(name)
            if entry is None or entry['type'] != type(distiller).__name__:
                self._has_extras = False
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
