"""ERADistiller: the residual approximation and TWI, put together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.logging import print_log
from torch import Tensor, nn

from ...core import Features, HostModel, MeasuredPair, Plan
from ...core.host_models import is_query_based
from ...core.utils import evaluating, run_seed
from ...heads import DenseTWIHead, RoITerm, find_head, tower_sources
from ...layers import (
    Measured,
    check_alike,
    full_precision,
    levels_of,
    settled,
)
from ...registry import MODELS
from .approximation import (
    Parts,
    approximate,
    estimate_from,
    shares_in,
    unexplained_shares,
)
from .export import export_estimate
from .forms import FORMS, Settings, settings_of
from .head_user import HeadUser
from .losses import ERALoss
from .mbrnet import MBRNet

#: Iterations between two updates of the running shares, which synchronise the
#: ranks, and the weight of the new batch in an update.
EXPLAINED_EVERY = 10
EXPLAINED_RATE = 0.5


@MODELS.register_module()
class ERADistiller(HeadUser, Measured):
    """Expandable Residual Approximation.

        u_l  = align_l(P_l)          d_il = branch_i(P_l)
        e_0l = u_l                   e_il = e_(i-1)l + d_il
        L = align_weight * D(u, T) + twi_weight * w_0 * H(e_0)
          + (1/n) sum_i s_i [ residual_weight * D(d_i, sg r_i)
                              + twi_weight * w_i * H(e_i) ]
          + terms on the student's own logits and boxes

    P and T are the features of student and teacher at ``source``, D a squared
    distance, H the loss of the teacher's frozen head on an estimate. L is
    added to the student's own losses. Without arguments it is the recipe for
    the pair at hand: the 'normalised' form for feature maps, the best known
    one; the 'released' form for pooled vectors, with the arithmetic of the
    paper's results.

    =============  =======================  ===============================
    form           'released'               'normalised'
    =============  =======================  ===============================
    D              MSE, summed over levels  share of the teacher's variance
                                            that is not explained, averaged
                                            over levels
    branches       two blocks of full       bottlenecks that start at zero
                   width
    align_weight   5                        1
    residual       1                        4
    scales s_i     1, 1/2, 1/4, 1/8         1, 1, 1, 1
    twi_steps      'all'                    'sampled': e_0 or e_n
    twi_targets    'labels'                 'teacher'
    w_i            1                        share explained by e_i, running
    =============  =======================  ===============================

    Defaults that are not possible for a pair (a head that cannot judge
    estimates, scores that cannot be compared) are dropped with a message.

    Source: ERA, arXiv 2508.16050. The released form is the arithmetic of the
    [official code] on ``(N, C)`` features. On feature maps and with a
    detector's heads both forms are [ours]: the authors have not released
    theirs. DETR-like detectors get no TWI: their heads read the queries of a
    decoder.

    Args:
        source: Module whose output is approximated; see ``BaseDistiller``.
        form: 'auto', 'released' or 'normalised'; sets the other defaults.
        mbrnet: Arguments of ``MBRNet`` other than channels, levels and
            dimensions, which are inferred from a dry run.
        loss: Arguments of ``ERALoss``.
        twi_steps: Estimates that go through the teacher's head in training:
            'all', 'last' (only e_n, with the sum of all weights), 'sampled'
            (one estimate per iteration, drawn in proportion to its weight,
            with the sum of all weights: the expectation of 'all' at the cost
            of one pass) or 'none' (no TWI). 'all' is [official code]. 'auto':
            by the form; 'none' if the head cannot be used.
        logit: Terms on the student's own logits and boxes: arguments of
            ``LogitTerm`` (classifiers), ``DenseTerm`` or ``RoITerm``
            (detectors), with the ``kind``: 'kl', 'dist', 'dense', 'roi'.
            'auto': by the teacher's head, and only in TWI where the student's
            cannot be compared with it; None: no such terms.
        twi_targets: What the teacher's head compares estimates with:
            'labels', the ground truth, in classifiers by the student's own
            loss with its smoothing and its weight [official code]; 'teacher',
            its own outputs on the teacher's feature, by the ``logit`` term
            [ours]; or 'both', each halved [official code, its option featKL].
            'auto': by the form; in the normalised one 'both' for two-stage
            detectors of which a part is judged by labels alone (masks, or an
            RPN whose scores cannot be compared); 'labels' with
            ``logit=None`` or if the teacher's scores cannot be compared. The
            student's own head has no part in it and may be of another kind.
        twi_interval: Iterations between two uses of TWI, whose weight is
            multiplied by this number: the same expectation in less time.
            [ours].
        detach: Detach the student's feature for the branches, so that their
            losses do not reach it. False is used by the published script.
        alpha: Weight of the teacher's head in mode ST, in [0, 1]. 0.5 is
            [inference]: the paper's value for ST is unknown.
        twi_place: The part of the teacher's head that is used: 'head' (all of
            it, on estimates of its input); or 'predictors' (only its last
            layers, on estimates of its two towers' outputs; the sources are
            then inferred, dense heads only). Both [ours]; for a linear
            classifier they would be the same.
        teacher: Name of the teacher.
        schedules: See ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Different numbers of levels or map sizes; a teacher that
            is trained as well (``MutualDistillation``); or a setting
            that is not possible for the pair: a head that TWI cannot use, a
            student without proposals for the teacher's RoI head, logits that
            cannot be compared.
    """

    def __init__(
        self,
        source: str | list | dict = 'neck',
        *,
        form: str = 'auto',
        mbrnet: dict | None = None,
        loss: dict | None = None,
        twi_steps: str = 'auto',
        logit: dict | str | None = 'auto',
        twi_targets: str = 'auto',
        detach: bool = False,
        alpha: float = 0.5,
        twi_interval: int = 1,
        twi_place: str = 'head',
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(
            source,
            teacher,
            schedules,
            init_cfg,
            form=form,
            twi_steps=twi_steps,
            twi_targets=twi_targets,
            twi_place=twi_place,
            logit=logit,
        )
        if len(self.student_sources) != 1 or len(self.teacher_sources) != 1:
            raise ValueError(
                'ERADistiller approximates one source, but got '
                f'{self.student_sources} and {self.teacher_sources}.'
            )
        if form not in ('auto', *FORMS):
            raise ValueError(
                f'`form` must be one of {("auto", *FORMS)}, but got {form!r}.'
            )
        if twi_interval < 1:
            raise ValueError(
                f'`twi_interval` must be at least 1, but got {twi_interval}.'
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f'`alpha` must be in [0, 1], but got {alpha}.')
        self._mbrnet_cfg = dict(mbrnet or {})
        topology = self._mbrnet_cfg.get('topology', 'parallel')
        if form == 'auto' and topology != 'parallel':
            form = 'released'
            print_log(
                f'ERA in the released form: with mbrnet.topology={topology!r} '
                'branches read one another, for which there is no normalised '
                'one.',
                logger='current',
            )
        self.form = form
        self._loss_cfg = dict(loss or {})
        # Refuses unknown keys now; the form sets the rest.
        self.loss_terms = ERALoss(**self._loss_cfg)
        self.twi_interval = twi_interval
        self.detach = detach
        self.alpha = alpha
        self.mbrnet: MBRNet
        self._tokens = False
        # What the teacher's head says, between the two halves of a step.
        self._said: Any = None

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """ERA, with TWI if the teacher's head can be reused.

        With TWI every level of the teacher gets an estimate. Classifiers get
        layer norms if the teacher's backbone has them, as in the [official
        code] for Swin. All else are the defaults for the pair.
        """
        reason = cls.why_no_twi(pair)
        # Its levels are the teacher's own where the head can be reused.
        match = pair.match(encoder=True, cover=reason is None)
        student_feats, _ = match.feats()
        distiller = dict(type='era_mm.ERADistiller', **match.config())
        if student_feats[0].dim() == 2 and any(
            isinstance(module, nn.LayerNorm)
            for module in pair.teacher.model.backbone.modules()
        ):
            distiller['mbrnet'] = dict(norm_cfg=dict(type='LN'))
        if reason is not None:
            distiller['twi_steps'] = 'none'
            # Its hook also tells what the branches explain, in their space.
            is_map = student_feats[0].dim() > 2
            return Plan(
                distiller,
                match,
                head=f'not reused: {reason}',
                modes=('S',) if is_map else (),
                hook='era_mm.TWIHook',
            )
        head = find_head(pair.teacher.model)
        assert head is not None
        kind = type(head.head).__name__
        return Plan(
            distiller,
            match,
            head=f'reused: TWI through the frozen {kind}',
            modes=('E0', 'T', 'ST'),
            hook='era_mm.TWIHook',
        )

    # -- meeting the pair --------------------------------------------------

    def choose_sources(
        self, *, student: nn.Module, teacher: nn.Module | None
    ) -> None:
        """Find the head, and the sources that its kind needs."""
        assert teacher is not None
        if self.twi_place == 'predictors':
            self.feature_sources = tower_sources(student)
            self.teacher_sources = tower_sources(teacher)
        self._find_head(student, teacher)
        self._choose_logit(student)
        self.student_sources = self.feature_sources
        if self._own_term is not None:
            self.student_sources += tuple(
                source
                for source in self._own_term.sources
                if source not in self.student_sources
            )
        if self._proposals is not None:
            self.student_sources += self._proposals.SOURCES

    def _maps(
        self, feats: Features, sources: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        """The features of some sources, with channels in dimension 1."""
        maps = tuple(levels_of(feats, sources))
        # Encoders of DETR-like detectors give (N, L, C).
        return tuple(m.mT for m in maps) if self._tokens else maps

    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Build MBRNet for the pair's channels and test the head."""
        assert teacher is not None
        self._tokens = is_query_based(teacher) and all(
            feat.dim() == 3
            for source in self.teacher_sources
            for feat in teacher_feats[source]
        )
        student_maps = self._maps(student_feats, self.feature_sources)
        teacher_maps = self._maps(teacher_feats, self.teacher_sources)
        check_alike(
            [m.shape for m in student_maps],
            [m.shape for m in teacher_maps],
            names=('The student', 'the teacher'),
            at=(self.feature_sources, self.teacher_sources),
            advice='Choose sources of the same levels and strides, or let '
            'make_config write a `source.resample`.',
        )
        found: dict[str, Any] = dict(
            in_channels=[m.shape[1] for m in student_maps],
            out_channels=[m.shape[1] for m in teacher_maps],
            num_levels=len(student_maps),
            spatial_dims=student_maps[0].dim() - 2,
        )
        self._take_form(
            settings_of(
                self.form,
                is_map=bool(found['spatial_dims']),
                mbrnet=self._mbrnet_cfg,
                loss=self._loss_cfg,
            )
        )
        for key, value in found.items():
            given = self._mbrnet_cfg.pop(key, value)
            if isinstance(given, int) and isinstance(value, list):
                given = [given] * len(value)
            if given != value:
                raise ValueError(
                    f'`mbrnet.{key}` is {given} in the config, but the pair '
                    f'has {value} at {", ".join(self.feature_sources)!r}. '
                    'Remove the key: it is inferred.'
                )
        self.mbrnet = MBRNet(**found, **self._mbrnet_cfg)
        # Refuses what does not fit now, not in the first step.
        self.loss_terms.branch_weights(self.mbrnet.num_branches)
        self.loss_terms.step_weights(self.mbrnet.num_branches)
        self._try_branches(student_maps)
        if self.twi_head is not None:
            self._try_head(teacher_maps)
        if self.logit is not None:
            self._meet_logit(student, teacher, student_feats, teacher_maps)
            self._meet_two_stages(teacher_maps)
        if self.twi_steps != 'none' and self.mbrnet.space is not None:
            #: Running share of the teacher's variance that each estimate
            #: explains.
            self.register_buffer(
                'explained', torch.zeros(self.mbrnet.num_branches + 1)
            )

    @torch.no_grad()
    def _try_branches(self, student_maps: tuple[Tensor, ...]) -> None:
        """Run them once on the dry run's features."""
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

    def _take_form(self, settings: Settings) -> None:
        """Fill in what the config leaves to the form."""
        self.form = settings.form
        self._mbrnet_cfg = settings.mbrnet
        self.loss_terms = ERALoss(**settings.loss)
        if self.twi_steps == 'auto':
            self.twi_steps = settings.twi_steps
        if self.twi_targets == 'auto':
            self.twi_targets = settings.twi_targets
            if self.logit is None:
                self.twi_targets = 'labels'

    # -- losses ------------------------------------------------------------

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
        own_feats: Features | None = None,
    ) -> dict[str, Tensor]:
        """``loss_era_align``, ``_residual``, ``_logit``, ``_box``, ``_twi_*``.

        Those of the head only if they are active.

        Args:
            student_feats: Features by source.
            teacher_feats: T, the features to approximate.
            data_samples: Ground truth.
            own_feats: The teacher's own features, if T is derived from them
                (SoKD): its head is applied to these, and its space is
                measured on them.
        """
        losses, said = self._loss_of_features(
            student_feats=student_feats,
            teacher_feats=teacher_feats,
            own_feats=own_feats or teacher_feats,
            data_samples=data_samples,
        )
        return losses | self._loss_of_own_head(student_feats, said)

    @property
    def _settles(self) -> bool:
        """Whether a dense head is compared with itself on one estimate.

        Its maps take as much memory as those of the student's own head, and
        two gradients at the estimate much less: one for each of its losses,
        for which most heads have a tower each. Predictors and RPNs have none.
        """
        return (
            self.twi_steps in ('sampled', 'last')
            and self.twi_targets == 'teacher'
            and type(self.twi_head) is DenseTWIHead
        )

    @property
    def early_sources(self) -> tuple[str, ...]:
        """The features, where much memory is freed before the next head."""
        return self.feature_sources if self._settles else ()

    def begin_step(self, step: int) -> None:
        """As in the base class; a step that failed may have left its half."""
        super().begin_step(step)
        self._said = None

    def early_loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """All but the terms of the student's own head."""
        losses, self._said = self._loss_of_features(
            student_feats=student_feats,
            teacher_feats=teacher_feats,
            own_feats=teacher_feats,
            data_samples=data_samples,
        )
        return losses

    def late_loss(self, *, student_feats: Features) -> dict[str, Tensor]:
        """The terms of the student's own head."""
        said, self._said = self._said, None
        return self._loss_of_own_head(student_feats, said)

    def _loss_of_own_head(
        self, student_feats: Features, said: Any
    ) -> dict[str, Tensor]:
        if self._own_term is None:
            return {}
        terms = self._own_term.of_student(student_feats, said)
        return {f'loss_era_{k}': value for k, value in terms.items()}

    def _loss_of_features(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        own_feats: Features,
        data_samples: list,
    ) -> tuple[dict[str, Tensor], Any]:
        """The other terms, and what the teacher's head says.

        Args:
            student_feats: Features by source.
            teacher_feats: The features to approximate.
            own_feats: The teacher's own features.
            data_samples: Ground truth.
        """
        maps = self._maps(student_feats, self.feature_sources)
        targets = self._maps(teacher_feats, self.teacher_sources)
        check_alike(
            [m.shape for m in maps],
            [m.shape for m in targets],
            names=('The student', 'the teacher'),
            advice='Choose sources of one stride, and compare '
            'pad_size_divisor of both data_preprocessors.',
        )
        # Sums and differences of estimates in full precision: the last
        # residuals are small.
        targets = own = tuple(full_precision(t) for t in targets)
        if own_feats is not teacher_feats:
            own = self._maps(own_feats, self.teacher_sources)
            own = tuple(full_precision(t) for t in own)
        learns = self.training and torch.is_grad_enabled()
        losses, parts = approximate(
            self.mbrnet,
            self.loss_terms,
            maps=maps,
            targets=targets,
            own=own,
            detach=self.detach,
            learns=learns,
        )
        if (
            learns
            and self.mbrnet.space is not None
            and self.twi_steps != 'none'
            and self.step % EXPLAINED_EVERY == 0
        ):
            self._explain(losses)
        if self._proposals is not None and self.uses_predictions:
            data_samples = self._proposals.attach(student_feats, data_samples)
        judges = (
            self.twi_steps != 'none' and self.step % self.twi_interval == 0
        )
        said: Any = None
        term = self._term
        if term is not None and (judges or self._own_term is not None):
            with torch.no_grad():
                said = term.target(self._head, own, data_samples)
                if learns:
                    term.measure(said)
        if judges:
            losses |= self._twi_losses(parts, data_samples, said)
        return losses, said

    def _explain(self, losses: dict[str, Tensor]) -> None:
        """Update the running shares that weight TWI, unless not finite."""
        shares = shares_in(losses)
        all_reduce(shares, 'mean')
        updated = self.explained.lerp((1 - shares).clamp(0, 1), EXPLAINED_RATE)
        self.explained.copy_(
            torch.where(shares.isfinite().all(), updated, self.explained)
        )

    def reset(self) -> None:
        """Begin again with estimates that explain nothing."""
        if hasattr(self, 'explained'):
            self.explained.zero_()

    def _twi_losses(
        self, parts: Parts, data_samples: list, said: Any
    ) -> dict[str, Tensor]:
        weights = self.loss_terms.judged(
            self.mbrnet.num_branches,
            self.twi_steps,
            # All ranks and a resumed run draw alike, other seeds do not.
            run_seed() * 2**31 + self.step,
        )
        steps = [
            estimate_from(
                parts, k, space=self.mbrnet.space, detach=self.detach
            )
            for k in weights
        ]
        levels = len(steps[0])

        def judged(maps: Sequence[Tensor]) -> dict[str, Tensor]:
            given = [maps[i : i + levels] for i in range(0, len(maps), levels)]
            return self._judged(given, weights, data_samples, said)

        maps = [level for step in steps for level in step]
        return settled(judged, maps) if self._settles else judged(maps)

    def _judged(
        self,
        steps: Sequence[Sequence[Tensor]],
        weights: Mapping[int, float],
        data_samples: list,
        said: Any,
    ) -> dict[str, Tensor]:
        """Weighted losses of the teacher's head, summed over estimates."""
        judged = self._head.judge(
            steps,
            data_samples,
            by_labels=self.twi_targets != 'teacher',
            term=None if self.twi_targets == 'labels' else self.logit,
            said=said,
        )
        losses: dict[str, Tensor] = {}
        for (k, given), terms in zip(weights.items(), judged, strict=True):
            weight: float | Tensor = (
                self.loss_terms.twi_weight * self.twi_interval * given
            )
            if self.twi_targets == 'both':
                weight = weight / 2
            if self.mbrnet.space is not None:
                weight = weight * self.explained[k]
            for name, value in terms.items():
                name = 'cls' if name == 'loss' else name.replace('loss_', '')
                key = f'loss_era_twi_{name}'
                losses[key] = losses.get(key, 0) + weight * value
        return losses

    def compare(
        self, *, student_feats: Features, teacher_feats: Features
    ) -> Tensor | None:
        """Unexplained share of the teacher's variance for each estimate.

        None without a normalised space, or before its statistics exist.
        """
        space = self.mbrnet.space
        if space is None or not int(space.first_batches.seen):
            return None
        maps = self._maps(student_feats, self.feature_sources)
        targets = self._maps(teacher_feats, self.teacher_sources)
        return unexplained_shares(
            self.mbrnet, self.loss_terms, space, maps=maps, targets=targets
        )

    def extra_flops(
        self,
        count: Callable[[Callable[[], Any]], int],
        *,
        student_feats: Features,
        teacher_feats: Features,
    ) -> float | None:
        """FLOPs of the branches and of the teacher's head.

        The frozen head needs no gradients for weights: a pass counts as two
        forward passes, and one more for the teacher's own feature. The
        regions of a RoI head are not counted.
        """
        maps = self._maps(student_feats, self.feature_sources)
        targets = self._maps(teacher_feats, self.teacher_sources)
        total = 3.0 * count(lambda: self.mbrnet.estimates(maps))
        if self.twi_head is None:
            return total
        head = count(lambda: self._head(targets))
        term = self._term
        # Of two stages, `head` is the RPN.
        if term is not None and not (
            isinstance(term, RoITerm) and term.rpn is None
        ):
            every = self.twi_interval if self._own_term is None else 1
            total += head / every
        if self.twi_steps != 'none':
            weights = self.loss_terms.step_weights(self.mbrnet.num_branches)
            judged = sum(weight > 0 for weight in weights)
            passes = judged if self.twi_steps == 'all' else 1
            total += 2.0 * passes / self.twi_interval * head
        return total

    def loss_weights(self) -> dict[str, float]:
        """Weights of the feature terms, TWI, and the student's own head."""
        weights = {
            'loss_era_align': self.loss_terms.align_weight,
            'loss_era_residual': self.loss_terms.residual_weight,
        }
        if self.twi_steps != 'none':
            weights['loss_era_twi_*'] = self.loss_terms.twi_weight
        if self._own_term is not None:
            weights |= {
                f'loss_era_{name}': weight
                for name, weight in self._own_term.loss_weights().items()
            }
        return weights

    def is_complete(self, step: int) -> bool:
        """False in iterations without TWI."""
        return self.twi_steps == 'none' or step % self.twi_interval == 0

    # -- inference ---------------------------------------------------------

    @property
    def predict_sources(self) -> tuple[str, ...]:
        """Only the features: no logits, no proposals."""
        return self.feature_sources

    def export(self, mode: str, **pair: Any) -> HostModel:
        """Mode 'E0' or 'T' as a host model; see ``export_estimate``."""
        return export_estimate(
            self.mbrnet,
            mode,
            mbrnet_cfg=self._mbrnet_cfg,
            source=self.student_sources[0],
            connections=self.connections,
            **pair,
        )

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
