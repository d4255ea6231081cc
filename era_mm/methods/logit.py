"""Logit distillation: the outputs of the teacher's head as targets.

Legend: N batch, K classes, L levels.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from mmengine.config import ConfigDict
from torch import Tensor, nn

from ..core import BaseDistiller, Features, MeasuredPair, Plan
from ..core.classes import why_other_classes
from ..core.host_models import is_query_based
from ..core.utils import evaluating, preserve_rng
from ..heads import (
    DenseTerm,
    DetectorTerm,
    LogitTerm,
    RoITerm,
    StudentProposals,
    TWIHead,
    find_head,
    kind_for,
    term_for,
    why_not_reused,
)
from ..registry import MODELS

#: Names of the terms.
NAMES = {'logit': 'loss_logit_score', 'box': 'loss_logit_box'}


def source_of_head(model: nn.Module) -> str:
    """The module whose output is the input of a model's head."""
    return 'backbone' if getattr(model, 'neck', None) is None else 'neck'


@MODELS.register_module()
class LogitDistiller(BaseDistiller):
    """Distils the outputs of the teacher's head into the student's own head.

    The kinds, by head:

    - 'kl', 'dist', 'dkd' (classifiers): KL of the softmax (Hinton et al.),
      DIST's correlations, DKD's decoupled KL; ``standardise=True`` is logit
      standardisation before any of them.
    - 'dense' (dense heads): sigmoid scores, KL by class, and boxes, at the
      anchors where the teacher is most confident.
    - 'roi' (RoI heads): softmax scores and boxes at the student's proposals.

    It has no trainable parameters.

    Source: KL: arXiv 1503.02531; DIST: arXiv 2205.10536; DKD: arXiv
    2203.08679; logit standardisation: arXiv 2403.01427. 'dense' and 'roi' are
    [ours], the same terms that ERA uses; see ``era_mm.heads.DetectorTerm``.

    Args:
        logit: Arguments of ``LogitTerm``, ``DenseTerm`` or ``RoITerm``, with
            ``kind``; None: the kind of the head. Defaults of weight and
            temperature are those of the released CIFAR-100 recipes:

            - 'kl': 0.9 and 4 (with 0.1 on the labels);
            - 'kl' with ``standardise``: 9 and 2 (with 0.1);
            - 'dist': 2 and 4 (1 on ImageNet);
            - 'dkd': 1 and 4, alpha 1, beta 8, which depends on the pair (0.5
              and 1 on ImageNet). Set its ramp over 20 epochs in
              ``schedules``.

            'dense' and 'roi': 1, for scores and for boxes [ours].
        label_weight: Factor on the label loss of a classifier's head. 1: the
            student's own losses do not change. ``make_config`` writes that of
            the recipe.
        teacher: Name of the teacher.
        schedules: Schedules of ``loss_logit_score`` and
            ``loss_logit_box``; see ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        ValueError: A pair whose outputs cannot be compared (different classes
            or anchors, a RoI head without the student's proposals), or a
            ``label_weight`` for a model that is not a classifier.
    """

    #: Defaults of the released recipes that differ from the term's own.
    PUBLISHED: ClassVar[dict[str, dict[str, float]]] = {
        'kl': dict(weight=0.9, temperature=4.0),
        'standardised': dict(weight=9.0, temperature=2.0),
        'dist': dict(weight=2.0, temperature=4.0),
        'dkd': dict(weight=1.0, temperature=4.0),
    }
    #: These recipes for classifiers as ``--method`` names them, with the
    #: arguments that differ from the defaults.
    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {
        'kl': dict(label_weight=0.1),
        'dist': dict(logit=dict(kind='dist')),
        'dkd': dict(logit=dict(kind='dkd')),
        'lskd': dict(
            logit=dict(kind='kl', standardise=True), label_weight=0.1
        ),
    }

    def __init__(
        self,
        logit: dict | None = None,
        label_weight: float = 1.0,
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__('head', teacher, schedules, init_cfg)
        if label_weight < 0:
            raise ValueError(
                f'`label_weight` must not be negative, but got {label_weight}.'
            )
        self.label_weight = label_weight
        self._settings = dict(logit or {})
        self.head: TWIHead
        self.term: LogitTerm | DetectorTerm
        self._proposals: StudentProposals | None = None

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """The kind for the teacher's head, with the recipe of 'kl'.

        Raises:
            ValueError: The outputs cannot be compared.
        """
        return cls._plan(pair, {} if pair.is_detector else cls.RECIPES['kl'])

    @classmethod
    def recipes(cls) -> dict[str, Callable[[MeasuredPair], Plan]]:
        """Those of ``RECIPES``; a ValueError if the pair are detectors."""
        return {name: partial(cls._plan_recipe, name) for name in cls.RECIPES}

    @classmethod
    def _plan_recipe(cls, name: str, pair: MeasuredPair) -> Plan:
        if pair.is_detector:
            raise ValueError(
                f'{name!r} is for the logits of two classifiers, but '
                f'{pair.student.name} is a detector. Take --method logit, '
                'which compares scores and boxes.'
            )
        return cls._plan(pair, cls.RECIPES[name])

    @classmethod
    def _plan(cls, pair: MeasuredPair, settings: Mapping[str, Any]) -> Plan:
        student, teacher = pair.student, pair.teacher
        reason = _why_not(student.model, teacher.model)
        reason = reason or why_other_classes(student.classes, teacher.classes)
        if reason is not None:
            raise ValueError(
                f'Logits cannot be distilled: {reason}. Take a '
                'method on features.'
            )
        head = find_head(teacher.model)
        assert head is not None
        kind = settings.get('logit', {}).get('kind', kind_for(head))
        about = f'its outputs are distilled ({type(head.head).__name__}'
        about = f'{about}, {kind!r})'
        if 'label_weight' in settings:
            about += f'; the labels weigh {settings["label_weight"]:g}'
        return Plan(
            dict(type=f'era_mm.{cls.__name__}', **copy.deepcopy(settings)),
            pair.match(),
            head=about,
        )

    def student_config(self, config: ConfigDict) -> ConfigDict:
        """The given student with the labels' loss weighted."""
        if self.label_weight == 1:
            return config
        if 'head' not in config:
            raise ValueError(
                '`label_weight` is for the head of a classifier, but '
                f'{config.get("type")} has none. Omit it, and set the '
                "loss weights in the student's own config."
            )
        config = copy.deepcopy(config)
        # The default of mmpretrain's heads.
        loss = config.head.setdefault('loss', dict(type='CrossEntropyLoss'))
        loss['loss_weight'] = self.label_weight * loss.get('loss_weight', 1.0)
        return config

    @property
    def feature_pairs(self) -> tuple[tuple[str, str], ...]:
        """None: features are only what the heads read."""
        return ()

    @property
    def uses_predictions(self) -> bool:
        """Always: it has no other term."""
        return True

    # -- meeting the pair --------------------------------------------------

    def choose_sources(
        self, *, student: nn.Module, teacher: nn.Module | None
    ) -> None:
        """Find the teacher's head, and the sources for its kind."""
        assert teacher is not None
        reason = _why_not(student, teacher)
        head = find_head(teacher)
        if reason is not None or head is None:
            raise self._refusal(reason or 'the teacher has no head for that')
        self.head = head
        self.term = self._term(head)
        self.teacher_sources = (source_of_head(teacher),)
        if isinstance(self.term, RoITerm):
            self._proposals = StudentProposals(student)
            self.student_sources = (
                source_of_head(student),
                *self._proposals.SOURCES,
            )
        else:
            self.student_sources = self.term.sources
        if isinstance(self.term, DetectorTerm):
            # Of MutualDistillation.
            self.term.moves = any(
                value.requires_grad for value in teacher.parameters()
            )

    def _term(self, head: TWIHead) -> LogitTerm | DetectorTerm:
        settings = dict(self._settings)
        kind = settings.pop('kind', None) or kind_for(head)
        key = kind
        if kind == 'kl' and settings.get('standardise'):
            key = 'standardised'
        return term_for(head, kind, **(self.PUBLISHED.get(key, {}) | settings))

    @staticmethod
    def _refusal(reason: str) -> ValueError:
        return ValueError(
            f'Logits cannot be distilled: {reason}. Take a method on '
            'features, or heads with the same classes and anchors.'
        )

    @torch.no_grad()
    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Check that the outputs of the two heads can be compared."""
        feats = self._read(student_feats, teacher_feats)
        try:
            with self._resting(), preserve_rng():
                reason = self.term.prepare(
                    head=self.head,
                    student=student,
                    student_feats=student_feats,
                    teacher_feats=feats,
                )
                if reason is None:
                    samples = [self.head.trial_sample(feats)]
                    said: Any = self.term.target(self.head, feats, samples)
                    self.term.of_student(student_feats, said)
        # Heads of third parties nest their outputs as they like.
        except Exception as error:
            raise self._refusal(f'{type(error).__name__}: {error}') from error
        if reason is not None:
            raise self._refusal(reason)

    def _read(
        self, student_feats: Features, teacher_feats: Features
    ) -> tuple[Tensor, ...]:
        """What the teacher's head reads, as large as the student's maps."""
        feats = teacher_feats[self.teacher_sources[0]]
        if not isinstance(self.term, DenseTerm):
            return feats
        # Other padding, at the right and at the bottom.
        scores = student_feats[self.student_sources[0]]
        return tuple(
            feat[..., : score.shape[2], : score.shape[3]]
            for feat, score in zip(feats, scores, strict=False)
        )

    @contextlib.contextmanager
    def _resting(self) -> Iterator[None]:
        """Put the teacher's head in eval mode: a peer is in train mode."""
        with contextlib.ExitStack() as stack:
            for head in self.head.heads:
                stack.enter_context(evaluating(head))
            yield

    # -- losses ------------------------------------------------------------

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_logit_score`` and, of detectors, ``loss_logit_box``."""
        if self._proposals is not None:
            data_samples = self._proposals.attach(student_feats, data_samples)
        feats = self._read(student_feats, teacher_feats)
        with torch.no_grad(), self._resting():
            said: Any = self.term.target(self.head, feats, data_samples)
            if self.training and isinstance(self.term, DetectorTerm):
                self.term.measure(said)
        terms = self.term.of_student(student_feats, said)
        return {NAMES[key]: value for key, value in terms.items()}

    def loss_weights(self) -> dict[str, float]:
        """Weights of scores and, for detectors, boxes."""
        weights = self.term.loss_weights()
        return {NAMES[key]: value for key, value in weights.items()}

    def extra_flops(
        self,
        count: Callable[[Callable[[], Any]], int],
        *,
        student_feats: Features,
        teacher_feats: Features,
    ) -> float | None:
        """FLOPs of the teacher's head; not known for a RoI head."""
        if isinstance(self.term, RoITerm):
            return None
        feats: Sequence[Tensor] = self._read(student_feats, teacher_feats)
        return count(lambda: self.head(feats))


def _why_not(student: nn.Module, teacher: nn.Module) -> str | None:
    """The reason why the outputs cannot be compared, or None."""
    if is_query_based(student):
        return f'{type(student).__name__} predicts from queries'
    return why_not_reused(student, teacher)
