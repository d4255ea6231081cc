"""ERADistiller: the residual approximation and TWI, put together."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ...core import BaseDistiller, Features, HostModel
from ...core.pairing import Pair, Plan, is_query_based
from ...core.utils import evaluating, preserve_rng
from ...layers import (
    bernoulli_kl_loss,
    dist_loss,
    kl_loss,
    rows_of_levels,
    top_rows,
)
from ...registry import MODELS, explain_unknown_keys
from .export import export_estimate
from .losses import ERALoss, estimates_of, residual_targets
from .mbrnet import MBRNet
from .twi import find_head, mismatch, tower_sources, why_not_reused
from .twi_blend import same_priors
from .twi_heads import (
    DenseTWIHead,
    StudentProposals,
    TWIHead,
    TwoStageTWIHead,
)

#: Maps of more channels, of backbones, would make branches that are several
#: times the student; they are convolved in groups of the width of an FPN.
MAX_FULL_WIDTH = 512
GROUP_WIDTH = 256


@explain_unknown_keys
class LogitTerm:
    """ERA's distillation of class logits.

        'kl', 'dist'   weight * loss of the (N, K) logits; classifiers
        'binary'       weight * tau^2 / R * sum_r sum_c
                           KL(sigmoid(z_t / tau) || sigmoid(z_s / tau));
                       dense detectors

    where r are the ``topk`` anchors of each image that the teacher scores
    highest: most of an image is background, on which both agree. Heads whose
    class scores are no sigmoid logits of their own are refused: softmax,
    probabilities (TOOD), scores that an objectness has to complete (YOLO,
    AutoAssign).

    'binary' is [ours]: a detection form was never released, and with one loss
    on logits less the student's own head hears nothing of the teacher.

    Args:
        kind: 'kl', 'dist' or 'binary'.
        weight: Its weight. 2 is [official code].
        temperature: tau. 1 is [official code].
        source: The student's module that puts out the logits. None: 'head'
            of a classifier, 'bbox_head' of a detector.
        topk: Anchors per image, for 'binary'.

    Raises:
        ValueError: An unknown kind, a weight below 0, a temperature that is
            not above 0, a ``topk`` below 1.
    """

    #: What heads have that tell objects from background apart from the class.
    OBJECTNESS = ('loss_obj', 'loss_conf', 'center_prior')

    KINDS: ClassVar[dict[str, Callable]] = {
        'kl': kl_loss,
        'dist': dist_loss,
        'binary': bernoulli_kl_loss,
    }

    def __init__(
        self,
        kind: str = 'kl',
        weight: float = 2.0,
        temperature: float = 1.0,
        source: str | None = None,
        topk: int = 100,
    ) -> None:
        if kind not in self.KINDS:
            raise ValueError(
                f'`logit.kind` must be one of {sorted(self.KINDS)}, but got '
                f'{kind!r}.'
            )
        if weight < 0 or temperature <= 0 or topk < 1:
            raise ValueError(
                '`logit` needs a weight of at least 0, a temperature above 0 '
                f'and a `topk` of at least 1, but got {weight}, {temperature} '
                f'and {topk}.'
            )
        self.kind, self.weight = kind, weight
        self.temperature, self.topk = temperature, topk
        self.is_dense = kind == 'binary'
        self.source = source or ('bbox_head' if self.is_dense else 'head')

    def problem(
        self,
        *,
        student_logits: Any,
        teacher_logits: Any,
        student_head: nn.Module,
        teacher_head: nn.Module,
    ) -> str | None:
        """Why the logits of a pair cannot be compared, if so."""
        if not self.is_dense:
            return None
        heads = dict(student=student_head, teacher=teacher_head)
        for owner, head in heads.items():
            loss = getattr(head, 'loss_cls', None)
            name = f"the {owner}'s {type(head).__name__}"
            if any(hasattr(head, part) for part in self.OBJECTNESS):
                return f'{name} scores objects apart from their classes'
            if (
                not getattr(loss, 'use_sigmoid', False)
                or getattr(loss, 'activated', False)
                or not getattr(head, 'cls_out_channels', 0)
            ):
                return f'{name} has no sigmoid scores'
        shapes = [
            [tuple(level.shape[1:]) for level in logits]
            for logits in (
                student_logits[: len(teacher_logits)],
                teacher_logits,
            )
        ]
        if shapes[0] != shapes[1]:
            return (
                f'the student scores {shapes[0]} at {self.source!r} and the '
                f'teacher {shapes[1]}: anchors and classes must agree'
            )
        if not same_priors(student_head, teacher_head, teacher_logits):
            return 'the anchors of the two have other sizes or places'
        return None

    def __call__(
        self, *, student_logits: Any, teacher_logits: Any, num_classes: int
    ) -> Tensor:
        """The weighted loss.

        Args:
            student_logits: ``(N, K)``; of a dense head one
                ``(N, A * K, H, W)`` per level, and what else it puts out.
            teacher_logits: The same.
            num_classes: K.
        """
        if not self.is_dense:
            return self.weight * self.KINDS[self.kind](
                student_logits=_full(student_logits),
                teacher_logits=_full(teacher_logits),
                temperature=self.temperature,
            )
        student, teacher = (
            _full(rows_of_levels(logits, num_classes))
            for logits in (
                student_logits[: len(teacher_logits)],
                teacher_logits,
            )
        )
        best = top_rows(teacher, self.topk)
        return self.weight * bernoulli_kl_loss(
            student_logits=student[best].flatten(0, 1),
            target=(teacher[best] / self.temperature).sigmoid().flatten(0, 1),
            temperature=self.temperature,
        )


def _full(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@MODELS.register_module()
class ERADistiller(BaseDistiller):
    """Expandable Residual Approximation.

        u_l  = align_l(P_l)          d_il = branch_i(P_l)
        e_0l = u_l                   e_il = e_(i-1)l + d_il
        L = align_weight * sum_l MSE(u_l, T_l) + twi_weight * H_t(e_0; GT)
          + (1/n) sum_i s_i [ residual_weight * sum_l MSE(d_il, sg r_il)
                              + twi_weight * H_t(e_i; GT) ]

    P and T are the features of student and teacher at ``source``, H_t(e; GT)
    the losses of the teacher's frozen head on an estimate (of its RPN and RoI
    head in a two-stage detector). Added to the student's own losses.

    Source: ERA, arXiv 2508.16050. For classification (``(N, C)`` features) it
    is the arithmetic of the [official code]. The detection form, on feature
    maps and with a detector's heads, is [ours]: the authors' was never
    released. DETR-like detectors get it without TWI: their heads read the
    queries of a decoder.

    Args:
        source: Module whose output is approximated; see ``BaseDistiller``.
        mbrnet: Arguments of ``MBRNet`` other than channels, levels and
            dimensions, which are found by a dry run.
        loss: Arguments of ``ERALoss``.
        twi_steps: Estimates that go through the teacher's head in training:
            'all', 'last' (e_n alone, with the sum of all weights) or
            'sampled' (one of them per iteration, drawn in proportion to its
            weight and given the sum of all: the same expectation as 'all'
            for the cost of one pass) or 'none' (no TWI). 'all' is [official
            code].
        twi_place: Where the teacher's head takes over: 'head' (all of it, on
            estimates of its input); or 'predictors' (its last layers alone,
            on estimates of what its two towers put out; the sources are then
            found by themselves, dense heads only). Both [ours]; in a linear
            classifier they would be the same.
        detach: Keep the branches' losses from the student: they see its
            feature detached. False is what the published script uses.
        logit: Arguments of ``LogitTerm`` to distil class logits as well: for
            classifiers ``{}`` is [official code]; for dense detectors
            ``dict(kind='binary')``. None: not at all.
        twi_targets: What the teacher's head compares estimates with:
            'labels', the ground truth [official code]; or 'both', the
            teacher's logits too by the ``logit`` term, each of the two
            halved [official code, its option featKL].
        alpha: Share of the teacher's head in mode ST, in [0, 1]. 0.5 is
            [inference]: which value the paper calls ST is unknown.
        teacher: Name of the teacher.
        schedules: See ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Another number of levels, other map sizes, a head TWI
            cannot use, a student without proposals for the teacher's RoI
            head.
    """

    TWI_STEPS = ('all', 'last', 'sampled', 'none')
    TWI_PLACES = ('head', 'predictors')
    TWI_TARGETS = ('labels', 'both')

    def __init__(
        self,
        source: str | list | dict = 'neck',
        mbrnet: dict | None = None,
        loss: dict | None = None,
        twi_steps: str = 'all',
        logit: dict | None = None,
        twi_targets: str = 'labels',
        detach: bool = False,
        alpha: float = 0.5,
        twi_place: str = 'head',
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(source, teacher, schedules, init_cfg)
        if len(self.student_sources) != 1 or len(self.teacher_sources) != 1:
            raise ValueError(
                'ERADistiller approximates one source, but got '
                f'{self.student_sources} and {self.teacher_sources}.'
            )
        if twi_steps not in self.TWI_STEPS:
            raise ValueError(
                f'`twi_steps` must be one of {self.TWI_STEPS}, but got '
                f'{twi_steps!r}.'
            )
        if twi_place not in self.TWI_PLACES:
            raise ValueError(
                f'`twi_place` must be one of {self.TWI_PLACES}, but got '
                f'{twi_place!r}.'
            )
        if twi_place == 'predictors' and source != 'neck':
            raise ValueError(
                "`twi_place='predictors'` finds its sources by itself, but "
                f'got source={source!r}. Remove `source`.'
            )
        self.logit = None if logit is None else LogitTerm(**logit)
        if twi_targets not in self.TWI_TARGETS:
            raise ValueError(
                f'`twi_targets` must be one of {self.TWI_TARGETS}, but got '
                f'{twi_targets!r}.'
            )
        if twi_targets == 'both' and self.logit is None:
            raise ValueError(
                "`twi_targets='both'` compares with the teacher's logits by "
                'the `logit` term, which is None. Set logit=dict().'
            )
        self.twi_targets = twi_targets
        self.feature_sources: tuple[str, ...] = self.student_sources
        if not 0 <= alpha <= 1:
            raise ValueError(f'`alpha` must be in [0, 1], but got {alpha}.')
        self._mbrnet_cfg = dict(mbrnet or {})
        self.loss_terms = ERALoss(**(loss or {}))
        self.twi_steps = twi_steps
        self.twi_place = twi_place
        self.detach = detach
        self.alpha = alpha
        self.mbrnet: MBRNet
        self.twi_head: TWIHead | None = None
        self._proposals: StudentProposals | None = None
        self._blends = self._lacks_masks = self._tokens = False

    @classmethod
    def plan_for(cls, pair: Pair) -> Plan:
        """ERA with TWI where the teacher's head can be reused.

        With it every level of the teacher gets an estimate. Classifiers get
        the term on logits [official code], and layer norms where the
        teacher's backbone has them, as the [official code] for Swin. Maps
        wider than those of necks are convolved in groups [ours].
        """
        reason = cls._why_no_twi(pair)
        # Its levels are the teacher's own where the head can be reused.
        match = pair.match(encoder=True, cover=reason is None)
        student_feats, _ = match.feats()
        distiller = dict(type='era_mm.ERADistiller', **match.config())
        if student_feats[0].dim() == 2 and any(
            isinstance(module, nn.LayerNorm)
            for module in pair.teacher.model.backbone.modules()
        ):
            distiller['mbrnet'] = dict(norm_cfg=dict(type='LN'))
        widest = max(feat.shape[1] for feat in student_feats)
        if student_feats[0].dim() == 4 and widest > MAX_FULL_WIDTH:
            distiller['mbrnet'] = dict(group_width=GROUP_WIDTH)
        if reason is not None:
            distiller['twi_steps'] = 'none'
            return Plan(distiller, match, f'not reused: {reason}')
        if not pair.is_detector:
            distiller['logit'] = dict()
        head = find_head(pair.teacher.model)
        assert head is not None
        kind = type(head.head).__name__
        return Plan(
            distiller,
            match,
            head=f'reused: TWI through the frozen {kind}',
            modes=('E0', 'T', 'ST'),
        )

    @staticmethod
    def _why_no_twi(pair: Pair) -> str | None:
        student, teacher = pair.student, pair.teacher
        reason = why_not_reused(student.model, teacher.model)
        if reason is not None:
            return reason
        names = (student.classes, teacher.classes)
        if None not in names and names[0] != names[1]:
            return (
                'student and teacher have the same number of classes, but '
                'other ones or another order'
            )
        head = find_head(teacher.model)
        assert head is not None
        _, teacher_feats = pair.match(cover=True).feats()
        with torch.no_grad(), preserve_rng():
            problem = head.problem(teacher_feats, training=True)
        return problem and f'{type(head.head).__name__}: {problem}'

    def choose_sources(
        self, *, student: nn.Module, teacher: nn.Module | None
    ) -> None:
        """Find the head, and the sources that its kind needs."""
        assert teacher is not None
        if self.twi_place == 'predictors':
            self.feature_sources = tower_sources(student)
            self.teacher_sources = tower_sources(teacher)
        self._find_head(student, teacher)
        self.student_sources = self.feature_sources
        if self.logit is not None:
            self.student_sources += (self.logit.source,)
        if self._proposals is not None:
            self.student_sources += self._proposals.SOURCES

    def _maps(
        self, feats: Features, sources: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        """The features of some sources in a row, channels in dimension 1."""
        maps = tuple(feat for source in sources for feat in feats[source])
        # Encoders of DETR-like detectors put out (N, L, C).
        return tuple(m.mT for m in maps) if self._tokens else maps

    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Build MBRNet for the pair's channels and try the head out."""
        assert teacher is not None
        self._tokens = is_query_based(teacher) and all(
            feat.dim() == 3
            for source in self.teacher_sources
            for feat in teacher_feats[source]
        )
        student_maps = self._maps(student_feats, self.feature_sources)
        teacher_maps = self._maps(teacher_feats, self.teacher_sources)
        where = ', '.join(self.feature_sources)
        if len(student_maps) != len(teacher_maps):
            raise ValueError(
                'Student and teacher must have the same number of levels at '
                f'{where!r}, but the student has '
                f'{len(student_maps)} {[tuple(m.shape) for m in student_maps]}'
                f' and the teacher {len(teacher_maps)} '
                f'{[tuple(m.shape) for m in teacher_maps]}. Give both necks '
                'the same `num_outs`, or let tools/make_config.py write a '
                '`source.connector`.'
            )
        for level, (s, t) in enumerate(
            zip(student_maps, teacher_maps, strict=True)
        ):
            if s.shape[2:] != t.shape[2:] or s.dim() != t.dim():
                raise ValueError(
                    f'Level {level} has size {tuple(s.shape)} in the student '
                    f'and {tuple(t.shape)} in the teacher: all but the '
                    'channels must agree. Choose sources of the same stride, '
                    'or let tools/make_config.py write a `source.connector`.'
                )
        found = dict(
            in_channels=[m.shape[1] for m in student_maps],
            out_channels=[m.shape[1] for m in teacher_maps],
            num_levels=len(student_maps),
            spatial_dims=student_maps[0].dim() - 2,
        )
        for key, value in found.items():
            given = self._mbrnet_cfg.pop(key, value)
            if isinstance(given, int) and isinstance(value, list):
                given = [given] * len(value)
            if given != value:
                raise ValueError(
                    f'`mbrnet.{key}` is {given} in the config, but the pair '
                    f'has {value} at {where!r}. Remove the '
                    'key: it is found by itself.'
                )
        self.mbrnet = MBRNet(**found, **self._mbrnet_cfg)
        # Refuses what does not fit now, not in the first step.
        self.loss_terms.branch_weights(self.mbrnet.num_branches)
        self._try_out(student_maps, teacher_maps)
        if self.logit is not None:
            with torch.no_grad():
                problem = self.logit.problem(
                    student_logits=self._student_logits(student_feats),
                    teacher_logits=self._head_logits(teacher_maps),
                    student_head=student.get_submodule(self.logit.source),
                    teacher_head=self._head.head,
                )
            if problem:
                raise ValueError(
                    f'`logit` cannot be distilled: {problem}. Remove `logit`, '
                    'or give both heads the same anchors.'
                )

    @torch.no_grad()
    def _try_out(
        self,
        student_maps: tuple[Tensor, ...],
        teacher_maps: tuple[Tensor, ...],
    ) -> None:
        """Run branches and head once on the dry run's features."""
        with evaluating(self.mbrnet):
            try:
                self.mbrnet(student_maps)
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    'MBRNet cannot run on the features at '
                    f'{", ".join(self.feature_sources)!r} '
                    f'{[tuple(m.shape) for m in student_maps]}: {error}. '
                    'Choose a norm_cfg for such features.'
                ) from error
        if self.twi_head is None:
            return
        problem = self.twi_head.problem(
            teacher_maps, training=self.twi_steps != 'none'
        )
        if problem and self.twi_steps == 'none' and self.logit is None:
            self.twi_head = None
        elif problem:
            raise ValueError(
                f"The teacher's head ({type(self.twi_head.head).__name__}) "
                'cannot judge the source '
                f'{", ".join(self.teacher_sources)!r}: '
                f'{problem}. TWI needs the source that feeds the head, '
                "usually 'neck', and the config the teacher was trained with; "
                "else set twi_steps='none'."
            )

    def _find_head(self, student: nn.Module, teacher: nn.Module) -> None:
        head = find_head(teacher, self.twi_place)
        student_head = find_head(student, self.twi_place)
        if self.twi_steps == 'none' and head is None:
            if self.logit is not None:
                self._turn_off(
                    f'{type(teacher).__name__} has no head that scores such '
                    'features'
                )
            return
        reason = mismatch(student, teacher)
        if reason is not None:
            self._turn_off(reason)
            return
        if head is None:
            raise ValueError(
                f'TWI cannot use the head of {type(teacher).__name__}: it '
                'needs `bbox_head` (dense), `rpn_head` and `roi_head` '
                '(two-stage) or `head` (classifier) with `loss` and '
                "`predict`. Set twi_steps='none' for ERA without TWI."
            )
        if isinstance(head, TwoStageTWIHead):
            head = self._two_stage(head, student)
        # The blend needs the student's features as its own head gets them.
        self._blends = student_head is not None and not self.pair_connectors
        self._lacks_masks = getattr(student, 'with_mask', False) and not (
            isinstance(head, TwoStageTWIHead) and head.has_masks
        )
        if self._lacks_masks:
            print_log(
                'ERA without the modes T, ST and E0 ...: the student predicts '
                f'masks, but {type(head.head).__name__}, which is reused of '
                'the teacher, does not.',
                logger='current',
                level=logging.WARNING,
            )
        self.twi_head = head
        if self.logit is not None:
            fits = (
                isinstance(head, DenseTWIHead)
                if self.logit.is_dense
                else type(head) is TWIHead
            )
            if not fits:
                raise ValueError(
                    "`logit` of kind 'kl' or 'dist' distils the logits of "
                    "classifiers, of kind 'binary' those of dense detectors, "
                    f'but it is {self.logit.kind!r} and the teacher a '
                    f'{type(teacher).__name__}. Change or remove `logit`.'
                )

    @property
    def _head(self) -> TWIHead:
        assert self.twi_head is not None
        return self.twi_head

    def _head_logits(self, feats: Sequence[Tensor]) -> Any:
        """What the teacher's head scores of a feature, for the logit term."""
        assert self.logit is not None
        outs = self._head.training_forward(feats)
        # Scores come first in every dense head.
        return outs[0] if self.logit.is_dense else outs

    def _student_logits(self, feats: Features) -> Any:
        assert self.logit is not None
        found = feats[self.logit.source]
        return found if self.logit.is_dense else found[0]

    def _compare_logits(
        self, student_logits: Any, teacher_logits: Any
    ) -> Tensor:
        assert self.logit is not None
        return self.logit(
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            num_classes=getattr(self._head.head, 'cls_out_channels', 0),
        )

    def _turn_off(self, reason: str) -> None:
        if self.logit is not None:
            raise ValueError(
                f'`logit` cannot be distilled: {reason}. Remove `logit`.'
            )
        print_log(
            f'ERA without TWI: {reason}.',
            logger='current',
            level=logging.WARNING,
        )
        self.twi_steps = 'none'

    def _two_stage(
        self, head: TwoStageTWIHead, student: nn.Module
    ) -> TwoStageTWIHead:
        if self.twi_steps != 'none':
            self._proposals = StudentProposals(student)
        if head.has_masks and not getattr(student, 'with_mask', False):
            print_log(
                "TWI without the teacher's mask branch: the student predicts "
                'no masks, so the data need not have any.',
                logger='current',
            )
            head = head.without_masks()
        return head

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_era_align``, ``loss_era_residual``, ``loss_era_twi_*``."""
        maps = self._maps(student_feats, self.feature_sources)
        targets_of = self._maps(teacher_feats, self.teacher_sources)
        for level, (s, t) in enumerate(zip(maps, targets_of, strict=True)):
            if s.shape[2:] != t.shape[2:]:
                raise ValueError(
                    f'Level {level}: student {tuple(s.shape)}, teacher '
                    f'{tuple(t.shape)}. Choose sources of one stride, and '
                    'compare pad_size_divisor of both data_preprocessors.'
                )
        # Sums and differences of estimates in full precision: the last
        # residuals are small.
        targets_of = tuple(_full(t) for t in targets_of)
        aligned = [_full(u) for u in self.mbrnet.align(maps)]
        residuals = [
            [_full(d) for d in branch]
            for branch in self.mbrnet.residuals(
                [m.detach() for m in maps] if self.detach else maps
            )
        ]
        start = [u.detach() for u in aligned] if self.detach else aligned
        # By level, then by step.
        estimates = [
            estimates_of(
                aligned=start[level], residuals=[d[level] for d in residuals]
            )
            for level in range(len(aligned))
        ]
        targets = [
            residual_targets(estimates=steps, teacher_feat=teacher_feat)
            for steps, teacher_feat in zip(estimates, targets_of, strict=True)
        ]
        losses = self.loss_terms(
            aligned=aligned,
            residuals=residuals,
            targets=[
                [level[branch] for level in targets]
                for branch in range(len(residuals))
            ],
            teacher_feats=targets_of,
        )
        teacher_logits = None
        if self.logit is not None:
            with torch.no_grad():
                teacher_logits = self._head_logits(targets_of)
            losses['loss_era_logit'] = self._compare_logits(
                self._student_logits(student_feats), teacher_logits
            )
        if self.twi_steps != 'none':
            steps = [list(step) for step in zip(*estimates, strict=True)]
            # e_0 trains the student whether or not the branches do.
            steps[0] = aligned
            if self._proposals is not None:
                data_samples = self._proposals.attach(
                    student_feats, data_samples
                )
            losses |= self._twi_losses(steps, data_samples, teacher_logits)
        return losses

    def _twi_losses(
        self,
        steps: list[list[Tensor]],
        data_samples: list,
        teacher_logits: Any,
    ) -> dict[str, Tensor]:
        assert self.twi_head is not None
        weights = self.loss_terms.step_weights(len(steps) - 1)
        if self.twi_steps != 'all':
            index = len(steps) - 1
            if self.twi_steps == 'sampled':
                # Its own generator, so that the draw does not shift the
                # data's random state; by step, so that a resumed run and
                # all ranks draw alike.
                generator = torch.Generator().manual_seed(self.step)
                index = int(
                    torch.multinomial(
                        torch.tensor(weights), 1, generator=generator
                    )
                )
            steps, weights = [steps[index]], [sum(weights)]
        losses: dict[str, Tensor] = {}
        for step, weight in zip(steps, weights, strict=True):
            if weight == 0:
                continue
            terms = {
                'cls' if key == 'loss' else key.replace('loss_', ''): value
                for key, value in self.twi_head.loss(
                    step, data_samples
                ).items()
            }
            if self.twi_targets == 'both':
                terms['logit'] = self._compare_logits(
                    self._head_logits(step), teacher_logits
                )
                terms = {name: value / 2 for name, value in terms.items()}
            for name, value in terms.items():
                key = f'loss_era_twi_{name}'
                value = self.loss_terms.twi_weight * weight * value
                losses[key] = losses.get(key, 0) + value
        return losses

    def loss_weights(self) -> dict[str, float]:
        """Of the two feature terms, the head's terms and the logits'."""
        weights = {
            'loss_era_align': self.loss_terms.align_weight,
            'loss_era_residual': self.loss_terms.residual_weight,
        }
        if self.twi_steps != 'none':
            weights['loss_era_twi_*'] = self.loss_terms.twi_weight
        if self.logit is not None:
            weights['loss_era_logit'] = self.logit.weight
        return weights

    # -- inference ---------------------------------------------------------

    @property
    def predict_sources(self) -> tuple[str, ...]:
        """The features alone: no logits, no proposals."""
        return self.feature_sources

    def inference_modes(self) -> tuple[str, ...]:
        """'E0' ... 'E(n-1)', 'T' (which is e_n) and 'ST'.

        None where the teacher's head cannot be used or predicts less than
        the student's, and no 'ST' where the student's cannot be used.
        """
        if self.twi_head is None or self._lacks_masks:
            return ()
        estimates = [f'E{i}' for i in range(self.mbrnet.num_branches)]
        return (*estimates, 'T', *(['ST'] if self._blends else []))

    def export(self, mode: str, **pair: Any) -> HostModel:
        """Mode 'E0' or 'T' as a host model; see ``export_estimate``."""
        return export_estimate(self, mode, **pair)

    def predict(
        self,
        modes: tuple[str, ...],
        *,
        student: nn.Module,
        student_feats: Features,
        data_samples: list,
    ) -> dict[str, list]:
        """Predictions through the teacher's head."""
        assert self.twi_head is not None
        maps = self._maps(student_feats, self.feature_sources)
        num_branches = {
            mode: self.mbrnet.num_branches
            if mode in ('T', 'ST')
            else int(mode[1:])
            for mode in modes
        }
        # Through the neck's own sum or mean, as T is as a stock model.
        steps = self.mbrnet.estimates(maps, max(num_branches.values()))
        predictions = {}
        for mode in modes:
            step = steps[num_branches[mode]]
            if mode == 'ST':
                student_head = find_head(student, self.twi_place)
                assert student_head is not None
                predictions[mode] = self.twi_head.predict_blend(
                    step,
                    data_samples,
                    student_head=student_head,
                    student_feats=maps,
                    alpha=self.alpha,
                )
            else:
                predictions[mode] = self.twi_head.predict(step, data_samples)
        return predictions
