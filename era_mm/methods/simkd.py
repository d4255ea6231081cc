"""SimKD: the student's features through a projector and the teacher's head.

Legend: N batch, C_s and C_t channels of student and teacher.
"""

import copy
from collections.abc import Sequence

import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, mse_loss

from ..core import BaseDistiller, Features, MeasuredPair, Plan, Unregistered
from ..core.classes import why_other_classes
from ..core.phase import Phase
from ..heads import why_not_reused
from ..layers import full_precision, spare_lone_values
from ..registry import MODELS

#: Place of the projector in the student's config.
PROJECTOR = 'neck.0'


@MODELS.register_module()
class SimKDProjector(BaseModule):
    """Projects the student's last map to the teacher's channels.

    It is kept at inference.

        1x1 to C_t / factor, BN, ReLU, 3x3, BN, ReLU, 1x1 to C_t, BN, ReLU

    Source: SimKD, Chen et al., arXiv 2203.14001, and its [official code].

    Args:
        in_channels: C_s.
        out_channels: C_t.
        factor: Ratio of C_t to the width of the middle layers.
        init_cfg: As in mmengine.

    Shape:
        - feats: maps, the last of them ``(N, C_s, H, W)``
        - out: one map ``(N, C_t, H, W)``
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        factor: int = 2,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        middle = max(out_channels // factor, 1)
        layers: list[nn.Module] = []
        for first, last, size in (
            (in_channels, middle, 1),
            (middle, middle, 3),
            (middle, out_channels, 1),
        ):
            layers += [
                nn.Conv2d(first, last, size, padding=size // 2, bias=False),
                nn.BatchNorm2d(last),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers)
        # The last batch of an epoch may have only one image.
        spare_lone_values(self.layers)

    def forward(self, feats: Sequence[Tensor] | Tensor) -> tuple[Tensor]:
        """The last map, projected."""
        feat = feats if isinstance(feats, Tensor) else feats[-1]
        return (self.layers(feat),)


def projection_loss(*, student_feat: Tensor, teacher_feat: Tensor) -> Tensor:
    """Mean squared error of two maps, the larger pooled to the smaller.

    Source: SimKD, arXiv 2203.14001, eq. 4; the mean and the pooling are
    [official code], which pools before the projector if the student's map is
    larger. Here it is pooled after the projector [ours], because at inference
    there is no teacher that defines the size.

    Shape:
        - student_feat, teacher_feat: ``(N, C_t, H, W)``
        - out: scalar
    """
    maps = [full_precision(feat) for feat in (student_feat, teacher_feat)]
    height, width = (min(m.shape[dim] for m in maps) for dim in (2, 3))
    size = (height, width)
    student, teacher = (
        one if tuple(one.shape[2:]) == size else adaptive_avg_pool2d(one, size)
        for one in maps
    )
    return mse_loss(student, teacher)


@MODELS.register_module()
class SimKDDistiller(BaseDistiller):
    """Reuses the teacher's classifier, for classifiers.

        L = loss_weight * MSE(P(f_S), f_T)

    is the only loss; labels are not used. The trained, saved and deployed
    model is the given student with the projector P before its pooling and the
    teacher's frozen classifier, an ordinary host model. Its predictions are
    the student's own; its config needs ``era_mm`` for P.

    ``inherit=['head']`` of ``era_mm.Distillation`` copies the classifier's
    weights.

    Source: SimKD, arXiv 2203.14001. Weight 1, factor 2 and features before
    pooling are [official code].

    Args:
        channels: C_s and C_t, channels of the backbones' last maps.
        factor: Ratio of C_t to the width of the projector's middle layers.
        loss_weight: Weight of the loss.
        teacher: Name of the teacher.
        schedules: Schedules of ``loss_simkd``; see ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Models that are not classifiers with a pooling neck and
            heads of equal shape, or other channels.
        RuntimeError: When training begins, the student's head does not have
            the teacher's weights.
    """

    has_phases = True
    #: The student has the teacher's classifier.
    needs_frozen_teacher = True

    def __init__(
        self,
        channels: Sequence[int],
        factor: int = 2,
        loss_weight: float = 1.0,
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        source = dict(student=PROJECTOR, teacher='backbone')
        super().__init__(source, teacher, schedules, init_cfg)
        self.channels = tuple(channels)
        if len(self.channels) != 2:
            raise ValueError(
                "`channels` must be two numbers, of the student's and of the "
                f"teacher's last map, but got {channels}."
            )
        self.factor, self.loss_weight = factor, loss_weight
        self._heads: tuple[Unregistered, ...] = ()
        self._is_checked = False

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """For two classifiers that pool the last map of a backbone.

        Raises:
            ValueError: The pair is of another kind.
        """
        student, teacher = pair.student, pair.teacher
        reason = why_not_reused(student.model, teacher.model)
        reason = reason or why_other_classes(student.classes, teacher.classes)
        if pair.is_detector:
            reason = 'it is for classifiers'
        else:
            for member in (student, teacher):
                dims = [
                    [feat.dim() for feat in member.feats.get(name, ())]
                    for name in ('backbone', 'neck')
                ]
                if dims[0][-1:] != [4] or dims[1][-1:] != [2]:
                    reason = f'{member.name} does not pool maps in its neck'
        if reason is not None:
            raise ValueError(
                f'SimKD cannot pair these: {reason}. Take another method.'
            )
        match = pair.match(maps=True)
        halves = [feats[-1].shape[1] for feats in match.feats()]
        return Plan(
            dict(type=f'era_mm.{cls.__name__}', channels=halves),
            match,
            head="the teacher's frozen classifier replaces the student's",
            inherit=('head',),
        )

    def student_config(self, config: ConfigDict) -> ConfigDict:
        """The given student with a projector and the teacher's classifier."""
        if not isinstance(config.get('neck'), dict) or 'head' not in config:
            raise ValueError(
                'SimKD needs a classifier with a pooling `neck` and a `head`, '
                f'but {config.get("type")} has {sorted(config)}.'
            )
        config = copy.deepcopy(config)
        projector = dict(
            type='era_mm.SimKDProjector',
            in_channels=self.channels[0],
            out_channels=self.channels[1],
            factor=self.factor,
        )
        config.neck = [projector, config.neck]
        config.head.in_channels = self.channels[1]
        return config

    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Check that the classifier fits."""
        assert teacher is not None
        shapes = [
            {key: tuple(value.shape) for key, value in m.state_dict().items()}
            for m in (student.head, teacher.head)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "SimKD puts the teacher's classifier into the student, but "
                f'its shape is {shapes[1]}, and the student needs '
                f'{shapes[0]}. Correct `channels`, and give both the same '
                'kind of head and the same classes.'
            )
        self._heads = (Unregistered(student.head), Unregistered(teacher.head))

    @property
    def uses_predictions(self) -> bool:
        """Always: the teacher's classifier is the student's."""
        return True

    def phase(self) -> Phase:
        """The only phase: no labels, a frozen classifier."""
        return Phase('simkd', frozen=('head',), task=False)

    def _check_head(self) -> None:
        own, theirs = (head.module.state_dict() for head in self._heads)
        if any(not torch.equal(own[key], theirs[key]) for key in theirs):
            raise RuntimeError(
                "The student's head does not have the teacher's weights, "
                "which SimKD needs. Set inherit=['head'] in the "
                'model (era_mm.Distillation), and load no other head.'
            )
        self._is_checked = True

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_simkd``."""
        if not self._is_checked:
            self._check_head()
        loss = projection_loss(
            student_feat=student_feats[PROJECTOR][-1],
            teacher_feat=teacher_feats['backbone'][-1],
        )
        return {'loss_simkd': self.loss_weight * loss}

    def loss_weights(self) -> dict[str, float]:
        """Weight of the only term."""
        return {'loss_simkd': self.loss_weight}
