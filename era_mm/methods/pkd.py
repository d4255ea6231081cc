"""PKD: the teacher's maps imitated up to the scale of their channels."""

from ..core import MeasuredPair, Plan
from ..registry import MODELS
from .feature_imitation import FeatureImitationDistiller


@MODELS.register_module()
class PKDDistiller(FeatureImitationDistiller):
    """Distillation by the Pearson correlation of channels.

        L = loss_weight * sum_l 1/2 mean (n(P_l) - n(T_l))^2

    n gives each channel mean 0 and deviation 1 over batch and positions
    (:func:`standardise`), so the distance is 1 - r by channel. It is
    ``FeatureImitationDistiller`` with ``measure='pearson'``.

    Source: PKD, arXiv 2207.02039, with the settings of its recipes in
    mmrazor: over the first four levels of a pyramid, 6 per level for Faster
    R-CNN, 10 for one-stage detectors (RetinaNet, RepPoints), without
    connectors. ``plan_for`` writes 10 for detectors without a RoI head.
    Connectors where channels differ, and classifiers, are [ours].

    Args:
        source: Module whose output is imitated; several are levels.
        loss_weight: Weight of each level.
        connector: 1x1 convolutions. True: at all levels; False: none, for
            features of equal channels; None: only where channels differ.
        num_levels: Number of levels to use, from the first. None: up to four.
        teacher: Name of the teacher.
        schedules: Schedules of ``loss_imitation``; see ``BaseDistiller``.
        init_cfg: As in mmengine.

    Shape:
        - features: L of ``(N, C, H, W)`` or ``(N, C)``

    Raises:
        ValueError: Features that do not fit, or more levels than exist.
    """

    #: Published for RetinaNet and RepPoints.
    ONE_STAGE_WEIGHT = 10.0

    def __init__(
        self,
        source: str | list | dict = 'neck',
        loss_weight: float = FeatureImitationDistiller.PKD_WEIGHT,
        connector: bool | None = None,
        num_levels: int | None = None,
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(
            source,
            measure='pearson',
            loss_weight=loss_weight,
            connector=connector,
            num_levels=num_levels,
            teacher=teacher,
            schedules=schedules,
            init_cfg=init_cfg,
        )

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """On the levels of the pair, with the published weight."""
        plan = super().plan_for(pair)
        is_one_stage = pair.is_detector and not hasattr(
            pair.student.model, 'roi_head'
        )
        plan.distiller['loss_weight'] = (
            cls.ONE_STAGE_WEIGHT if is_one_stage else cls.PKD_WEIGHT
        )
        return plan
