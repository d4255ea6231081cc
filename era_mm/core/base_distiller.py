"""The contract of a distillation method.

A method is a subclass of :class:`BaseDistiller`, registered in
``era_mm.registry.MODELS``, in one module of ``era_mm/methods/``. It gets
features and gives losses; where features come from, when it runs and what is
saved is the core's business.
"""

import fnmatch
from abc import abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..registry import explain_unknown_keys
from .connections import Connections, Features
from .phase import Phase
from .plan import MeasuredPair, Plan
from .rerun import Rerun
from .schedule import LossSchedule
from .utils import Unregistered, take_step


class HostModel(NamedTuple):
    """An ordinary model of a host.

    Args:
        config: Its config, as one writes it.
        module: It, built.
    """

    config: ConfigDict
    module: nn.Module


@explain_unknown_keys
class BaseDistiller(BaseModule):
    """One paper's method: trainable extras and losses on features.

    A subclass must define :meth:`loss`; it usually defines :meth:`prepare`.
    Parameters it creates are trained by the run's optimiser together with the
    student's and are saved apart from the student's.

    Optional slots:

    - ``needs_teacher = False``: a method without a teacher.
    - :meth:`build_inner`, :meth:`inner_loss`: an *inner module* with its own
      optimiser, which takes its own step in every training iteration, before
      the student's. It is in none of the run's optimiser groups nor DDP
      buckets; its gradients are averaged over the ranks. :meth:`inner_step`
      is handed ``rerun``, the student's losses and features at other weights.
    - ``pretrain_iters``: for so many iterations from the start of the run
      only the inner module trains; the student stays as it is.
    - ``freeze_inner``: the inner module learns in that phase alone.
    - ``schedules``: a factor per loss term over the global step.
    - :meth:`loss_weights`: the weight of each loss term, for the summary.
    - :meth:`is_complete`: not where some of its loss terms rest in a step.
    - :meth:`choose_sources`: sources that depend on the pair.
    - :meth:`plan_for`: what ``tools/make_config.py`` writes for a pair.
    - :meth:`student_config`: a student that is more than the given model,
      for methods that keep a module at inference; ``moved_sources``: which
      modules of the given model have other names there.
    - ``has_phases``, :meth:`phase`: stretches of the run in which parts of
      the student rest; ``min_iters``: how long all but the last take.
    - :meth:`inference_modes`, :meth:`predict`: predictions other than the
      student's own.
    - :meth:`extra_flops`: what a step costs, for the summary.
    - :meth:`compare`: what it measures on the first batches of validation.
    - :meth:`export`: one of these modes as an ordinary host model.

    Args:
        source: Module whose output is distilled, in student and teacher
            alike, or ``dict(student=..., teacher=...)`` where the names
            differ, each a name or a list of names. A further key
            ``connector=dict(student=..., teacher=...)``, each the arguments
            of ``Connector``, makes unlike features comparable: it takes one
            name for each of the two.
        teacher: Name of the teacher it learns from.
        schedules: Factors of its loss terms over the run, each the arguments
            of :class:`LossSchedule` under the key of a loss, in which ``*``
            stands for anything: ``{'loss_era_twi_*': dict(ramp=500)}``.
            Where several keys meet a loss, their factors are multiplied.
        init_cfg: As in mmengine.

    Raises:
        ValueError: A schedule for a loss that the method does not have shows
            up at the first step.
    """

    needs_teacher = True
    pretrain_iters = 0
    #: Whether the inner module stays as it is after the pre-training phase.
    freeze_inner = False
    #: What :meth:`student_config` has taken away, by the name it had in the
    #: given model, and the module that puts it out now.
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
        pair: Mapping[str, Any] = (
            source
            if isinstance(source, dict)
            else {'student': source, 'teacher': source}
        )
        roles = {'student', 'teacher'} if self.needs_teacher else {'student'}
        if not roles <= set(pair) <= {'student', 'teacher', 'connector'}:
            raise ValueError(
                '`source` must be a module name, a list of them, or '
                f'dict(student=..., teacher=...), but got {source!r}.'
            )
        self.student_sources = self._names(pair['student'])
        self.teacher_sources = (
            self._names(pair['teacher']) if self.needs_teacher else ()
        )
        self.connections = Connections(
            pair.get('connector'),
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

    @staticmethod
    def _names(names: str | list | tuple) -> tuple[str, ...]:
        return (names,) if isinstance(names, str) else tuple(names)

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """The config of this method for a pair of models.

        Asked by ``tools/make_config.py``. This one distils the outputs of
        the necks (of the backbones where there is none), level by level.

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

    @property
    def predict_sources(self) -> tuple[str, ...]:
        """The student's sources that :meth:`predict` reads.

        Losses may read more; a mode alone need not run them.
        """
        return self.student_sources

    def choose_sources(
        self, *, student: nn.Module, teacher: nn.Module | None
    ) -> None:
        """Set ``student_sources`` and ``teacher_sources`` by the pair.

        Called once, before the dry run, for methods that find some of their
        sources in the models themselves.

        Args:
            student: The student. Do not register it.
            teacher: The teacher. Do not register it; see ``Unregistered``.

        Raises:
            ValueError: The pair lacks what is looked for.
        """

    def student_config(self, config: ConfigDict) -> ConfigDict:
        """The host model that is trained, saved and used afterwards.

        Called once, before the student is built. What it returns is a host
        config like any other, so files, modes of use, parameter counts and
        export are those of the model it describes.

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
        """Build what depends on the pair, from one dry run.

        Called once, when the model is built: the place to infer channels,
        build connectors and refuse a pair that does not fit.

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

    def compare(
        self, *, student_feats: Features, teacher_feats: Features
    ) -> Tensor | None:
        """What it measures on a batch of validation, without gradient.

        Args:
            student_feats: Features by source, in eval mode.
            teacher_feats: The teacher's.

        Returns:
            Numbers to be averaged over batches, or None.
        """
        return None

    def extra_flops(
        self,
        count: Callable[[Callable[[], Any]], int],
        *,
        student_feats: Features,
        teacher_feats: Features,
    ) -> float | None:
        """FLOPs of a step beyond the student's own and the teachers'.

        Args:
            count: Gives the FLOPs of a call.
            student_feats: Features of one image by source, in eval mode.
            teacher_feats: The teacher's.

        Returns:
            Those of the forward and the backward pass for such an image;
            None: not known.
        """
        return None

    # -- steps and phases --------------------------------------------------

    @property
    def step(self) -> int:
        """The run's global iteration."""
        return self._step

    def begin_step(self, step: int) -> None:
        """Be told the iteration; called before the losses of each.

        Args:
            step: The run's global iteration.
        """
        self._step = step

    def phase(self) -> Phase | None:
        """The phase at ``self.step``; None where everything learns.

        A function of the step alone, so a resumed run goes on where it was.
        """
        return None

    @property
    def min_iters(self) -> int:
        """How many iterations a run must exceed for its last phase to come."""
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
        # Optional, so not abstract: `set_up_inner` asks for it when built.
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
                    'leave `build_inner` out.'
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

        Gradients are taken by ``autograd.grad`` for the inner parameters
        alone, so neither the student's gradients nor DDP's hooks notice.

        Args:
            student_feats: Features by source.
            teacher_feats: The teacher's.
            data_samples: The batch's ground truth and meta data.
            rerun: The student once more on this batch; None in pre-training.
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
        """Names of the predictions it offers beside the student's own."""
        return ()

    def predict(
        self,
        modes: tuple[str, ...],
        *,
        student: nn.Module,
        student_feats: Features,
        data_samples: list,
    ) -> dict[str, list]:
        """Predictions of a batch in several modes, features shared.

        Args:
            modes: Some of :meth:`inference_modes`.
            student: The student.
            student_feats: Features by source.
            data_samples: Meta data, without predictions. Not to be written
                to.

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
            options: What the method offers.
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
            Weights by the key of a loss, in which ``*`` stands for anything;
            all terms or, where the method does not say, none.
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

        Only then is a schedule without a term an error.

        Args:
            step: The run's global iteration.
        """
        return True

    def scheduled(self, losses: dict[str, Any], step: int) -> dict[str, Any]:
        """Apply the schedules to the terms of one step.

        Raises:
            ValueError: A schedule for a term that does not exist.
        """
        factors = dict.fromkeys(losses, 1.0)
        for pattern, schedule in self.schedules.items():
            keys = [
                key for key in fnmatch.filter(losses, pattern) if 'loss' in key
            ]
            if not keys and self.is_complete(step):
                raise ValueError(
                    f'`schedules` of {type(self).__name__} names {pattern!r}, '
                    f'which is none of its losses: {sorted(losses)}.'
                )
            for key in keys:
                factors[key] *= schedule(step)
        return {
            key: value if factors[key] == 1 else factors[key] * value
            for key, value in losses.items()
        }
