"""A method's plan for a pair of models that was run and measured.

``tools/make_config.py`` measures the pair and asks the method for its plan,
so methods need not import the engine.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class MeasuredModel(Protocol):
    """One of the models of a :class:`MeasuredPair`."""

    #: What messages call it.
    name: str
    model: nn.Module
    #: Names of the classes it was trained for, where known.
    classes: tuple[str, ...] | None
    #: Outputs of its modules for the trial image, by module.
    feats: dict[str, tuple[Tensor, ...]]


class FeatureMatch(Protocol):
    """Which outputs of two models are paired."""

    @property
    def resample(self) -> dict[str, dict]:
        """The ``resample`` of a ``source``; empty where none is needed."""

    def config(self) -> dict[str, Any]:
        """``source`` as a distiller takes it; empty if it is 'neck'."""

    def feats(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Features of one image as the distiller would get them."""

    def unused(self) -> list[str]:
        """Outputs of either model without a partner."""


class MeasuredPair(Protocol):
    """What a method sees of two models that were run on one image.

    ``era_mm.engine.pairing.Pair`` is one.
    """

    #: Whether they are two detectors; otherwise two classifiers.
    is_detector: bool

    @property
    def student(self) -> MeasuredModel:
        """The one to be trained."""

    @property
    def teacher(self) -> MeasuredModel:
        """The one to learn from."""

    def match(
        self,
        *,
        maps: bool = False,
        encoder: bool = False,
        cover: bool = False,
    ) -> FeatureMatch:
        """Find what to distil; see ``era_mm.engine.pairing.Pair.match``."""

    def match_stages(self, *, pooled: bool = False) -> FeatureMatch:
        """Pair the stages of two classifiers; see ``Pair.match_stages``."""


class Plan(NamedTuple):
    """A method's plan for a pair.

    Args:
        distiller: The config of the distiller.
        match: The features that it pairs.
        head: What it does with the teacher's head, in one sentence; None for
            methods that never use it.
        modes: Inference modes to report, as far as the built model offers
            them. 'S', the student alone, is for a hook that reports more than
            modes.
        hook: Type of the hook that reports them.
        inherit: Modules of the student that start from the teacher's weights.
    """

    distiller: dict[str, Any]
    match: FeatureMatch
    head: str | None = None
    modes: tuple[str, ...] = ()
    hook: str = 'era_mm.ModesHook'
    inherit: tuple[str, ...] = ()
