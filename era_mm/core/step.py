"""The training step of a student with teachers and distillers."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from mmengine.dist import broadcast
from mmengine.logging import MessageHub, print_log
from torch import Tensor

from ..layers import spare_lone_values
from .base_distiller import BaseDistiller, Features
from .build import Inheritance
from .data_preprocessor import DistillationDataPreprocessor
from .guards import GradientWatch, check_graph, learns
from .host_models import HostModel, forward_until
from .phase import Phase, resting
from .recorder import Recorder
from .rerun import Rerun
from .student_model import StudentModel
from .teacher import BaseTeacher
from .utils import broadcast_buffers, evaluating, preserve_rng
from .wiring import Wiring


class DistilledStudent(StudentModel):
    """A student with its teachers and distillers: training and prediction.

        loss = student's own losses + the distillers' losses
        predict, tensor = the student's, unchanged

    Source: ours.

    Args:
        student: The student.
        teachers: The teachers by name.
        distillers: The distillers by name.
        inheritance: Modules that start from the teachers' weights. None:
            none.
        input_size: Height and width of the image of the dry run, in pixels.
            None: the first usual size that all models accept.

    Raises:
        ValueError: Pairs that do not fit, sources that do not exist, a
            distiller without its teacher, or neither distiller nor
            inheritance.
    """

    _phase_name = ''

    def __init__(
        self,
        student: HostModel,
        *,
        teachers: Mapping[str, BaseTeacher],
        distillers: Mapping[str, BaseDistiller],
        inheritance: Inheritance | None = None,
        input_size: int | tuple[int, int] | None = None,
    ) -> None:
        if not distillers and not inheritance:
            raise ValueError(
                '`distiller` is empty; give at least one. (Only with '
                '`inherit` there may be none.)'
            )
        with preserve_rng():
            super().__init__(
                student.module,
                teachers=teachers,
                distillers=distillers,
                data_preprocessor=DistillationDataPreprocessor(
                    student.module.data_preprocessor, teachers
                ),
            )
            #: Host config of :attr:`student`.
            self.student_config = student.config
            self.wiring = Wiring(
                student=self.student,
                teachers=self.teachers,
                # torch's type does not say what the modules are.
                distillers=cast(
                    'Mapping[str, BaseDistiller]', self.distillers
                ),
                input_size=input_size,
            )
        # The last batch of an epoch may have only one image.
        for extras in (self.distillers, *self.inner_modules()):
            spare_lone_values(extras)
        self._inheritance = inheritance
        self._gradients = GradientWatch(self.distillers)
        self.inference_mode: str | None = None
        self.active_modes: tuple[str, ...] = ()
        self.mode_predictions: dict[str, list] = {}

    def init_weights(self) -> None:
        """Initialise the student as a plain run does, then the extras.

        mmengine calls it before training and not before testing, so the
        teachers' weights are loaded here.
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
        if self._inheritance:
            self._inheritance.apply(self.student)

    def load_teachers(self) -> None:
        """Load the teachers' weights, unless they are loaded."""
        for teacher in self.teachers.values():
            teacher.load()

    # -- forward -----------------------------------------------------------

    def forward(
        self,
        inputs: Tensor,
        data_samples: list | None = None,
        mode: str = 'tensor',
        teacher_inputs: dict[str, Tensor] | None = None,
    ) -> Any:
        """Forward pass in mode 'loss', 'predict' or 'tensor', as in the hosts.

        Args:
            inputs: The student's batch.
            data_samples: Ground truth and meta data.
            mode: What to compute.
            teacher_inputs: Batches of teachers whose tensors differ from the
                student's; the preprocessor makes them.
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
            RuntimeError: A trainable extra got no gradient in the previous
                step, or the student would train in a pre-training phase.
        """
        if self.pretraining:
            raise RuntimeError(
                'In its pre-training phase '
                f'({self._pretrain_iters()} iterations) this model must not '
                'update the student, so mmengine must call '
                '`pretrain_step`. Train with '
                "`model_wrapper_cfg=dict(type='era_mm.DistillationDataParallel"
                "')`, as tools/train.py sets it."
            )
        is_learning = self.training and torch.is_grad_enabled()
        # Until `begin_step` the distillers hold the previous step, to which
        # these gradients belong.
        if is_learning and not self._phase().frozen:
            self._gradients.check()
        self.load_teachers()
        teacher_feats = self.wiring.teach(inputs, data_samples, teacher_inputs)
        step = self.step
        for distiller in self.distillers.values():
            distiller.begin_step(step)
        phase = self._phase()
        if is_learning and phase.name != self._phase_name:
            for name in phase.frozen:
                broadcast_buffers(self.student.get_submodule(name))
        frozen = resting(self.student, phase.frozen)
        early: dict[str, dict[str, Any]] = {}
        with frozen, self.wiring.recorder as recorder:
            if is_learning:
                self._begin_early(recorder, teacher_feats, data_samples, early)
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
                check_graph(student_feats)
            self.has_extras = True
        idle = []
        recorded = student_feats, teacher_feats
        for name, distiller in self.distillers.items():
            own = self.wiring.feats_of(distiller, recorded)
            feats = distiller.connections.connect(**own)
            if is_learning and self._is_idle(distiller, feats):
                idle.append(name)
                continue
            if (
                distiller.inner is not None
                and not distiller.freeze_inner
                and self.training
            ):
                rerun = Rerun(
                    self.student,
                    self.wiring.recorder,
                    inputs,
                    data_samples,
                    connect=functools.partial(
                        distiller.connections.connect_like,
                        own['teacher_feats'],
                    ),
                )
                distiller.inner_step(
                    **feats, data_samples=data_samples, rerun=rerun
                )
            if name in early:
                terms = early.pop(name)
                terms |= distiller.late_loss(
                    student_feats=feats['student_feats']
                )
            else:
                terms = distiller.loss(**feats, data_samples=data_samples)
            self._add(losses, name, distiller.scheduled(terms, step))
        if is_learning:
            self._check_phase(phase, idle, losses)
        return losses

    def _begin_early(
        self,
        recorder: Recorder,
        teacher_feats: Mapping[str, Features],
        data_samples: list,
        early: dict[str, dict[str, Any]],
    ) -> None:
        """Let distillers compute losses before the student's head runs.

        Args:
            recorder: Records the student.
            teacher_feats: The features of each teacher by source.
            data_samples: Ground truth and meta data.
            early: Gets the losses, by the distiller's name.
        """

        def begin(name: str, student_feats: Features) -> None:
            distiller = self.distillers[name]
            feats = distiller.connections.connect(
                student_feats=student_feats,
                teacher_feats={
                    source: teacher_feats[distiller.teacher][source]
                    for source in distiller.teacher_sources
                },
            )
            # Else it is idle, or `check_graph` says why it must not be so.
            if any(learns(maps) for maps in feats['student_feats'].values()):
                early[name] = distiller.early_loss(
                    **feats, data_samples=data_samples
                )

        for name, distiller in self.distillers.items():
            if distiller.early_sources:
                recorder.when_recorded(
                    {
                        source: len(self.wiring.student_shapes[source])
                        for source in distiller.early_sources
                    },
                    functools.partial(begin, name),
                )

    @staticmethod
    def _is_idle(distiller: BaseDistiller, feats: Mapping[str, Any]) -> bool:
        """Whether all of a distiller's student sources are frozen now.

        False for a distiller without student sources.
        """
        own = feats['student_feats'].values()
        return bool(own) and not any(learns(maps) for maps in own)

    def _add(
        self, losses: dict[str, Any], name: str, terms: Mapping[str, Any]
    ) -> None:
        """Add a distiller's terms, prefixed if there are several."""
        prefix = self._prefix_of(name)
        for key, value in terms.items():
            key = prefix + key
            if key in losses:
                raise ValueError(
                    f'{type(self.distillers[name]).__name__} returns a loss '
                    f'{key!r}, which the student already has. Name it '
                    'loss_<method>_<term>.'
                )
            losses[key] = value

    # -- phases ------------------------------------------------------------

    @property
    def has_phases(self) -> bool:
        """Whether parts of the student are frozen in some steps."""
        return any(d.has_phases for d in self.distillers.values())

    def _phase(self) -> Phase:
        """The phases of all distillers at this step, joined."""
        phases = (distiller.phase() for distiller in self.distillers.values())
        return Phase.together(phase for phase in phases if phase is not None)

    def _check_phase(
        self, phase: Phase, idle: list[str], losses: dict[str, Any]
    ) -> None:
        """Log which phase begins; refuse one in which nothing is trained."""
        if phase.frozen and not any(
            learns(value) for key, value in losses.items() if 'loss' in key
        ):
            raise RuntimeError(
                f'Phase {phase.name!r} trains nothing: it freezes '
                f'{", ".join(phase.frozen)}, and no loss has a gradient '
                'elsewhere. Give the term that trains the rest a weight, or '
                'remove the phase.'
            )
        if phase.name != self._phase_name:
            self._phase_name = phase.name
            print_log(
                f'Phase {phase.name!r} from iteration {self.step} on. '
                f'Frozen: {", ".join(phase.frozen) or "nothing"}. '
                f'Inactive distillers: {", ".join(idle) or "none"}.',
                logger='current',
            )

    # -- prediction --------------------------------------------------------

    def _prefix_of(self, name: str) -> str:
        """What a distiller's losses and modes begin with in this model."""
        return f'{name}.' if len(self.distillers) > 1 else ''

    def _modes_of(self, name: str) -> dict[str, str]:
        """A distiller's modes, by their names in this model."""
        modes = self.distillers[name].inference_modes()
        return {f'{self._prefix_of(name)}{mode}': mode for mode in modes}

    def absent_modes(self) -> dict[str, str]:
        """Modes that this pair does not have, and why not."""
        return {
            f'{self._prefix_of(name)}{mode}': reason
            for name, distiller in self.distillers.items()
            for mode, reason in distiller.absent_modes().items()
        }

    def check_modes(self, modes: list[str] | tuple[str, ...]) -> None:
        """Refuse inference modes that no distiller offers."""
        known = [m for name in self.distillers for m in self._modes_of(name)]
        absent = self.absent_modes()
        for mode in modes:
            if mode not in known:
                reason = f': {absent[mode]}' if mode in absent else ''
                raise ValueError(
                    f'Inference mode {mode!r} is not offered{reason}. Known: '
                    f'{["S", *known]} (S, the student alone, always '
                    'exists).'
                )

    def predict(
        self, inputs: Tensor, data_samples: list | None = None
    ) -> list:
        """The student's predictions, or those of ``inference_mode``.

        Predictions of ``active_modes``, from the same features, are stored
        in ``mode_predictions``.
        """
        modes = dict.fromkeys(self.active_modes)
        if self.inference_mode is not None:
            modes[self.inference_mode] = None
        if not modes:
            return self.student(inputs, data_samples, mode='predict')
        if not self.has_extras:
            raise RuntimeError(
                f'The modes {list(modes)} need the trained distillers, but '
                'the loaded checkpoint has a plain student only. Load a '
                'checkpoint of the distillation, or use no mode.'
            )
        # The modes may use the teacher; plain predictions do not.
        self.load_teachers()
        blank = [sample.new() for sample in data_samples or []]
        asked = {
            name: {k: v for k, v in self._modes_of(name).items() if k in modes}
            for name in self.distillers
        }
        recorder = self.wiring.listen(
            source
            for name, distiller in self.distillers.items()
            if asked[name]
            for source in distiller.predict_sources
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
                    student_feats=distiller.connections.connect_student(
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
        """Whether only inner modules are trained now."""
        return self.step < self._pretrain_iters()

    def pretrain_step(self, data: Any) -> dict[str, Tensor]:
        """One step of the pre-training phase; the student does not change.

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
            inputs: The student's batch, as in :meth:`forward`.
            data_samples: Ground truth and meta data.
            teacher_inputs: Batches of teachers whose tensors differ.
            load: Whether to load teachers that are not loaded.

        Returns:
            A function from a distiller to its ``student_feats`` and
            ``teacher_feats``.
        """
        if load:
            self.load_teachers()
        with torch.no_grad(), evaluating(self.student):
            teacher_feats = self.wiring.teach(
                inputs, data_samples, teacher_inputs
            )
            with self.wiring.recorder as recorder:
                forward_until(
                    self.student, inputs, recorder.sources, data_samples
                )
        recorded = recorder.pop(), teacher_feats

        def feats_of(distiller: BaseDistiller) -> dict[str, Any]:
            own = self.wiring.feats_of(distiller, recorded)
            return distiller.connections.connect(**own)

        return feats_of

    @torch.no_grad()
    def compare(self, data: Any) -> dict[str, Tensor]:
        """What the distillers measure on a validation batch, by name.

        Only of those that measure anything (``BaseDistiller.compare``).

        Args:
            data: What the dataloader gives.
        """
        measuring = {
            name: distiller
            for name, distiller in self.distillers.items()
            if type(distiller).compare is not BaseDistiller.compare
            # In validation alone the teacher may have no weights.
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

    def parse_losses(
        self, losses: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total and the logged values, in which ``loss`` is the total.

        A student's own ``loss`` (mmpretrain's classifiers have one) is
        logged as ``student_loss``.
        """
        total, logged = self.student.parse_losses(losses)
        if 'loss' in losses:
            logged['student_loss'] = logged['loss']
            logged['loss'] = total
        return total, logged

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Mmengine's step, or one of the pre-training phase."""
        if self.pretraining:
            return self.pretrain_step(data)
        return super().train_step(data, optim_wrapper)
