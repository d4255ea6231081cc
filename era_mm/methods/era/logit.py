"""What the teacher's head says, for the student's own: classifiers.

``detector_terms`` has the same for detectors. A term compares outputs with
the teacher's: the student's own, or those of the teacher's head on an
estimate.

Legend: N batch, K classes.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...core import Features
from ...layers import dist_loss, kl_loss
from ...registry import explain_unknown_keys
from .twi_heads import TWIHead


def full(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@explain_unknown_keys
class LogitTerm:
    """ERA's distillation of a classifier's logits.

        loss_era_logit = weight * loss of the (N, K) logits

    Args:
        kind: 'kl' or 'dist'.
        weight: Its weight. 2 is [official code].
        temperature: tau. 1 is [official code].
        source: The student's module whose output the logits are.

    Raises:
        ValueError: An unknown kind, a weight below 0, a temperature that is
            not above 0.
    """

    KINDS: ClassVar[dict[str, Callable]] = {'kl': kl_loss, 'dist': dist_loss}

    def __init__(
        self,
        kind: str = 'kl',
        weight: float = 2.0,
        temperature: float = 1.0,
        source: str = 'head',
    ) -> None:
        if kind not in self.KINDS:
            raise ValueError(
                "`logit.kind` must be one of ['dense', 'dist', 'kl', 'roi'], "
                f'but got {kind!r}.'
            )
        if weight < 0 or temperature <= 0:
            raise ValueError(
                '`logit` needs a weight of at least 0 and a temperature above '
                f'0, but got {weight} and {temperature}.'
            )
        self.kind, self.weight = kind, weight
        self.temperature = temperature
        self.sources: tuple[str, ...] = (source,)

    def prepare(
        self,
        *,
        head: TWIHead,
        student: nn.Module,
        student_feats: Features,
        teacher_feats: Sequence[Tensor],
    ) -> str | None:
        """Why the logits of a pair cannot be compared, if so."""
        if type(head) is not TWIHead:
            return (
                f'{self.kind!r} is for the logits of classifiers, and the '
                f'teacher has a {type(head.head).__name__}'
            )
        kinds = [kind.__name__ for kind in type(head.head).__mro__]
        if 'MultiLabelClsHead' in kinds:
            return f"the classes of the teacher's {kinds[0]} may be several"
        own = tuple(student_feats[self.sources[0]][0].shape)
        logits = head(teacher_feats)
        if not isinstance(logits, Tensor):
            return (
                f"the teacher's {type(head.head).__name__} gives a "
                f'{type(logits).__name__}, not the logits of classes'
            )
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
    ) -> Tensor:
        """The teacher's logits."""
        return head(teacher_feats)

    def measure(self, said: Tensor) -> None:
        """Nothing: logits have no unit."""

    def of_student(
        self, student_feats: Features, said: Tensor
    ) -> dict[str, Tensor]:
        """The term of the student's own head."""
        return self._compare(student_feats[self.sources[0]][0], said)

    def of_estimate(
        self, head: TWIHead, feats: Sequence[Tensor], said: Tensor
    ) -> dict[str, Tensor]:
        """The term of the teacher's head on an estimate."""
        return self._compare(head(feats), said)

    def _compare(self, logits: Tensor, said: Tensor) -> dict[str, Tensor]:
        loss = self.KINDS[self.kind](
            student_logits=full(logits),
            teacher_logits=full(said),
            temperature=self.temperature,
        )
        return {'logit': self.weight * loss}
