"""A distiller around another one, whose slots it hands on."""

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
    """

    def __init__(
        self,
        base: BaseDistiller,
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(
            teacher=base.teacher, schedules=schedules, init_cfg=init_cfg
        )
        self.base = base
        self.pretrain_iters = base.pretrain_iters
        self.has_phases = base.has_phases
        self.moved_sources = base.moved_sources
        self._take_sources()

    def _take_sources(self) -> None:
        self.student_sources = self.base.student_sources
        self.teacher_sources = self.base.teacher_sources
        self.pair_connectors = self.base.pair_connectors
        self._connected = self.base._connected

    @property
    def step(self) -> int:
        """The run's global iteration, also the wrapped distiller's."""
        return self.base.step

    @step.setter
    def step(self, value: int) -> None:
        self.base.step = value

    def choose_sources(
        self, *, student: nn.Module, teacher: nn.Module | None
    ) -> None:
        """The wrapped distiller's."""
        self.base.choose_sources(student=student, teacher=teacher)
        self._take_sources()

    def student_config(self, config: ConfigDict) -> ConfigDict:
        """The wrapped distiller's."""
        return self.base.student_config(config)

    def phase(self) -> Phase | None:
        """The wrapped distiller's."""
        return self.base.phase()

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

    def predict(self, modes: tuple[str, ...], **pair: Any) -> dict[str, list]:
        """The wrapped distiller's."""
        return self.base.predict(modes, **pair)

    def export(self, mode: str, **pair: Any) -> HostModel:
        """The wrapped distiller's."""
        return self.base.export(mode, **pair)
