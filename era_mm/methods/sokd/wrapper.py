"""A distiller that wraps another one and forwards its interface."""

from collections.abc import Mapping
from typing import Any

from mmengine.config import ConfigDict
from torch import Tensor, nn

from ...core import BaseDistiller, HostModel, Phase


class WrappingDistiller(BaseDistiller):
    """Has the wrapped distiller's sources, phases and inference modes.

    A subclass defines ``prepare`` and ``loss``, and calls those of ``base``.

    Args:
        base: The wrapped distiller.
        schedules: See ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        ValueError: ``base`` itself wraps another distiller.
    """

    def __init__(
        self,
        base: BaseDistiller,
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        if isinstance(base, WrappingDistiller):
            raise ValueError(
                f'{type(self).__name__} wraps a distiller with losses of its '
                f'own, but `base` is a {type(base).__name__}, which wraps '
                f'{type(base.base).__name__} itself. Give the config of that '
                'one as `base`.'
            )
        super().__init__(
            teacher=base.teacher, schedules=schedules, init_cfg=init_cfg
        )
        self.base: BaseDistiller = base
        self.pretrain_iters = base.pretrain_iters
        self.has_phases = base.has_phases
        self.moved_sources = base.moved_sources
        self.needs_frozen_teacher = base.needs_frozen_teacher
        self._take_sources()

    def _take_sources(self) -> None:
        self.student_sources = self.base.student_sources
        self.teacher_sources = self.base.teacher_sources
        self.connections = self.base.connections

    def begin_step(self, step: int) -> None:
        """Also the wrapped distiller's."""
        super().begin_step(step)
        self.base.begin_step(step)

    def choose_sources(
        self, *, student: nn.Module, teacher: nn.Module | None
    ) -> None:
        """The wrapped distiller's."""
        self.base.choose_sources(student=student, teacher=teacher)
        self._take_sources()

    def student_config(self, config: ConfigDict) -> ConfigDict:
        """The wrapped distiller's."""
        return self.base.student_config(config)

    @property
    def feature_pairs(self) -> tuple[tuple[str, str], ...]:
        """The wrapped distiller's."""
        return self.base.feature_pairs

    @property
    def uses_predictions(self) -> bool:
        """The wrapped distiller's."""
        return self.base.uses_predictions

    def leave_predictions(self, reason: str) -> None:
        """The wrapped distiller's."""
        self.base.leave_predictions(reason)

    def phase(self) -> Phase | None:
        """The wrapped distiller's."""
        return self.base.phase()

    @property
    def min_iters(self) -> int:
        """The wrapped distiller's."""
        return self.base.min_iters

    def uses(self) -> tuple[str, ...]:
        """The wrapped distiller's."""
        return self.base.uses()

    def is_complete(self, step: int) -> bool:
        """The wrapped distiller's."""
        return self.base.is_complete(step)

    def compare(self, **feats: Any) -> Tensor | None:
        """The wrapped distiller's."""
        return self.base.compare(**feats)

    @property
    def predict_sources(self) -> tuple[str, ...]:
        """The wrapped distiller's."""
        return self.base.predict_sources

    def inference_modes(self) -> tuple[str, ...]:
        """The wrapped distiller's."""
        return self.base.inference_modes()

    def absent_modes(self) -> Mapping[str, str]:
        """The wrapped distiller's."""
        return self.base.absent_modes()

    def predict(self, modes: tuple[str, ...], **pair: Any) -> dict[str, list]:
        """The wrapped distiller's."""
        return self.base.predict(modes, **pair)

    def export(self, mode: str, **pair: Any) -> HostModel:
        """The wrapped distiller's."""
        return self.base.export(mode, **pair)
