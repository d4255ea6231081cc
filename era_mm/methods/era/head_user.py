"""Finds the usable head of the teacher, or the reason to go without it."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ...core import BaseDistiller, Features, MeasuredPair
from ...core.classes import why_other_classes
from ...core.host_models import is_query_based
from ...core.utils import preserve_rng
from ...heads import (
    DetectorTerm,
    LogitTerm,
    RoITerm,
    StudentProposals,
    TWIHead,
    TwoStageTWIHead,
    find_head,
    term_for,
    why_not_comparable,
    why_not_reused,
    with_loss_of,
)
from .mbrnet import MBRNet


class HeadUser(BaseDistiller):
    """Finds the teacher's head and tests it before the first step.

    Settings that are not possible are dropped with a message if they are
    defaults, and refused if the config sets them. ``ERADistiller`` describes
    the arguments.

    Source: ours.
    """

    #: Gradients pass through its head, and its space is measured once.
    needs_frozen_teacher = True
    mbrnet: MBRNet
    TWI_STEPS = ('auto', 'all', 'last', 'sampled', 'none')
    TWI_PLACES = ('head', 'predictors')
    TWI_TARGETS = ('auto', 'labels', 'teacher', 'both')

    def __init__(
        self,
        source: str | list | dict,
        teacher: str,
        schedules: dict[str, dict] | None,
        init_cfg: dict | None,
        *,
        form: str,
        twi_steps: str,
        twi_targets: str,
        twi_place: str,
        logit: Mapping | str | None,
    ) -> None:
        super().__init__(source, teacher, schedules, init_cfg)
        for name, choice, choices in (
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
        self.form = form
        self.twi_steps = twi_steps
        self.twi_targets = twi_targets
        self.twi_place = twi_place
        self._logit_cfg = logit
        self.logit: LogitTerm | DetectorTerm | None = None
        self.feature_sources: tuple[str, ...] = self.student_sources
        self.twi_head: TWIHead | None = None
        self._proposals: StudentProposals | None = None
        # Why a pair does not have modes through the head, or no ST.
        self._no_modes = self._no_blend = ''
        #: Whether the teacher's head must not judge, by its classes.
        self.left_predictions = False
        self._left_out: dict[str, str] = {}
        # What must be there, or else the pair is refused.
        self._asks_for_twi = twi_steps not in ('auto', 'none')
        self._asks_for_logit = isinstance(logit, Mapping)
        self._asks_for_targets = twi_targets in ('teacher', 'both')

    @staticmethod
    def why_no_twi(pair: MeasuredPair) -> str | None:
        """The reason why the teacher's head cannot judge, or None."""
        student, teacher = pair.student, pair.teacher
        reason = why_not_reused(student.model, teacher.model)
        if reason is not None:
            return reason
        reason = why_other_classes(student.classes, teacher.classes)
        if reason is not None:
            return reason
        head = find_head(teacher.model)
        assert head is not None
        _, teacher_feats = pair.match(cover=True).feats()
        with torch.no_grad(), preserve_rng():
            reason = head.why_not_judged(teacher_feats, training=True)
        return reason and f'{type(head.head).__name__}: {reason}'

    def _find_head(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the teacher's head, and how to blend the student's with it."""
        head = find_head(teacher, self.twi_place)
        reason = why_not_comparable(student, teacher)
        if reason is None and head is None:
            reason = (
                f'TWI cannot use the head of {type(teacher).__name__}: it '
                'needs `bbox_head` (dense), `rpn_head` and `roi_head` '
                '(two-stage) or `head` (classifier) with `loss` and `predict`'
            )
        if reason is None and isinstance(head, TwoStageTWIHead):
            head = self._two_stage(head, student)
        if reason is None and type(head) is TWIHead:
            head = self._with_students_loss(head, student)
        if head is None or reason is not None:
            if reason is not None:
                self._leave_head(reason)
            return
        # The blend needs the student's features as its own head gets them.
        student_head = find_head(student, self.twi_place)
        if student_head is None:
            self._no_blend = (
                f'the head of {type(student).__name__} cannot be blended'
            )
        elif self.connections.resamplers:
            self._no_blend = "the student's feature is resampled"
        if getattr(student, 'with_mask', False) and not (
            isinstance(head, TwoStageTWIHead) and head.has_masks
        ):
            self._no_modes = (
                'the student predicts masks, but '
                f'{type(head.head).__name__}, which is reused of the '
                'teacher, does not'
            )
            print_log(
                f'ERA without the modes T, ST and E0 ...: {self._no_modes}.',
                logger='current',
                level=logging.WARNING,
            )
        self.twi_head = head

    @staticmethod
    def _with_students_loss(head: TWIHead, student: nn.Module) -> TWIHead:
        found = with_loss_of(student, head)
        if found is None:
            print_log(
                "TWI by the labels takes the loss of the teacher's "
                f"{type(head.head).__name__}, not the student's: they are not "
                'heads of one kind.',
                logger='current',
            )
        return found or head

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

    @property
    def _term(self) -> LogitTerm | DetectorTerm | None:
        """The term for TWI and for the student's own logits, if it counts."""
        return None if self.left_predictions else self.logit

    @property
    def _own_term(self) -> LogitTerm | DetectorTerm | None:
        """The term on the student's own logits, where it counts."""
        return None if 'logit' in self._left_out else self._term

    @property
    def uses_predictions(self) -> bool:
        """Whether there is TWI, or a term on the student's own logits."""
        return self.twi_steps != 'none' or self._own_term is not None

    def leave_predictions(self, reason: str) -> None:
        """Go on without TWI and without terms on the student's own logits.

        Raises:
            ValueError: The config asks for one of them by name.
        """
        asked = {
            f'twi_steps={self.twi_steps!r}': self._asks_for_twi,
            f'twi_targets={self.twi_targets!r}': self._asks_for_targets
            and self.twi_steps != 'none',
            '`logit`': self._asks_for_logit,
        }
        for name, is_asked in asked.items():
            if is_asked:
                raise ValueError(
                    f"{name} asks for what the teacher's head says, but "
                    f'{reason}. Leave it out for ERA on features alone.'
                )
        parts = ['TWI'] if self.twi_steps != 'none' else []
        if self._own_term is not None:
            parts.append("terms on the student's own logits")
        print_log(
            f'ERA without {" and ".join(parts)}: {reason}. Where only their '
            "names differ, set `same_classes=True` in the teacher's config.",
            logger='current',
            level=logging.WARNING,
        )
        self.twi_steps = 'none'
        # The term stays, as its units are in the files.
        self.left_predictions = True
        self._no_modes = reason

    def _leave_head(self, reason: str) -> None:
        """Go on without the teacher's head, unless the config sets it."""
        if self._asks_for_logit:
            raise ValueError(
                f'`logit` cannot be distilled: {reason}. Remove `logit`.'
            )
        if self._asks_for_twi:
            raise ValueError(
                f"`twi_steps={self.twi_steps!r}` needs the teacher's head to "
                f'judge estimates, but {reason}. Remove `twi_steps`, or set '
                "twi_steps='none'."
            )
        if self._asks_for_targets and self.twi_steps != 'none':
            raise ValueError(
                f"`twi_targets={self.twi_targets!r}` needs the teacher's head "
                f'to judge estimates, but {reason}. Remove `twi_targets`.'
            )
        parts = ['TWI'] if self.twi_steps != 'none' else []
        self._left_out |= {'TWI': reason} if parts else {}
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
        self._no_modes = reason
        self._left_out['logit'] = reason
        self._leave_logit(reason)

    def _choose_logit(self, student: nn.Module) -> None:
        """The term for TWI by the teacher and for the student's own head."""
        if self._logit_cfg is None or self.twi_head is None:
            return
        if (
            self.form == 'released'
            and not self._asks_for_logit
            and type(self.twi_head) is not TWIHead
        ):
            # The released code has a term for the logits of classifiers.
            if not self._asks_for_targets:
                return
            self._left_out['logit'] = 'released form'
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
                'own scores, boxes are also distilled (`box_weight`), '
                'and `temperature` and `source` have no effect. '
                "'binary' will be removed in version 0.3.",
                logger='current',
                level=logging.WARNING,
            )
        # Now: a student without the term's source would be told of that.
        self.logit = term_for(self.twi_head, kind, **cfg)
        if 'logit' in self._left_out:
            return
        modules = dict(student.named_modules())
        lacking = [s for s in self.logit.sources if s not in modules]
        if is_query_based(student):
            self._leave_own_logit(
                f'{type(student).__name__} predicts from queries, not from '
                'features'
            )
        elif lacking and not self._asks_for_logit:
            self._leave_own_logit(
                f'{type(student).__name__} has no {lacking[0]!r}'
            )

    def _leave_own_logit(self, reason: str) -> None:
        """Leave the student's own head out, unless the config sets it.

        TWI can still use the term: it compares the teacher's head on an
        estimate with the same head on the teacher's feature.
        """
        if self._asks_for_logit:
            raise ValueError(
                f'`logit` cannot be distilled: {reason}. Remove `logit`, or '
                'give both models heads whose outputs can be compared.'
            )
        print_log(
            f"ERA without a term on the student's own logits: {reason}.",
            logger='current',
            level=logging.WARNING,
        )
        self._left_out['logit'] = reason

    def _leave_logit(self, reason: str) -> None:
        """Go on without the term, also in TWI, unless the config asks."""
        self.logit = None
        if self._asks_for_targets and self.twi_steps != 'none':
            raise ValueError(
                f'`twi_targets={self.twi_targets!r}` compares with the '
                "teacher's outputs by the `logit` term, which is not possible "
                f"for this teacher: {reason}. Set twi_targets='labels'."
            )
        self.twi_targets = 'labels'

    @torch.no_grad()
    def _try_head(self, teacher_maps: tuple[Tensor, ...]) -> None:
        """Let the head judge the teacher's features of the dry run."""
        reason = self._why_resampled() or self._head.why_not_judged(
            teacher_maps, training=self.twi_steps != 'none'
        )
        if reason is None:
            return
        reason = (
            f"the teacher's head ({type(self._head.head).__name__}) "
            f'cannot judge the source {", ".join(self.teacher_sources)!r}: '
            f'{reason}'
        )
        if self._asks_for_twi or self._asks_for_logit:
            raise ValueError(
                f'{reason[0].upper()}{reason[1:]}. TWI needs the source '
                "that feeds the head, usually 'neck', and the config the "
                "teacher was trained with; else set twi_steps='none'."
            )
        self._leave_head(reason)

    def _why_resampled(self) -> str | None:
        """How a detector's head gets other levels than its neck gives."""
        resampler = self.connections.resamplers.get('teacher')
        if resampler is None or type(self._head) is TWIHead:
            return None
        levels = resampler.levels or ()
        if levels == tuple(range(len(levels))) and all(
            scale == 1 for scale in resampler.scales or ()
        ):
            return None
        return (
            'it expects the levels as its neck gives them, and '
            f'`source.resample` changes them ({"; ".join(resampler.steps())})'
        )

    @torch.no_grad()
    def _meet_logit(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_feats: Features,
        teacher_maps: tuple[Tensor, ...],
    ) -> None:
        """Prepare the term for the pair, or for TWI alone."""
        assert self.logit is not None
        # Not `twi_head`, which may have the student's loss.
        head = find_head(teacher, self.twi_place)
        assert head is not None
        reason: str | None
        if 'logit' not in self._left_out:
            if self.connections.resamplers and isinstance(self.logit, RoITerm):
                # Its RoI head reads what its neck gives.
                reason = 'the outputs of its neck are resampled'
            else:
                reason = self._try_logit(
                    head, student, student_feats, teacher_maps
                )
            if reason is None:
                return
            self.student_sources = tuple(
                source
                for source in self.student_sources
                if source in self.feature_sources
                or source not in self.logit.sources
            )
            self._leave_own_logit(reason)
        if self.twi_steps == 'none' or self.twi_targets == 'labels':
            self.logit = None
            return
        reason = self._try_logit(head, None, student_feats, teacher_maps)
        if reason is not None:
            self._leave_logit(reason)
            print_log(
                f"TWI: the teacher's {type(head.head).__name__} judges "
                'estimates by the labels, because its own outputs cannot be '
                f'compared: {reason}.',
                logger='current',
                level=logging.WARNING,
            )

    @torch.no_grad()
    def _meet_two_stages(self, teacher_maps: tuple[Tensor, ...]) -> None:
        """Let the teacher judge its RPN as well, or the labels.

        Masks are judged by the labels alone, and so is an RPN whose scores
        cannot be compared. So the default is 'both' with one of these.
        """
        head, term = self.twi_head, self.logit
        if (
            not isinstance(head, TwoStageTWIHead)
            or not isinstance(term, RoITerm)
            or self.twi_steps == 'none'
            or self.twi_targets == 'labels'
        ):
            return
        reasons = []
        reason = term.add_rpn(head, teacher_maps)
        if reason is not None:
            reasons.append(f'those of its RPN cannot be compared: {reason}')
        if head.has_masks:
            reasons.append('its masks are judged by labels alone')
        if not reasons or self.twi_targets == 'both':
            return
        judged = 'by its own outputs without the rest'
        if not self._asks_for_targets:
            self.twi_targets = 'both'
            judged = 'by the labels as well as by its own outputs'
        print_log(
            f"TWI: the teacher's {type(head.head).__name__} judges estimates "
            f'{judged}, because {" and ".join(reasons)}.',
            logger='current',
            level=logging.WARNING,
        )

    def _try_logit(
        self,
        head: TWIHead,
        student: nn.Module | None,
        student_feats: Features,
        teacher_maps: tuple[Tensor, ...],
    ) -> str | None:
        """The reason why the term cannot be used, or None.

        Without a student, for the teacher's head on both sides.
        """
        assert self.logit is not None
        try:
            reason = self.logit.prepare(
                head=head,
                student=student,
                student_feats=student_feats,
                teacher_feats=teacher_maps,
            )
            if reason is None:
                said: Any = self.logit.target(
                    head, teacher_maps, [head.trial_sample(teacher_maps)]
                )
                if student is not None:
                    self.logit.of_student(student_feats, said)
                self.logit.of_estimate(head, teacher_maps, said)
        except Exception as error:
            # Heads of third parties nest their outputs as they like.
            return f'{type(error).__name__}: {error}'
        return reason

    def uses(self) -> tuple[str, ...]:
        """Who judges the estimates, and whether the student's head learns."""
        reason = self._left_out.get('TWI', "twi_steps='none'")
        judge = f'off ({reason})'
        if self.twi_steps != 'none':
            by = {
                'labels': 'the labels',
                'teacher': "the teacher's own outputs",
                'both': "the labels and the teacher's own outputs",
            }[self.twi_targets]
            heads = self._head.heads
            term = self.logit
            if (
                self.twi_targets == 'teacher'
                and isinstance(term, RoITerm)
                and term.rpn is None
            ):
                heads = heads[1:]
            names = ' and '.join(type(head).__name__ for head in heads)
            judge = (
                f"the teacher's {names} judge{'s' * (len(heads) == 1)} "
                f'estimates by {by}'
            )
        reason = 'logit=None' if self._logit_cfg is None else 'released form'
        own = f'no terms ({self._left_out.get("logit", reason)})'
        if self.logit is not None and 'logit' not in self._left_out:
            own = ', '.join(f'loss_era_{k}' for k in self.logit.loss_weights())
        return f'TWI: {judge}', f"the student's own head: {own}"

    def inference_modes(self) -> tuple[str, ...]:
        """'E0' ... 'E(n-1)', 'T' (which is e_n) and 'ST'.

        None if the teacher's head cannot be used, predicts less than the
        student's or knows other classes; no 'ST' if the student's cannot be
        used.
        """
        if self.twi_head is None or self._no_modes:
            return ()
        return (*self._estimates(), *([] if self._no_blend else ['ST']))

    def absent_modes(self) -> dict[str, str]:
        """All of them without the teacher's head, or 'ST' alone."""
        if self._no_modes:
            return dict.fromkeys((*self._estimates(), 'ST'), self._no_modes)
        return {'ST': self._no_blend} if self._no_blend else {}

    def _estimates(self) -> list[str]:
        """The modes that are an estimate through the teacher's head."""
        return [f'E{i}' for i in range(self.mbrnet.num_branches)] + ['T']

    @property
    def _head(self) -> TWIHead:
        assert self.twi_head is not None
        return self.twi_head
