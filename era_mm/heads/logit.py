"""Distillation of the logits of classifiers.

``dense_term`` and ``roi_term`` have the same for detectors. A term compares
the teacher's outputs with the student's own, or with those of the teacher's
head on an estimate.

Legend: N batch, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..core import Features
from ..layers import (
    dist_loss,
    dkd_loss,
    full_precision,
    kl_loss,
    standardise_logits,
)
from ..registry import explain_unknown_keys
from .twi_heads import TWIHead


def is_trained_by_sigmoid(head: nn.Module | None) -> bool:
    """Whether a classifier's head is trained with a sigmoid per class."""
    loss = getattr(head, 'loss_module', None)
    # LabelSmoothLoss keeps its cross-entropy inside, FocalLoss has no switch.
    return type(loss).__name__ == 'FocalLoss' or any(
        getattr(part, 'use_sigmoid', False)
        for part in (loss, getattr(loss, 'ce', None))
    )


class SaidOfClasses(NamedTuple):
    """The teacher's outputs for a batch.

    Args:
        logits: Its logits, ``(N, K)``.
        labels: The true classes, ``(N,)``; None if the kind does not need
            them.
    """

    logits: Tensor
    labels: Tensor | None


@explain_unknown_keys
class LogitTerm:
    """Distillation of a classifier's logits.

        weight * loss of the (N, K) logits

    Args:
        kind: 'kl', 'dist' or 'dkd'.
        weight: Its weight. 2 is ERA's [official code].
        temperature: tau. 1 is ERA's [official code].
        standardise: Whether both logits are standardised first
            (:func:`~era_mm.layers.standardise_logits`).
        alpha: Weight of the true class, 'dkd' only. None: 1.
        beta: Weight of the other classes, 'dkd' only. None: 8.
        source: The student's module that outputs the logits.

    Raises:
        ValueError: An unknown kind, a weight below 0, a temperature that is
            not above 0, or ``alpha`` or ``beta`` for another kind.
    """

    KINDS: ClassVar[dict[str, Callable]] = {
        'kl': kl_loss,
        'dist': dist_loss,
        'dkd': dkd_loss,
    }

    def __init__(
        self,
        kind: str = 'kl',
        weight: float = 2.0,
        temperature: float = 1.0,
        standardise: bool = False,
        alpha: float | None = None,
        beta: float | None = None,
        source: str = 'head',
    ) -> None:
        if kind not in self.KINDS:
            raise ValueError(
                '`logit.kind` must be one of '
                f'{sorted([*self.KINDS, "dense", "roi"])}, but got {kind!r}.'
            )
        if weight < 0 or temperature <= 0:
            raise ValueError(
                '`logit` needs a weight of at least 0 and a temperature above '
                f'0, but got {weight} and {temperature}.'
            )
        shares = {
            key: value
            for key, value in (('alpha', alpha), ('beta', beta))
            if value is not None
        }
        if shares and kind != 'dkd':
            raise ValueError(
                f"`logit.{next(iter(shares))}` is for kind 'dkd', but the "
                f'kind is {kind!r}. Remove it.'
            )
        self.kind, self.weight = kind, weight
        self.standardise = standardise
        self.temperature = temperature
        self._settings: dict[str, Any] = dict(temperature=temperature) | shares
        self.sources: tuple[str, ...] = (source,)

    def prepare(
        self,
        *,
        head: TWIHead,
        student: nn.Module | None,
        student_feats: Features,
        teacher_feats: Sequence[Tensor],
    ) -> str | None:
        """The reason why the logits cannot be compared, or None.

        Without a student the teacher's head is compared with itself, by
        ``of_estimate``.
        """
        if type(head) is not TWIHead:
            return (
                f'{self.kind!r} is for the logits of classifiers, and the '
                f'teacher has a {type(head.head).__name__}'
            )
        kinds = [kind.__name__ for kind in type(head.head).__mro__]
        if 'MultiLabelClsHead' in kinds:
            return f"the teacher's {kinds[0]} may give several classes"
        modules: dict[str, nn.Module | None] = {"teacher's": head.head}
        if student is not None:
            named = dict(student.named_modules())
            modules["student's"] = named.get(self.sources[0])
        for role, module in modules.items():
            if is_trained_by_sigmoid(module):
                return (
                    f'the {role} {type(module).__name__} was trained with a '
                    'sigmoid per class, so no softmax applies to its logits'
                )
        logits = head(teacher_feats)
        if not isinstance(logits, Tensor):
            return (
                f"the teacher's {type(head.head).__name__} gives a "
                f'{type(logits).__name__}, not the logits of classes'
            )
        if student is None:
            return None
        own = tuple(student_feats[self.sources[0]][0].shape)
        theirs = tuple(logits.shape)
        if own != theirs:
            return (
                f"the student's {self.sources[0]!r} gives {own} and the "
                f"teacher's head {theirs}"
            )
        return None

    def loss_weights(self) -> dict[str, float]:
        """The weight of each term by its name."""
        return {'logit': self.weight}

    def target(
        self, head: TWIHead, teacher_feats: Sequence[Tensor], samples: list
    ) -> SaidOfClasses:
        """The teacher's logits.

        Raises:
            ValueError: An image without a single true class, for 'dkd'.
        """
        logits = head(teacher_feats)
        if self.kind != 'dkd':
            return SaidOfClasses(logits, None)
        labels = [sample.get('gt_label') for sample in samples]
        if any(label is None or label.numel() != 1 for label in labels):
            raise ValueError(
                "`logit` of kind 'dkd' needs a single true class for each "
                'image, and these have none (mixed images have two). Remove '
                "batch augmentation, or set kind='kl'."
            )
        return SaidOfClasses(logits, torch.cat(labels).to(logits.device))

    def measure(self, said: SaidOfClasses) -> None:
        """No effect: logits have no unit."""

    def of_student(
        self, student_feats: Features, said: SaidOfClasses
    ) -> dict[str, Tensor]:
        """The term of the student's own head."""
        return self.of_outputs(student_feats[self.sources[0]][0], said)

    def of_estimate(
        self, head: TWIHead, feats: Sequence[Tensor], said: SaidOfClasses
    ) -> dict[str, Tensor]:
        """The term of the teacher's head on an estimate."""
        return self.of_outputs(head(feats), said)

    def of_outputs(
        self, logits: Tensor, said: SaidOfClasses
    ) -> dict[str, Tensor]:
        """The term of logits."""
        pair = [full_precision(logits), full_precision(said.logits)]
        if self.standardise:
            pair = [standardise_logits(one) for one in pair]
        settings = dict(self._settings)
        if said.labels is not None:
            settings['labels'] = said.labels
        loss = self.KINDS[self.kind](
            student_logits=pair[0], teacher_logits=pair[1], **settings
        )
        return {'logit': self.weight * loss}
