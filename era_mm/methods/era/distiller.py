"""ERADistiller: the residual approximation and TWI, put together."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from mmengine.dist import all_reduce
from mmengine.logging import print_log
from torch import Tensor, nn

from ...core import BaseDistiller, Features, HostModel
from ...core.pairing import Pair, Plan, is_query_based
from ...core.utils import evaluating, preserve_rng, run_seed
from ...registry import MODELS
from .detector_terms import DenseTerm, DetectorTerm, RoITerm
from .export import export_estimate
from .logit import LogitTerm, full
from .losses import ERALoss, estimates_of, residual_targets
from .mbrnet import MBRNet
from .twi import find_head, mismatch, tower_sources, why_not_reused
from .twi_heads import (
    DenseTWIHead,
    StudentProposals,
    TWIHead,
    TwoStageTWIHead,
)

#: Iterations between two looks at the running shares, for which the ranks wait
#: for each other, and how far the shares follow the batch that is looked at.
EXPLAINED_EVERY = 10
EXPLAINED_RATE = 0.5


class Parts(NamedTuple):
    """What estimates are made of, in the space of the branches.

    Args:
        aligned: u by level.
        residuals: d by level and branch.
    """

    aligned: list[Tensor]
    residuals: list[Sequence[Tensor]]


@MODELS.register_module()
class ERADistiller(BaseDistiller):
    """Expandable Residual Approximation.

        u_l  = align_l(P_l)          d_il = branch_i(P_l)
        e_0l = u_l                   e_il = e_(i-1)l + d_il
        L = align_weight * D(u, T) + twi_weight * w_0 * H(e_0)
          + (1/n) sum_i s_i [ residual_weight * D(d_i, sg r_i)
                              + twi_weight * w_i * H(e_i) ]
          + terms on the student's own logits and boxes

    P and T are the features of student and teacher at ``source``, D a squared
    distance, H what the teacher's frozen head says of an estimate. Added to
    the student's own losses. With no arguments it is the best recipe known
    for the pair: the 'normalised' form on feature maps, the 'released' one on
    pooled vectors.

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
    twi_steps      'all'                    'sampled': e_0 or e_n
    twi_targets    'labels'                 'teacher'
    w_i            1                        share explained by e_i, running
    =============  =======================  ===============================

    Where something that is not asked for by name cannot be (a head that
    cannot judge estimates, scores that cannot be compared), it is left out
    with a message.

    Source: ERA, arXiv 2508.16050. The released form is the arithmetic of the
    [official code] on ``(N, C)`` features. On feature maps and with a
    detector's heads both forms are [ours]: the authors' was never released.
    DETR-like detectors get it without TWI: their heads read the queries of a
    decoder.

    Args:
        source: Module whose output is approximated; see ``BaseDistiller``.
        form: 'auto', 'released' or 'normalised': defaults of what follows.
        mbrnet: Arguments of ``MBRNet`` other than channels, levels and
            dimensions, which are inferred from a dry run.
        loss: Arguments of ``ERALoss``.
        twi_steps: Estimates that go through the teacher's head in training:
            'all', 'last' (e_n alone, with the sum of all weights) or
            'sampled' (one of them per iteration, drawn in proportion to its
            weight and given the sum of all: the same expectation as 'all'
            for the cost of one pass) or 'none' (no TWI). 'all' is [official
            code]. 'auto': by the form; 'none' where the head cannot be used.
        logit: What the student's own head hears of the teacher's: arguments
            of ``LogitTerm`` (classifiers), ``DenseTerm`` or ``RoITerm``
            (detectors), with which to choose by the ``kind``: 'kl', 'dist',
            'dense', 'roi'. 'auto': by the teacher's head; None: nothing.
        twi_targets: What the teacher's head compares estimates with:
            'labels', the ground truth [official code]; 'teacher', its own
            outputs on the teacher's feature, by the ``logit`` term [ours]; or
            'both', each halved [official code, its option featKL]. 'auto': by
            the form; in the normalised one 'both' for two-stage detectors,
            whose RPN is judged by labels alone; 'labels' without a ``logit``
            term.
        twi_interval: TWI takes part in every so many iterations, with so many
            times its weight: the same expectation, for less time. [ours].
        detach: Keep the branches' losses from the student: they see its
            feature detached. False is what the published script uses.
        alpha: Share of the teacher's head in mode ST, in [0, 1]. 0.5 is
            [inference]: which value the paper calls ST is unknown.
        twi_place: Where the teacher's head takes over: 'head' (all of it, on
            estimates of its input); or 'predictors' (its last layers alone,
            on estimates of its two towers' outputs; the sources are then
            inferred, dense heads only). Both [ours]; in a linear classifier
            they would be the same.
        teacher: Name of the teacher.
        schedules: See ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Another number of levels, other map sizes; what was asked
            for by name and cannot be: a head that TWI cannot use, a student
            without proposals for the teacher's RoI head, logits that cannot
            be compared.
    """

    FORMS = ('auto', 'released', 'normalised')
    TWI_STEPS = ('auto', 'all', 'last', 'sampled', 'none')
    TWI_PLACES = ('head', 'predictors')
    TWI_TARGETS = ('auto', 'labels', 'teacher', 'both')

    #: What a form sets where the config does not.
    DEFAULTS: ClassVar[dict[str, dict[str, Any]]] = {
        'released': dict(
            mbrnet=dict(),
            loss=dict(),
            twi_steps='all',
            twi_targets='labels',
        ),
        'normalised': dict(
            mbrnet=dict(branch='bottleneck', normalize=True),
            loss=dict(
                align_weight=1.0,
                residual_weight=4.0,
                twi_scales=(1.0, 1.0),
            ),
            twi_steps='sampled',
            twi_targets='teacher',
        ),
    }

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
        super().__init__(source, teacher, schedules, init_cfg)
        if len(self.student_sources) != 1 or len(self.teacher_sources) != 1:
            raise ValueError(
                'ERADistiller approximates one source, but got '
                f'{self.student_sources} and {self.teacher_sources}.'
            )
        for name, choice, choices in (
            ('form', form, self.FORMS),
            ('twi_steps', twi_steps, self.TWI_STEPS),
            ('twi_place', twi_place, self.TWI_PLACES),
            ('twi_targets', twi_targets, self.TWI_TARGETS),
        ):
            if choice not in choices:
                raise ValueError(
                    f'`{name}` must be one of {choices}, but got {choice!r}.'
                )
        if twi_place == 'predictors' and source != 'neck':
            raise ValueError(
                "`twi_place='predictors'` infers its sources, but got "
                f'source={source!r}. Remove `source`.'
            )
        if not (logit in ('auto', None) or isinstance(logit, Mapping)):
            raise ValueError(
                "`logit` must be 'auto', None (no such term) or a dict of "
                f'arguments, but got {logit!r}.'
            )
        if twi_targets in ('teacher', 'both') and logit is None:
            raise ValueError(
                f'`twi_targets={twi_targets!r}` compares with the '
                "teacher's outputs by the `logit` term, which is None. Set "
                'logit=dict().'
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
        self._logit_cfg = logit
        self.logit: LogitTerm | DetectorTerm | None = None
        self.twi_steps = twi_steps
        self.twi_targets = twi_targets
        self.twi_interval = twi_interval
        self.twi_place = twi_place
        self.detach = detach
        self.alpha = alpha
        self.feature_sources: tuple[str, ...] = self.student_sources
        self.mbrnet: MBRNet
        self.twi_head: TWIHead | None = None
        self._proposals: StudentProposals | None = None
        self._blends = self._lacks_masks = self._tokens = False
        # What must be there, or else the pair is refused.
        self._asks_for_twi = twi_steps not in ('auto', 'none')
        self._asks_for_logit = isinstance(logit, Mapping)
        self._asks_for_targets = twi_targets in ('teacher', 'both')

    @classmethod
    def plan_for(cls, pair: Pair) -> Plan:
        """ERA with TWI where the teacher's head can be reused.

        With it every level of the teacher gets an estimate. Classifiers get
        layer norms where the teacher's backbone has them, as the [official
        code] for Swin. All else are the defaults for the pair.
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
        if reason is not None:
            distiller['twi_steps'] = 'none'
            return Plan(distiller, match, f'not reused: {reason}')
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
        if self.logit is not None:
            self.student_sources += tuple(
                source
                for source in self.logit.sources
                if source not in self.student_sources
            )
        if self._proposals is not None:
            self.student_sources += self._proposals.SOURCES

    def _find_head(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the teacher's head, and how the student's goes with it."""
        head = find_head(teacher, self.twi_place)
        reason = mismatch(student, teacher)
        if reason is None and head is None:
            reason = (
                f'TWI cannot use the head of {type(teacher).__name__}: it '
                'needs `bbox_head` (dense), `rpn_head` and `roi_head` '
                '(two-stage) or `head` (classifier) with `loss` and `predict`'
            )
            if self._asks_for_twi:
                raise ValueError(
                    f"{reason}. Set twi_steps='none' for ERA without TWI."
                )
        if reason is None and isinstance(head, TwoStageTWIHead):
            head = self._two_stage(head, student)
        if head is None or reason is not None:
            if reason is not None:
                self._leave_head(reason)
            return
        # The blend needs the student's features as its own head gets them.
        student_head = find_head(student, self.twi_place)
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

    def _two_stage(
        self, head: TwoStageTWIHead, student: nn.Module
    ) -> TwoStageTWIHead | None:
        wants_logit = self._asks_for_logit or (
            self._logit_cfg is not None and self.form != 'released'
        )
        if self.twi_steps != 'none' or wants_logit:
            try:
                self._proposals = StudentProposals(student)
            except ValueError as error:
                if self._asks_for_twi or self._asks_for_logit:
                    raise
                reason = str(error).partition('. ')[0]
                self._leave_head(f'{reason[0].lower()}{reason[1:]}')
                return None
        if head.has_masks and not getattr(student, 'with_mask', False):
            print_log(
                "TWI without the teacher's mask branch: the student predicts "
                'no masks, so the data need not have any.',
                logger='current',
            )
            head = head.without_masks()
        return head

    def _leave_head(self, reason: str) -> None:
        """Go on without the teacher's head, where that was not asked for."""
        if self._asks_for_logit:
            raise ValueError(
                f'`logit` cannot be distilled: {reason}. Remove `logit`.'
            )
        parts = ['TWI'] if self.twi_steps != 'none' else []
        if self._logit_cfg is not None and self.form != 'released':
            parts.append("terms on the student's own logits")
        if parts:
            print_log(
                f'ERA without {" and ".join(parts)}: {reason}.',
                logger='current',
                level=logging.WARNING,
            )
        self.twi_steps = 'none'
        self.twi_head = self._proposals = None
        self._leave_logit()

    def _choose_logit(self, student: nn.Module) -> None:
        """The term on the student's own head that its kind needs."""
        if self._logit_cfg is None or self.twi_head is None:
            return
        if (
            self.form == 'released'
            and not self._asks_for_logit
            and type(self.twi_head) is not TWIHead
        ):
            # The released code has a term for the logits of classifiers.
            return
        cfg: dict[str, Any] = {}
        if isinstance(self._logit_cfg, Mapping):
            cfg |= self._logit_cfg
        kind = cfg.pop('kind', None)
        if kind == 'binary':
            kind = 'dense'
            for key in ('temperature', 'source'):
                cfg.pop(key, None)
            print_log(
                "logit=dict(kind='binary') of ERADistiller is now kind="
                "'dense': `weight` (default 1) is in units of the teacher's "
                'own scores, boxes are distilled beside them (`box_weight`), '
                'and `temperature` and `source` have no effect. '
                "'binary' goes with the next version.",
                logger='current',
                level=logging.WARNING,
            )
        own = 'kl'
        if isinstance(self.twi_head, DenseTWIHead):
            own = 'dense'
        elif isinstance(self.twi_head, TwoStageTWIHead):
            own = 'roi'
        kind = own if kind is None else kind
        if kind == 'dense':
            self.logit = DenseTerm(**cfg)
        elif kind == 'roi':
            self.logit = RoITerm(**cfg)
        else:
            self.logit = LogitTerm(kind=kind, **cfg)
        # Now: a student without the term's source would be told of that.
        if kind != own and not (own == 'kl' and kind in LogitTerm.KINDS):
            raise ValueError(
                f'`logit` of kind {kind!r} does not fit the teacher, whose '
                f'head is a {type(self.twi_head.head).__name__}. Remove '
                f'`kind`, or set kind={own!r}.'
            )
        modules = dict(student.named_modules())
        lacking = [s for s in self.logit.sources if s not in modules]
        if is_query_based(student):
            self._drop_logit(
                f'{type(student).__name__} predicts from queries, not from '
                'features'
            )
        elif lacking and not self._asks_for_logit:
            self._drop_logit(f'{type(student).__name__} has no {lacking[0]!r}')

    def _drop_logit(self, reason: str) -> None:
        """Go on without the term, where that was not asked for."""
        if self._asks_for_logit:
            raise ValueError(
                f'`logit` cannot be distilled: {reason}. Remove `logit`, or '
                'give both heads the same anchors and classes.'
            )
        print_log(
            f"ERA without a term on the student's own logits: {reason}.",
            logger='current',
            level=logging.WARNING,
        )
        self._leave_logit()

    def _leave_logit(self) -> None:
        self.logit = None
        if self._asks_for_targets and self.twi_steps != 'none':
            raise ValueError(
                f'`twi_targets={self.twi_targets!r}` needs the `logit` term, '
                "which this pair cannot have. Set twi_targets='labels'."
            )
        self.twi_targets = 'labels'

    def _maps(
        self, feats: Features, sources: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        """The features of some sources in a row, channels in dimension 1."""
        maps = tuple(feat for source in sources for feat in feats[source])
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
        """Build MBRNet for the pair's channels and try the head out."""
        assert teacher is not None
        self._tokens = is_query_based(teacher) and all(
            feat.dim() == 3
            for source in self.teacher_sources
            for feat in teacher_feats[source]
        )
        student_maps = self._maps(student_feats, self.feature_sources)
        teacher_maps = self._maps(teacher_feats, self.teacher_sources)
        self._check_levels(student_maps, teacher_maps)
        found = dict(
            in_channels=[m.shape[1] for m in student_maps],
            out_channels=[m.shape[1] for m in teacher_maps],
            num_levels=len(student_maps),
            spatial_dims=student_maps[0].dim() - 2,
        )
        self._take_form(is_map=bool(found['spatial_dims']))
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
        self._try_out(student_maps, teacher_maps)
        if self.logit is not None:
            self._meet_logit(student, student_feats, teacher_maps)
        if self.twi_steps != 'none' and self.mbrnet.space is not None:
            #: Running share of the teacher's variance that each estimate
            #: explains.
            self.register_buffer(
                'explained', torch.zeros(self.mbrnet.num_branches + 1)
            )

    def _take_form(self, *, is_map: bool) -> None:
        """Fill in what the config leaves to the form."""
        if self.form == 'auto':
            self.form = 'normalised' if is_map else 'released'
        defaults = self.DEFAULTS[self.form]
        mbrnet = dict(defaults['mbrnet'])
        if 'branch' not in self._mbrnet_cfg and (
            not is_map or MBRNet.RELEASED_ONLY & set(self._mbrnet_cfg)
        ):
            # Its options are of the released branches.
            mbrnet |= dict(branch='released')
        self._mbrnet_cfg = mbrnet | self._mbrnet_cfg
        if (
            self.form == 'normalised'
            and self._mbrnet_cfg['branch'] == 'released'
        ):
            self._mbrnet_cfg.setdefault('zero_init', True)
        loss = dict(defaults['loss'])
        if 'twi_on_aligned' in self._loss_cfg:
            # It says the same in the released way.
            loss.pop('twi_scales', None)
        self.loss_terms = ERALoss(**(loss | self._loss_cfg))
        if self.twi_steps == 'auto':
            self.twi_steps = defaults['twi_steps']
        if self.twi_targets == 'auto':
            self.twi_targets = defaults['twi_targets']
            if self.logit is None:
                self.twi_targets = 'labels'
            elif self.twi_targets == 'teacher' and isinstance(
                self.logit, RoITerm
            ):
                # Which compares no outputs of the RPN.
                self.twi_targets = 'both'

    def _check_levels(
        self,
        student_maps: tuple[Tensor, ...],
        teacher_maps: tuple[Tensor, ...],
    ) -> None:
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
        if problem is None:
            return
        problem = (
            f"the teacher's head ({type(self.twi_head.head).__name__}) "
            f'cannot judge the source {", ".join(self.teacher_sources)!r}: '
            f'{problem}'
        )
        if self._asks_for_twi or self._asks_for_logit:
            raise ValueError(
                f'{problem[0].upper()}{problem[1:]}. TWI needs the source '
                "that feeds the head, usually 'neck', and the config the "
                "teacher was trained with; else set twi_steps='none'."
            )
        self._leave_head(problem)

    @torch.no_grad()
    def _meet_logit(
        self,
        student: nn.Module,
        student_feats: Features,
        teacher_maps: tuple[Tensor, ...],
    ) -> None:
        assert self.logit is not None
        if self.pair_connectors and isinstance(self.logit, RoITerm):
            # Its RoI head reads what its neck gives.
            reason: str | None = 'a connector follows its neck'
        else:
            reason = self._try_logit(student, student_feats, teacher_maps)
        if reason is None:
            return
        self.student_sources = tuple(
            source
            for source in self.student_sources
            if source in self.feature_sources
            or source not in self.logit.sources
        )
        self._drop_logit(reason)

    def _try_logit(
        self,
        student: nn.Module,
        student_feats: Features,
        teacher_maps: tuple[Tensor, ...],
    ) -> str | None:
        """Why the term cannot compare this pair, if so."""
        assert self.logit is not None
        try:
            reason = self.logit.prepare(
                head=self._head,
                student=student,
                student_feats=student_feats,
                teacher_feats=teacher_maps,
            )
            if reason is None:
                said = self.logit.target(
                    self._head,
                    teacher_maps,
                    [self._head.trial_sample(teacher_maps)],
                )
                self.logit.of_student(student_feats, said)
                self.logit.of_estimate(self._head, teacher_maps, said)
        except Exception as error:
            # Heads of third parties nest their outputs as they like.
            return f'{type(error).__name__}: {error}'
        return reason

    @property
    def _head(self) -> TWIHead:
        assert self.twi_head is not None
        return self.twi_head

    # -- losses ------------------------------------------------------------

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_era_align``, ``_residual``, ``_logit``, ``_box``, ``_twi_*``.

        Those of the head only where they are on.
        """
        maps = self._maps(student_feats, self.feature_sources)
        targets = self._maps(teacher_feats, self.teacher_sources)
        for level, (s, t) in enumerate(zip(maps, targets, strict=True)):
            if s.shape[2:] != t.shape[2:]:
                raise ValueError(
                    f'Level {level}: student {tuple(s.shape)}, teacher '
                    f'{tuple(t.shape)}. Choose sources of one stride, and '
                    'compare pad_size_divisor of both data_preprocessors.'
                )
        # Sums and differences of estimates in full precision: the last
        # residuals are small.
        targets = tuple(full(t) for t in targets)
        learns = self.training and torch.is_grad_enabled()
        losses, parts = self._approximate(maps, targets, learns=learns)
        if self._proposals is not None:
            data_samples = self._proposals.attach(student_feats, data_samples)
        said = None
        if self.logit is not None:
            with torch.no_grad():
                said = self.logit.target(self._head, targets, data_samples)
                if learns:
                    self.logit.measure(said)
            terms = self.logit.of_student(student_feats, said)
            losses |= {f'loss_era_{k}': value for k, value in terms.items()}
        if self.twi_steps != 'none' and self.step % self.twi_interval == 0:
            losses |= self._twi_losses(parts, data_samples, said)
        return losses

    def _approximate(
        self,
        maps: tuple[Tensor, ...],
        targets: tuple[Tensor, ...],
        *,
        learns: bool,
    ) -> tuple[dict[str, Tensor], Parts]:
        """The feature terms, and what estimates are made of."""
        space = self.mbrnet.space
        seen = [m.detach() for m in maps] if self.detach else maps
        aligned = [full(u) for u in self.mbrnet.align(maps)]
        if space is not None:
            if learns:
                space.update(targets)
            stacked = self.mbrnet.stacked_residuals(seen)
            losses = self.loss_terms.of_shares(
                aligned=aligned,
                residuals=stacked,
                targets=space.normalize(targets),
                share_weights=space.share_weights,
            )
            parts = Parts(aligned, [d.unbind(dim=1) for d in stacked])
        else:
            parts = Parts(
                aligned,
                [
                    [full(d) for d in level]
                    for level in zip(*self.mbrnet.residuals(seen), strict=True)
                ],
            )
            # Of estimates only the values count here.
            with torch.no_grad():
                missing = [
                    residual_targets(
                        estimates=estimates_of(aligned=u, residuals=d),
                        teacher_feat=target,
                    )
                    for u, d, target in zip(*parts, targets, strict=True)
                ]
            losses = self.loss_terms(
                aligned=aligned,
                residuals=list(zip(*parts.residuals, strict=True)),
                targets=list(zip(*missing, strict=True)),
                teacher_feats=targets,
            )
        if (
            learns
            and space is not None
            and self.twi_steps != 'none'
            and self.step % EXPLAINED_EVERY == 0
        ):
            self._explain(losses)
        return losses, parts

    def _shares(self, losses: dict[str, Tensor]) -> Tensor:
        return torch.stack(
            [
                losses[f'era_unexplained_e{step}']
                for step in range(self.mbrnet.num_branches + 1)
            ]
        )

    def _explain(self, losses: dict[str, Tensor]) -> None:
        """Take a batch into the running shares that weigh TWI."""
        shares = self._shares(losses)
        all_reduce(shares, 'mean')
        self.explained.lerp_((1 - shares).clamp(0, 1), EXPLAINED_RATE)

    def _estimate(self, parts: Parts, step: int) -> list[Tensor]:
        """An estimate with its graph, on the teacher's scale."""
        start = parts.aligned
        # e_0 trains the student whether or not the branches do.
        if self.detach and step:
            start = [u.detach() for u in start]
        estimate = [
            estimates_of(aligned=u, residuals=[full(x) for x in d[:step]])[-1]
            for u, d in zip(start, parts.residuals, strict=True)
        ]
        space = self.mbrnet.space
        return estimate if space is None else space.restore(estimate)

    def _twi_losses(
        self, parts: Parts, data_samples: list, said: Any
    ) -> dict[str, Tensor]:
        last = self.mbrnet.num_branches
        weights = self.loss_terms.step_weights(last)
        chosen = [k for k, weight in enumerate(weights) if weight]
        if self.twi_steps != 'all':
            index = last
            if self.twi_steps == 'sampled':
                # Its own generator, so that the draw does not shift the
                # data's random state; by seed and step, so that a resumed
                # run and all ranks draw alike, and other seeds do not.
                generator = torch.Generator().manual_seed(
                    run_seed() * 2**31 + self.step
                )
                index = int(
                    torch.multinomial(
                        torch.tensor(weights), 1, generator=generator
                    )
                )
            chosen = [index]
            weights[index] = sum(weights)
        term = self.logit
        judged = self._head.judge(
            [self._estimate(parts, k) for k in chosen],
            data_samples,
            by_labels=self.twi_targets != 'teacher',
            term=None if self.twi_targets == 'labels' else term,
            said=said,
        )
        losses: dict[str, Tensor] = {}
        for k, terms in zip(chosen, judged, strict=True):
            weight: float | Tensor = weights[k] * self.twi_interval
            weight = self.loss_terms.twi_weight * weight
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
        """Share of the teacher's variance that each estimate leaves.

        None without a normalised space, or before anything was measured.
        """
        space = self.mbrnet.space
        if space is None or not int(space.first_batches.seen):
            return None
        maps = self._maps(student_feats, self.feature_sources)
        targets = self._maps(teacher_feats, self.teacher_sources)
        found = self.loss_terms.of_shares(
            aligned=[full(u) for u in self.mbrnet.align(maps)],
            residuals=self.mbrnet.stacked_residuals(maps),
            targets=space.normalize([full(t) for t in targets]),
            share_weights=space.share_weights,
        )
        return self._shares(found)

    def extra_flops(
        self,
        count: Callable[[Callable[[], Any]], int],
        *,
        student_feats: Features,
        teacher_feats: Features,
    ) -> float | None:
        """Of the branches, and of what the teacher's head judges.

        Passes through the frozen head have no weights to find gradients for:
        two forward passes each, and one for the teacher's own feature. A RoI
        head's regions are not counted.
        """
        maps = self._maps(student_feats, self.feature_sources)
        targets = self._maps(teacher_feats, self.teacher_sources)
        total = 3.0 * count(lambda: self.mbrnet.estimates(maps))
        if self.twi_head is None:
            return total
        head = count(lambda: self._head(targets))
        if self.logit is not None and not isinstance(self.logit, RoITerm):
            total += head
        if self.twi_steps != 'none':
            weights = self.loss_terms.step_weights(self.mbrnet.num_branches)
            judged = sum(weight > 0 for weight in weights)
            passes = judged if self.twi_steps == 'all' else 1
            total += 2.0 * passes / self.twi_interval * head
        return total

    def loss_weights(self) -> dict[str, float]:
        """Of the two feature terms, the head's terms and the student's."""
        weights = {
            'loss_era_align': self.loss_terms.align_weight,
            'loss_era_residual': self.loss_terms.residual_weight,
        }
        if self.twi_steps != 'none':
            weights['loss_era_twi_*'] = self.loss_terms.twi_weight
        if self.logit is not None:
            weights |= {
                f'loss_era_{name}': weight
                for name, weight in self.logit.loss_weights().items()
            }
        return weights

    def is_complete(self, step: int) -> bool:
        """Not in the iterations that TWI leaves out."""
        return self.twi_steps == 'none' or step % self.twi_interval == 0

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
