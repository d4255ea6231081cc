"""IEKDDistiller: split, factors and losses, put together."""

from typing import Any

import torch
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ...core import BaseDistiller, Features, MeasuredPair, Plan
from ...core.utils import broadcast_buffers
from ...layers import levels_of
from ...registry import MODELS
from .losses import IELoss, attention_map, margin_relu, similarity
from .parts import (
    ChannelSplit,
    FactorAutoEncoder,
    FactorCoder,
    OverLevels,
    Regressor,
)

PARTS = ('inherit', 'explore')


@MODELS.register_module()
class IEKDDistiller(BaseDistiller):
    """Inheritance and Exploration Knowledge Distillation.

        f_inh, f_exp = split(f_S)                 the student's channels
        variant ft:  F_T = Enc_T(f_T),  F_inh = Enc_inh(f_inh),
                     F_exp = Enc_exp(f_exp)
        L = mean_l [ w_inh * d(F_inh, F_T) - w_exp * d(F_exp, F_T) ]

    is added to the student's own losses; d is bounded, see ``IELoss``. Enc_T
    is the encoder of an auto-encoder of the *teacher's* feature, trained by

        L_rec = mean |f_T - Dec_T(Enc_T(f_T))|

    for ``pretrain_iters`` iterations, while the student does not change, and
    then frozen. The student's encoders are trained with the student.

    Variants, by what replaces the encoders:

    - 'ft' (IE-FT): as above.
    - 'at' (IE-AT): the attention map sum_c f_c^2; nothing to train.
    - 'od' (IE-OD): a 1x1 convolution and norm on the student's parts, the
      margin ReLU on the teacher's feature, OFD's partial distance. For
      features before an activation, such as a pyramid.

    Source: IE-KD, Huang et al., CVPR 2021, arXiv 2107.00181. 'ft' is the
    arithmetic of the [official code], which calls the network that is split
    "teacher" and the one that it learns from "student": here the student is
    split. 'at' and 'od' are in the [paper]; their code was not released, so
    their details are [inference]. Levels of a pyramid are [ours].

    Args:
        source: Module whose output is distilled, maps ``(N, C, H, W)``; of
            several names all outputs are levels. In a classifier 'backbone',
            because its neck pools [official code].
        variant: 'ft', 'at' or 'od'.
        split: Arguments of ``ChannelSplit`` other than the channels: halves
            as they stand are [official code].
        factor_channels: F of the factors ('ft' only). None: half the
            teacher's channels, as in the [official code]'s CIFAR pair.
        share_levels: One coder for all levels (with norms of their own)
            instead of one per level. [ours]
        loss: Arguments of ``IELoss``. The measure of 'od' is 'partial', else
            'norm'.
        pretrain_iters: Iterations at the start of the run in which only the
            auto-encoder is trained; afterwards it is frozen. 30 epochs are
            [official code]. 0: no such phase, it is trained in every
            iteration [ours]; for teachers that change, as in IE-DML.
        optimizer: The auto-encoder's, at a constant rate. SGD with lr 0.1,
            momentum 0.9, Nesterov and weight decay 5e-4 is [official code].
        teacher: Name of the teacher.
        schedules: Schedules of ``loss_iekd_inherit`` and
            ``loss_iekd_explore``; see ``BaseDistiller``. None: constant
            weights, as in the released YAML.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Features that are not maps, different numbers of levels in
            student and teacher, or settings that the variant does not have.
    """

    VARIANTS = ('ft', 'at', 'od')

    def __init__(
        self,
        source: str | list | dict = 'neck',
        variant: str = 'ft',
        split: dict | None = None,
        factor_channels: int | None = None,
        share_levels: bool = False,
        loss: dict | None = None,
        pretrain_iters: int = 0,
        optimizer: dict | None = None,
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(source, teacher, schedules, init_cfg)
        if variant not in self.VARIANTS:
            raise ValueError(
                f'`variant` must be one of {self.VARIANTS}, but got '
                f'{variant!r}.'
            )
        if variant != 'ft':
            for key, value in dict(
                factor_channels=factor_channels,
                pretrain_iters=pretrain_iters,
                optimizer=optimizer,
            ).items():
                if value:
                    raise ValueError(
                        f'`{key}` is for the auto-encoder, which only '
                        f"variant 'ft' has, but the variant is {variant!r}. "
                        'Omit it.'
                    )
        if pretrain_iters < 0:
            raise ValueError(
                '`pretrain_iters` must not be negative, but got '
                f'{pretrain_iters}.'
            )
        self.variant = variant
        self.factor_channels = factor_channels
        self.share_levels = share_levels
        self.pretrain_iters = pretrain_iters
        self.freeze_inner = pretrain_iters > 0
        self._split_cfg = dict(split or {})
        self._optimizer_cfg = optimizer or dict(
            type='SGD', lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        own = dict(measure='partial') if variant == 'od' else {}
        self.loss_terms = IELoss(**{**own, **(loss or {})})
        self.splits: nn.ModuleList
        self.encoders: nn.ModuleDict

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """On maps, also in a classifier, as in the [official code].

        Without a pre-training phase, which would need a longer schedule than
        the student's own.
        """
        match = pair.match(maps=True)
        return Plan(dict(type='era_mm.IEKDDistiller', **match.config()), match)

    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Split the student's channels and build the coders."""
        maps = levels_of(student_feats, self.student_sources)
        targets = levels_of(teacher_feats, self.teacher_sources)
        for owner, feats, sources in (
            ('student', maps, self.student_sources),
            ('teacher', targets, self.teacher_sources),
        ):
            for feat in feats:
                if feat.dim() != 4:
                    raise ValueError(
                        'IE-KD needs feature maps (N, C, H, W), but the '
                        f'{owner} gives {tuple(feat.shape)} at {sources}. '
                        "Choose a source before pooling: source='backbone' "
                        'in a classifier.'
                    )
        if len(maps) != len(targets):
            raise ValueError(
                'Student and teacher must have the same number of levels, '
                f'but the student has {len(maps)} at {self.student_sources} '
                f'{[tuple(m.shape) for m in maps]} and the teacher '
                f'{len(targets)} at {self.teacher_sources} '
                f'{[tuple(t.shape) for t in targets]}. Choose other sources, '
                'or give both necks the same `num_outs`.'
            )
        self.splits = nn.ModuleList(
            ChannelSplit(m.shape[1], **self._split_cfg) for m in maps
        )
        self._teacher_channels = [t.shape[1] for t in targets]
        self._factors = [
            self.factor_channels or max(channels // 2, 1)
            for channels in self._teacher_channels
        ]
        self.encoders = nn.ModuleDict()
        # Only what is used: a part without channels has no term.
        self._parts = [
            part
            for part in PARTS
            if all(len(self._index(split, part)) for split in self.splits)
        ]
        if self.variant == 'at':
            return
        for part in self._parts:
            self.encoders[part] = OverLevels(
                FactorCoder if self.variant == 'ft' else Regressor,
                [len(self._index(split, part)) for split in self.splits],
                self._factors
                if self.variant == 'ft'
                else self._teacher_channels,
                self.share_levels,
            )

    @staticmethod
    def _index(split: Any, part: str) -> Tensor:
        return getattr(split, f'{part}_index')

    # -- the teacher's auto-encoder ----------------------------------------

    def build_inner(
        self,
    ) -> tuple[nn.Module, torch.optim.Optimizer] | None:
        """The auto-encoder of the teacher's feature; 'ft' only."""
        if self.variant != 'ft':
            return None
        coder = FactorAutoEncoder(
            self._teacher_channels, self._factors, self.share_levels
        )
        optimizer = OPTIMIZERS.build(
            dict(self._optimizer_cfg, params=coder.parameters())
        )
        return coder, optimizer

    def inner_loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> Tensor:
        """L_rec, the mean over levels of mean |f_T - R(f_T)|.

        L1 is [official code]; the paper writes the squared L2 norm.
        """
        assert self.inner is not None
        feats = levels_of(teacher_feats, self.teacher_sources)
        self.inner.train()
        _, rebuilt = self.inner(feats)
        errors = [
            (f - r).abs().mean() for f, r in zip(feats, rebuilt, strict=True)
        ]
        return torch.stack(errors).mean()

    def _targets(self, feats: list[Tensor]) -> list[Tensor]:
        """The targets of the student's parts; constants."""
        if self.variant == 'at':
            return [attention_map(f) for f in feats]
        if self.variant == 'od':
            return [margin_relu(f) for f in feats]
        assert self.inner is not None
        if self.inner.training:
            self.inner.eval()
            broadcast_buffers(self.inner)
        with torch.no_grad():
            return self.inner.encoder(feats)

    # -- losses ------------------------------------------------------------

    def _encode(self, part: str, feats: list[Tensor]) -> list[Tensor]:
        if self.variant == 'at':
            return [attention_map(f) for f in feats]
        return self.encoders[part](feats)

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_iekd_inherit``, ``loss_iekd_explore``.

        Also logged: ``iekd_cos_inherit`` and ``iekd_cos_explore``, the mean
        cosine between a part's factor and the teacher's.
        """
        maps = levels_of(student_feats, self.student_sources)
        targets = self._targets(levels_of(teacher_feats, self.teacher_sources))
        parts = [split(m) for split, m in zip(self.splits, maps, strict=True)]
        losses: dict[str, Tensor] = {}
        for index, part in enumerate(PARTS):
            if part not in self._parts:
                continue
            factors = self._encode(part, [pair[index] for pair in parts])
            pairs = [
                on_common_grid(student_feat=s, teacher_feat=t)
                for s, t in zip(factors, targets, strict=True)
            ]
            term = getattr(self.loss_terms, part)
            for key, measure in (
                (f'loss_iekd_{part}', term),
                (f'iekd_cos_{part}', similarity),
            ):
                values = [
                    measure(student_factor=s, teacher_factor=t)
                    for s, t in pairs
                ]
                losses[key] = torch.stack(values).mean()
        return losses

    def loss_weights(self) -> dict[str, float]:
        """Weights of the parts that have channels."""
        return {
            f'loss_iekd_{part}': getattr(self.loss_terms, f'{part}_weight')
            for part in self._parts
        }


def on_common_grid(
    *, student_feat: Tensor, teacher_feat: Tensor
) -> tuple[Tensor, Tensor]:
    """Resize two maps to the smaller height and the smaller width.

    Bilinear; maps of equal size are not changed.

    Source: [inference]; the official pairs have equal sizes.
    """
    feats = (student_feat, teacher_feat)
    size = [min(feat.shape[dim] for feat in feats) for dim in (2, 3)]
    first, second = (
        feat
        if list(feat.shape[2:]) == size
        else interpolate(feat, size, mode='bilinear', align_corners=False)
        for feat in feats
    )
    return first, second
