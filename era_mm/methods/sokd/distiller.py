"""SoKDDistiller: policy and areas around any other distiller."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn

from ...core import (
    BaseDistiller,
    Features,
    MeasuredPair,
    Plan,
    Unregistered,
)
from ...layers import full_precision
from ...registry import MODELS
from .adapters import Adapters, check_shapes
from .areas import Areas
from .dafa import DAFA
from .dam import DAM
from .search import SearchingDistiller

AREAS_FOR = ('term', 'base')


@MODELS.register_module()
class SoKDDistiller(SearchingDistiller):
    """Student-oriented knowledge distillation around another distiller.

        F_t'  = DAFA(F_t)                        the refined teacher
        upper:  min over the policy   L_aug = 1/2 mean (F_t' - Phi(F_s))^2
        lower:  min over the student  L_student + L_base(F_s, F_t')
                + agree_weight * L_D + area_weight * L_DA

    The wrapped distiller gets the refined features instead of the teacher's,
    and its losses keep their names. A distiller that applies the teacher's
    head (ERA) also gets the teacher's own features, as ``own_feats`` of its
    ``loss``: the head is only reliable on these, and the normalised space is
    measured on them. [ours] In each iteration the policy first takes a step of
    its own optimiser, with the current student. Then the student is trained on
    the features that the new policy makes of the same batch.

    Phi is a 1x1 convolution at each level. It is trained by L_D and L_DA, and
    by ``loss_sokd_adapter = mean (Phi(sg F_s) - F_t)^2``, which trains only
    Phi. So it maps to the teacher's space also outside areas and without DAM.
    Its target is the teacher's own feature, because a policy could satisfy a
    refined target by erasing the feature. [ours]

    If the policy has only the identity, and without DAM, the result equals
    that of the wrapped distiller, bit for bit.

    Source: SoKD, arXiv 2409.18785, read in abstract and captions and in
    readers' notes; there is no public code. Two plug-ins around any feature
    loss are [paper]; the objective is [paper, by readers' notes]; first
    order, its order of steps and all defaults are [inference]. See ``DAFA``
    and ``DAM``.

    Args:
        base: The wrapped distiller's config, with source and teacher; one
            that compares features. None: ``FeatureImitationDistiller``,
            FitNet.
        dafa: Arguments of ``DAFA``; True: its defaults; False: the teacher's
            features are not changed.
        dam: Arguments of ``DAM`` other than the channels; True: its defaults;
            False: no areas, no heads.
        areas: Use of the areas: 'term', L_DA; or 'base', the wrapped
            distiller gets them as ``area_masks`` instead of L_DA. [ours]
        adapter: False: no Phi, for features of equal channels.
        adapter_weight: Weight of ``loss_sokd_adapter``. [ours]
        search_share: Share of the run, from its start (or from the end of the
            wrapped distiller's pre-training) in which the policy is trained;
            afterwards it is frozen. 0.2 is [inference]; too long a search
            overfits [paper, by readers' notes]. Outside an mmengine run the
            search does not end.
        optimizer: The policy's optimiser. Adam, lr 3e-4, betas (0.5, 0.999)
            is [DADA code]; no weight decay (1e-3 there) is [ours]: Adam would
            shrink beta and m of all sub-policies that were not drawn,
            independently of the loss.
        unroll_lr: Length of the student's step that the policy looks ahead
            (second order, by finite differences); see ``unrolled_gradients``.
            Four more passes of the student in an iteration that searches.
            None: first order.
        schedules: Schedules of its own terms and of the wrapped distiller's,
            in addition to the latter's own; see ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        TypeError: ``base`` is not a distiller with a teacher.
        ValueError: A wrapped distiller that compares predictions alone,
            levels that do not fit, or settings without effect.
    """

    def __init__(
        self,
        base: dict | None = None,
        dafa: dict | bool = True,
        dam: dict | bool = True,
        areas: str = 'term',
        adapter: bool = True,
        adapter_weight: float = 1.0,
        search_share: float = 0.2,
        optimizer: dict | None = None,
        unroll_lr: float | None = None,
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        built = MMENGINE_MODELS.build(
            copy.deepcopy(
                base or dict(type='era_mm.FeatureImitationDistiller')
            )
        )
        if not isinstance(built, BaseDistiller) or not built.needs_teacher:
            raise TypeError(
                'SoKD refines what a distiller learns from its teacher, so '
                '`base` must be a distiller with a teacher, but is '
                f'{type(built).__name__}.'
            )
        if not built.feature_pairs:
            name = type(built).__name__
            raise ValueError(
                "SoKD refines the teacher's features, so `base` must compare "
                f'features, but {name} compares predictions alone. Take a '
                f'method on features, and give {name} to the model as another '
                'distiller: distiller=dict(sokd=dict(...), other=dict(...)).'
            )
        super().__init__(
            built, search_share, optimizer, unroll_lr, schedules, init_cfg
        )
        if areas not in AREAS_FOR:
            raise ValueError(
                f'`areas` must be one of {AREAS_FOR}, but got {areas!r}.'
            )
        if adapter_weight <= 0:
            raise ValueError(
                f'`adapter_weight` must be above 0, but got {adapter_weight}. '
                'To use no adapter, set adapter=False.'
            )
        self._dafa = self._arguments(dafa)
        self._dam = self._arguments(dam)
        self.areas_for = areas
        self._has_adapter = adapter
        self.adapter_weight = adapter_weight
        taken = inspect.signature(built.loss).parameters
        self._takes_masks = 'area_masks' in taken
        self._takes_own = 'own_feats' in taken
        self._check_masks()
        self.dam: DAM | None = None

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """Wraps FitNet, on maps, also in a classifier."""
        match = pair.match(maps=True)
        base = dict(type='era_mm.FeatureImitationDistiller', **match.config())
        return Plan(dict(type='era_mm.SoKDDistiller', base=base), match)

    @staticmethod
    def _arguments(value: dict | bool) -> dict | None:
        if isinstance(value, Mapping):
            return dict(value)
        return {} if value else None

    def _check_masks(self) -> None:
        if self.areas_for != 'base':
            return
        if self._dam is None or not self._dam.get('area_weight', 1.0):
            raise ValueError(
                "`areas='base'` needs areas, but there are none: set `dam` "
                'with an `area_weight` above 0.'
            )
        if not self._takes_masks:
            raise ValueError(
                f'{type(self.base).__name__} does not take areas: its `loss` '
                "has no `area_masks`. Set areas='term'."
            )

    # -- the pair ----------------------------------------------------------

    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Prepare the wrapped distiller, then build adapters and heads."""
        self.base.prepare(
            student=student,
            teacher=teacher,
            student_feats=student_feats,
            teacher_feats=teacher_feats,
        )
        if self._dafa is not None:
            policy = DAFA(**self._dafa)
            # A policy that cannot change anything need not be trained.
            if not policy.is_identity:
                self._policy = Unregistered(policy)
        if self.policy is None and self._dam is None:
            return
        maps, targets = self._levels(student_feats, teacher_feats)
        shapes = [
            [tuple(feat.shape) for feat in feats] for feats in (maps, targets)
        ]
        check_shapes(*shapes)
        if self._has_adapter:
            self.adapters = Adapters(*shapes)
        elif [s[1] for s in shapes[0]] != [s[1] for s in shapes[1]]:
            raise ValueError(
                '`adapter=False` needs equal channels, but the student has '
                f'{shapes[0]} and the teacher {shapes[1]}. Leave the adapter '
                'on.'
            )
        if self._dam is not None:
            self._build_dam(student, shapes[1])

    def _build_dam(
        self, student: nn.Module, shapes: list[tuple[int, ...]]
    ) -> None:
        assert self._dam is not None
        if any(len(shape) != 4 for shape in shapes):
            raise ValueError(
                'DAM finds areas on feature maps (N, C, H, W), but the '
                f'teacher has {shapes} at {self.teacher_sources}. Choose a '
                "source before pooling (source='backbone' in a classifier), "
                'or set dam=False.'
            )
        dam = DAM([shape[1] for shape in shapes], **self._dam)
        is_detector = any(
            hasattr(student, name)
            for name in ('bbox_head', 'rpn_head', 'roi_head')
        )
        if dam.anchor == 'boxes' and not is_detector:
            raise ValueError(
                "`dam.anchor='boxes'` needs ground-truth boxes, but the "
                f'student is a {type(student).__name__}. Set '
                "anchor='attention'."
            )
        self.dam = dam

    # -- losses ------------------------------------------------------------

    def _terms(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        refined_feats: Features,
        data_samples: list,
        adapter_weights: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The wrapped distiller's losses and those of adapter and DAM."""
        masks = None
        own: dict[str, Tensor] = {}
        if self.policy is not None or self.dam is not None:
            maps, targets = self._levels(student_feats, teacher_feats)
            _, refined = self._levels(student_feats, refined_feats)
            if self.adapters is not None:
                fit = self.adapters.fit(maps, targets, adapter_weights)
                own['loss_sokd_adapter'] = self.adapter_weight * fit
            if self.dam is not None:
                masks = self._add_dam_terms(
                    own,
                    adapted=self._adapt(maps, adapter_weights),
                    targets=targets,
                    refined=refined,
                    data_samples=data_samples,
                )
        options: dict[str, Any] = {}
        if self.areas_for == 'base':
            options['area_masks'] = masks
        if self._takes_own:
            options['own_feats'] = teacher_feats
        losses = self.base.loss(
            student_feats=student_feats,
            teacher_feats=refined_feats,
            data_samples=data_samples,
            **options,
        )
        return self.base.scheduled(losses, self.step) | own

    def _add_dam_terms(
        self,
        losses: dict[str, Tensor],
        *,
        adapted: list[Tensor],
        targets: list[Tensor],
        refined: list[Tensor],
        data_samples: list,
    ) -> list[Tensor] | None:
        """Add DAM's losses; returns the masks by level, if there are areas."""
        assert self.dam is not None
        student = self.dam.predict(adapted)
        teacher = self.dam.predict(refined)
        losses |= self.dam.losses(
            student=student,
            teacher=teacher,
            teacher_feats=targets,
            data_samples=data_samples,
        )
        if not self.dam.area_weight:
            return None
        areas = self.dam.areas(student, teacher)
        if self.areas_for == 'term':
            losses |= self.dam.area_losses(
                student_feats=adapted, teacher_feats=refined, areas=areas
            )
        masks = [level.masks for level in areas]
        shares = [mask.detach().amax(1).mean() for mask in masks]
        losses['sokd_area_share'] = torch.stack(shares).mean()
        return masks

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """The wrapped distiller's losses, and ``loss_sokd_*``.

        ``loss_sokd_adapter``, ``_agree``, ``_area`` and ``_anchor``, those
        that are active. Logged for the policy: ``sokd_consistency`` (L_aug
        after its step), ``sokd_norm_ratio`` (||F_t'|| / ||F_t||, small for a
        policy that erases), ``sokd_entropy``, ``sokd_gate`` and
        ``sokd_magnitude`` (see ``DAFA.summary``), ``sokd_searching`` (0 or
        1); of the areas ``sokd_area_share``, the share of cells in them.
        """
        with torch.no_grad():
            refined = self._refine(teacher_feats)
        losses = self._terms(
            student_feats=student_feats,
            teacher_feats=teacher_feats,
            refined_feats=refined,
            data_samples=data_samples,
        )
        if self.policy is not None:
            losses |= self._policy_log(student_feats, teacher_feats, refined)
        return losses

    def loss_weights(self) -> dict[str, float]:
        """Weights of the wrapped distiller, the adapter and DAM."""
        weights = dict(self.base.loss_weights())
        if self.adapters is not None:
            weights['loss_sokd_adapter'] = self.adapter_weight
        if self.dam is not None:
            weights |= self.dam.loss_weights()
            if self.areas_for != 'term':
                weights.pop('loss_sokd_area', None)
        return weights

    @torch.no_grad()
    def _policy_log(
        self,
        student_feats: Features,
        teacher_feats: Features,
        refined_feats: Features,
    ) -> dict[str, Tensor]:
        assert self.policy is not None
        maps, targets = self._levels(student_feats, teacher_feats)
        _, refined = self._levels(student_feats, refined_feats)
        before, after = (
            torch.stack([full_precision(f).norm() for f in feats]).norm()
            for feats in (targets, refined)
        )
        summary = self.policy.summary()
        return {
            'sokd_consistency': self._consistency(self._adapt(maps), refined),
            'sokd_norm_ratio': after / before.clamp(min=1e-12),
            'sokd_searching': before.new_tensor(float(self.is_searching)),
            **{f'sokd_{key}': value for key, value in summary.items()},
        }

    @torch.no_grad()
    def areas_of(
        self, *, student_feats: Features, teacher_feats: Features
    ) -> list[Areas]:
        """The areas of a batch by level, from features that are not refined.

        Args:
            student_feats: F_s by source.
            teacher_feats: F_t by source.

        Raises:
            RuntimeError: There is no DAM, or it has no areas.
        """
        if self.dam is None or not self.dam.area_weight:
            raise RuntimeError(
                'This distiller has no areas: `dam` is off, or its '
                '`area_weight` is 0.'
            )
        maps, targets = self._levels(student_feats, teacher_feats)
        return self.dam.areas(
            self.dam.predict(self._adapt(maps)), self.dam.predict(targets)
        )
