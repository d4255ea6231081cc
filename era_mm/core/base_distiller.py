"""The contract of a distillation method.

A method is a subclass of :class:`BaseDistiller`, registered in
``era_mm.registry.MODELS``, in one module of ``era_mm/methods/``. It turns
features into losses. The core decides where features come from, when the
method runs and what is saved.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..layers import FirstBatches, Measured
from ..registry import explain_unknown_keys
from .connections import Connections, Features, split_source
from .host_models import HostModel
from .phase import Phase
from .plan import MeasuredPair, Plan
from .rerun import Rerun
from .schedule import LossSchedule, scheduled
from .utils import Unregistered, take_step


@explain_unknown_keys
class BaseDistiller(BaseModule):
    """One paper's method: trainable extras and losses on features.

    A subclass must define :meth:`loss`; it usually defines :meth:`prepare`.
    Parameters it creates are trained by the run's optimiser together with the
    student's and are saved apart from the student's.

    Optional slots:

    - ``needs_teacher = False``: a method without a teacher.
    - ``needs_frozen_teacher = True``: a method with gradients through the
      teacher, or with quantities that are measured on it once.
    - :meth:`build_inner`, :meth:`inner_loss`: an *inner module* with its own
      optimiser, which takes its own step in every training iteration, before
      the student's. It is in none of the run's optimiser groups nor DDP
      buckets; its gradients are averaged over the ranks. :meth:`inner_step`
      is handed ``rerun``, the student's losses and features at other weights.
    - ``pretrain_iters``: for this many iterations at the start of the run,
      only the inner module trains; the student does not change.
    - ``freeze_inner``: the inner module is frozen after that phase.
    - ``schedules``: a factor per loss term over the global step.
    - :attr:`early_sources`, :meth:`early_loss`, :meth:`late_loss`: losses
      that are computed before the student's head runs.
    - :meth:`loss_weights`: the weight of each loss term, for the summary.
    - :meth:`is_complete`: False where a step leaves out some loss terms.
    - :meth:`choose_sources`: sources that depend on the pair.
    - :attr:`feature_pairs`: which sources of the two are compared.
    - :meth:`plan_for`: what ``tools/make_config.py`` writes for a pair;
      :meth:`recipes`: further settings that have a name there.
    - :meth:`student_config`: a student that is more than the given model,
      for methods that keep a module at inference; ``moved_sources``: which
      modules of the given model have other names there.
    - ``has_phases``, :meth:`phase`: phases of the run in which parts of the
      student are frozen; ``min_iters``: the length of all but the last.
    - :meth:`inference_modes`, :meth:`predict`: predictions other than the
      student's own; :meth:`absent_modes`: those that a pair does not have.
    - :meth:`extra_flops`: what a step costs, for the summary.
    - :meth:`compare`: what it measures on the first batches of validation.
    - :meth:`export`: one of these modes as an ordinary host model.
    - :attr:`uses_predictions`, :meth:`leave_predictions`: whether it learns
      from what a teacher predicts, and what it does where these are of other
      classes than the data's.

    Args:
        source: Module whose output is distilled, in student and teacher
            alike, or ``dict(student=..., teacher=...)`` where the names
            differ, each a name or a list of names. A further key
            ``resample=dict(student=..., teacher=...)``, each the arguments
            of ``Resampler``, makes unlike features comparable. It needs one
            name for each of the two. Its former name ``connector`` is
            deprecated.
        teacher: Name of the teacher it learns from.
        schedules: Factors of its loss terms over the run, each the arguments
            of :class:`LossSchedule` under the key of a loss, in which ``*``
            matches anything: ``{'loss_era_twi_*': dict(ramp=500)}``. Where
            several keys match a loss, their factors are multiplied.
        init_cfg: As in mmengine.

    Raises:
        ValueError: At the first step, for a schedule of a loss that the
            method does not have.
    """

    needs_teacher = True
    #: Whether its teacher must not train (``MutualDistillation``).
    needs_frozen_teacher = False
    pretrain_iters = 0
    #: Whether the inner module is frozen after the pre-training phase.
    freeze_inner = False
    #: Modules of the given model that :meth:`student_config` has replaced,
    #: and the module that has the same output now.
    moved_sources: Mapping[str, str] = MappingProxyType({})
    #: Whether :meth:`phase` ever freezes anything.
    has_phases = False

    def __init__(
        self,
        source: str | list | dict = 'neck',
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.student_sources, self.teacher_sources, resample = split_source(
            source, has_teacher=self.needs_teacher
        )
        self.connections = Connections(
            resample,
            student=self.student_sources,
            teacher=self.teacher_sources,
            owner=type(self).__name__,
        )
        self.teacher = teacher
        self.schedules = {
            key: LossSchedule(**kwargs)
            for key, kwargs in (schedules or {}).items()
        }
        self._step = 0
        self._inner: Unregistered | None = None
        self._inner_optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """The config of this method for a pair of models.

        Called by ``tools/make_config.py``. By default the outputs of the
        necks are distilled (of the backbones where there is no neck), level
        by level.

        Args:
            pair: The models, built and measured.

        Raises:
            ValueError: The method cannot work on such a pair.
        """
        match = pair.match()
        return Plan(
            distiller=dict(type=f'era_mm.{cls.__name__}', **match.config()),
            match=match,
        )

    @classmethod
    def recipes(cls) -> dict[str, Callable[[MeasuredPair], Plan]]:
        """Plans for settings that are known by a name of their own.

        They are names of ``--method`` too, besides the module's.
        """
        return {}

    @property
    def predict_sources(self) -> tuple[str, ...]:
        """The student's sources that :meth:`predict` reads.

        Losses may read more; to predict, those sources need not run.
        """
        return self.student_sources

    @property
    def feature_pairs(self) -> tuple[tuple[str, str], ...]:
        """Sources of student and teacher whose features are compared.

        By default the two are paired in their order; what is left of the
        student's, such as logits, is not compared with a feature. A method
        that compares predictions alone has none.
        """
        return tuple(
            zip(self.student_sources, self.teacher_sources, strict=False)
        )

    def choose_sources(
        self, *, student: nn.Module, teacher: nn.Module | None
    ) -> None:
        """Set ``student_sources`` and ``teacher_sources`` by the pair.

        Called once, before the dry run, for methods whose sources depend on
        the models.

        Args:
            student: The student. Do not register it.
            teacher: The teacher. Do not register it; see ``Unregistered``.

        Raises:
            ValueError: The pair has no such source.
        """

    def student_config(self, config: ConfigDict) -> ConfigDict:
        """The host model that is trained, saved and used afterwards.

        Called once, before the student is built. It returns an ordinary host
        config, so checkpoints, use, parameter counts and export are those of
        the model that this config describes.

        Args:
            config: The given student. Not to be changed.
        """
        return config

    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Build what depends on the pair, from the features of a dry run.

        Called once, when the model is built. Infer channels, build
        connectors and refuse pairs that do not fit here.

        Args:
            student: The student. Do not register it.
            teacher: The teacher. Do not register it; see ``Unregistered``.
            student_feats: Features of one image by source.
            teacher_feats: The same of the teacher.

        Raises:
            ValueError: The pair does not fit; the message says how.
        """

    @abstractmethod
    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            student_feats: Features by source, with graph.
            teacher_feats: Features by source, without.
            data_samples: The batch's ground truth and meta data.

        Returns:
            Back-propagated terms under ``loss_<method>_<term>``; logged
            quantities under names without "loss".
        """

    @property
    def early_sources(self) -> tuple[str, ...]:
        """The student's sources that :meth:`early_loss` needs; or none.

        A method whose losses take much memory, but not the outputs of the
        student's head, computes them before that head runs, and both are not
        in memory at the same time. The sources must not lie in a part under
        activation checkpointing. :meth:`loss` still computes all terms: for
        steps in which none of these sources learns, and for callers that have
        all features.
        """
        return ()

    def early_loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """The terms of :meth:`loss` that need ``early_sources`` alone.

        In training it is called within the student's forward pass, in a
        forward hook, when these sources have run, so before
        :meth:`inner_step`.

        Args:
            student_feats: Features of ``early_sources``.
            teacher_feats: As in :meth:`loss`.
            data_samples: As in :meth:`loss`.
        """
        # Optional, so not abstract: `check_early` requires it if needed.
        raise NotImplementedError(
            f"{type(self).__name__} has no losses before the student's head."
        )

    def late_loss(self, *, student_feats: Features) -> dict[str, Tensor]:
        """The other terms of :meth:`loss`, after :meth:`early_loss`.

        Args:
            student_feats: As in :meth:`loss`.
        """
        # Optional likewise.
        raise NotImplementedError(
            f"{type(self).__name__} has no losses before the student's head."
        )

    def check_early(self) -> None:
        """Refuse half of what early losses need; called by the core.

        Raises:
            ValueError: There are ``early_sources`` that are not among the
                student's, or a method that goes with them is missing.
        """
        if not self.early_sources:
            return
        unknown = set(self.early_sources) - set(self.student_sources)
        if unknown:
            raise ValueError(
                f'{type(self).__name__} has the `early_sources` '
                f'{sorted(unknown)}, which are not among its '
                f'`student_sources` {list(self.student_sources)}.'
            )
        for name in ('early_loss', 'late_loss'):
            if getattr(type(self), name) is getattr(BaseDistiller, name):
                raise ValueError(
                    f'{type(self).__name__} has `early_sources` but no '
                    f'`{name}`. Define `{name}`, or remove `early_sources`.'
                )

    def compare(
        self, *, student_feats: Features, teacher_feats: Features
    ) -> Tensor | None:
        """Quantities measured on a validation batch, without gradient.

        Args:
            student_feats: Features by source, in eval mode.
            teacher_feats: The teacher's.

        Returns:
            Numbers to be averaged over batches, or None.
        """
        return None

    def measure_again(self) -> bool:
        """Forget what was measured on a teacher, which is another one now.

        Returns:
            Whether anything had been measured.
        """
        modules = list(self.modules())
        has_measured = any(
            isinstance(module, FirstBatches) and bool(module.seen)
            for module in modules
        )
        for module in modules:
            if isinstance(module, Measured):
                module.reset()
        return has_measured

    def extra_flops(
        self,
        count: Callable[[Callable[[], Any]], int],
        *,
        student_feats: Features,
        teacher_feats: Features,
    ) -> float | None:
        """FLOPs of a step on top of the student's own and the teachers'.

        Args:
            count: Returns the FLOPs of a call.
            student_feats: Features of one image by source, in eval mode.
            teacher_feats: The teacher's.

        Returns:
            FLOPs of the forward and the backward pass for one image of this
            size; None if not known.
        """
        return None

    # -- classes -----------------------------------------------------------

    @property
    def uses_predictions(self) -> bool:
        """Whether what the teacher predicts teaches, not features alone."""
        return False

    def leave_predictions(self, reason: str) -> None:
        """Go on without what the teacher predicts.

        Called once, before training, where ``uses_predictions`` and the
        teacher knows other classes than the data. This one cannot.

        Args:
            reason: Why, a clause.

        Raises:
            ValueError: There would be nothing left, or nothing of what the
                config asks for by name.
        """
        raise ValueError(
            f'{type(self).__name__} learns from what the teacher predicts, '
            f'but {reason}. Take a method on features.'
        )

    # -- steps and phases --------------------------------------------------

    @property
    def step(self) -> int:
        """The run's global iteration."""
        return self._step

    def begin_step(self, step: int) -> None:
        """Set the current iteration; called before the losses of each step.

        Args:
            step: The run's global iteration.
        """
        self._step = step

    def phase(self) -> Phase | None:
        """The phase at ``self.step``; None where everything is trained.

        It depends on the step only, so a resumed run continues correctly.
        """
        return None

    @property
    def min_iters(self) -> int:
        """Number of iterations after which the last phase begins."""
        return self.pretrain_iters

    # -- inner module ------------------------------------------------------

    def build_inner(
        self,
    ) -> tuple[nn.Module, torch.optim.Optimizer] | None:
        """The inner module and its optimiser, after :meth:`prepare`."""
        return None

    def inner_loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> Tensor:
        """What the inner module minimises; a scalar."""
        # Optional, so not abstract: `set_up_inner` requires it if needed.
        raise NotImplementedError(
            f'{type(self).__name__} has no inner module to train.'
        )

    @property
    def inner(self) -> nn.Module | None:
        """The inner module."""
        return self._inner.module if self._inner else None

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer | None:
        """The inner module's optimiser."""
        return self._inner_optimizer

    def set_up_inner(self) -> None:
        """Build the inner module; called by the core."""
        built = self.build_inner()
        if built is not None:
            if type(self).inner_loss is BaseDistiller.inner_loss:
                raise ValueError(
                    f'{type(self).__name__} builds an inner module but has '
                    'no `inner_loss` to train it. Define `inner_loss`, or '
                    'remove `build_inner`.'
                )
            module, self._inner_optimizer = built
            self._inner = Unregistered(module)
        if self.pretrain_iters and self._inner is None:
            raise ValueError(
                f'{type(self).__name__} pre-trains for {self.pretrain_iters} '
                'iterations but has no inner module to train. Define '
                '`build_inner`, or set pretrain_iters=0.'
            )

    def inner_step(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
        rerun: Rerun | None = None,
    ) -> Tensor:
        """One step of the inner optimiser; returns the detached loss.

        ``autograd.grad`` takes gradients for the inner parameters only, so
        the student's gradients and DDP's hooks are not affected.

        Args:
            student_feats: Features by source.
            teacher_feats: The teacher's.
            data_samples: The batch's ground truth and meta data.
            rerun: Runs the student again on this batch; None in
                pre-training.
        """
        assert self.inner is not None
        assert self._inner_optimizer is not None
        parameters = [p for p in self.inner.parameters() if p.requires_grad]
        with torch.enable_grad():
            loss = self.inner_loss(
                student_feats={
                    source: tuple(feat.detach() for feat in feats)
                    for source, feats in student_feats.items()
                },
                teacher_feats=teacher_feats,
                data_samples=data_samples,
            )
            gradients = torch.autograd.grad(loss, parameters)
        take_step(self._inner_optimizer, parameters, gradients)
        return loss.detach()

    # -- inference ---------------------------------------------------------

    def inference_modes(self) -> tuple[str, ...]:
        """Names of its predictions other than the student's own."""
        return ()

    def absent_modes(self) -> Mapping[str, str]:
        """Modes that it has for other pairs, and why not for this one.

        Hooks leave these out with a message; other names are refused.

        Returns:
            The reason by mode, a clause.
        """
        return {}

    def predict(
        self,
        modes: tuple[str, ...],
        *,
        student: nn.Module,
        student_feats: Features,
        data_samples: list,
    ) -> dict[str, list]:
        """Predictions of a batch in several modes, from the same features.

        Args:
            modes: Some of :meth:`inference_modes`.
            student: The student.
            student_feats: Features by source.
            data_samples: Meta data, without predictions. Read-only.

        Returns:
            For each mode a list of data samples with predictions.
        """
        raise NotImplementedError(
            f'{type(self).__name__} has no inference modes, but {modes} were '
            'asked for.'
        )

    def export(
        self,
        mode: str,
        *,
        student: HostModel,
        teacher: HostModel,
        inputs: Tensor,
        **options: Any,
    ) -> HostModel:
        """A mode as a host model, for use without ``Distillation``.

        Args:
            mode: One of :meth:`inference_modes`.
            student: The student, in eval mode. Not to be changed.
            teacher: The same of the teacher.
            inputs: Images to try the exported model on, ``(N, 3, H, W)``.
            options: Options of the method.
        """
        raise NotImplementedError(
            f'{type(self).__name__} exports no mode, but {mode!r} was asked '
            'for.'
        )

    # -- weights and schedules ---------------------------------------------

    def loss_weights(self) -> dict[str, float]:
        """The constant weight of each loss term, for the summary.

        Called after :meth:`prepare`.

        Returns:
            Weights by the key of a loss, in which ``*`` matches anything;
            of all terms, or empty where the method does not define it.
        """
        return {}

    def uses(self) -> tuple[str, ...]:
        """What a method takes of a pair beside features, for the summary.

        Called after :meth:`prepare`.

        Returns:
            A line for each part of which a pair may have to do without.
        """
        return ()

    def is_complete(self, step: int) -> bool:
        """Whether a step has every loss term.

        Only in such a step is a schedule without a matching term an error.

        Args:
            step: The run's global iteration.
        """
        return True

    def scheduled(self, losses: dict[str, Any], step: int) -> dict[str, Any]:
        """Apply the schedules to the terms of one step.

        Raises:
            ValueError: A schedule for a term that does not exist.
        """
        return scheduled(
            losses,
            self.schedules,
            step,
            is_complete=self.is_complete(step),
            owner=type(self).__name__,
        )
