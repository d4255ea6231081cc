"""Bounded distances between factors, with their signs.

Legend: N batch, D = C * H * W numbers of a factor.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from ...layers import full_precision
from ...registry import explain_unknown_keys

#: D of the pair for which the weights were tuned: 32 channels on 8x8.
#: [official code], its CIFAR factors
REFERENCE_SIZE = 2048


def unit(feat: Tensor) -> Tensor:
    """Each sample as a vector of length 1, in float32 or better.

        n(F) = vec(F) / ||vec(F)||_2

    Source: IE-KD [official code].

    Shape:
        - feat: ``(N, C, H, W)``
        - out: ``(N, D)``
    """
    return normalize(full_precision(feat).flatten(1), dim=1)


def attention_map(feat: Tensor) -> Tensor:
    """Attention map: the energy of a feature at each position.

        g(f) = sum_c f_c^2

    Source: attention transfer, arXiv 1612.03928, with its p = 2.

    Shape:
        - feat: ``(N, C, H, W)``
        - out: ``(N, 1, H, W)``
    """
    return full_precision(feat).square().sum(dim=1, keepdim=True)


def margin_relu(feat: Tensor) -> Tensor:
    """Clip a teacher's feature at a negative margin per channel.

        out = max(f, m_c),   m_c = mean of the negative values of channel c

    0 for a channel without negative values.

    Source: OFD, arXiv 1904.01866. There m_c is the expectation over the data,
    computed from the norm before; the mean over the batch is [ours], because
    a pyramid has no norm there.

    Shape:
        - feat: ``(N, C, H, W)``
        - out: as feat
    """
    feat = full_precision(feat)
    negative = feat < 0
    dims = (0, 2, 3)
    margin = (feat * negative).sum(dims, keepdim=True) / negative.sum(
        dims, keepdim=True
    ).clamp(min=1)
    return torch.maximum(feat, margin)


@explain_unknown_keys
class IELoss(nn.Module):
    """Inheritance pulls to the teacher's factor, exploration pushes away.

        measure    inherit                   explore
        norm       + d(F_inh, F_T)           - d(F_exp, F_T)
        partial    the same with OFD's mask
        cosine     mean_n (1 - cos)          mean_n |cos|

        d(A, B) = sqrt(D / 2048) * ( sum |n(A) - n(B)|^p / (N * D) )^(1/p)
        0 <= d <= 2 / sqrt(2048) = 0.044        for p = 1 and p = 2

    n is :func:`unit`. Factors are normalised first, so d is bounded and
    exploration cannot diverge. The mean over the elements of a unit vector
    shrinks with 1 / sqrt(D): a weight would have 0.03 of its effect on COCO's
    P3, and twice its effect on a small map. The root scales all maps to the
    2048 elements for which the weight was tuned. [ours] ``partial`` leaves
    out elements with n(A) <= n(B) <= 0, where the teacher is inactive and the
    student even lower. ``cosine`` explores towards orthogonal, not opposite,
    factors.

    Source: IE-KD. ``norm`` (with D = 2048, the released pair's) and
    ``cosine`` are [official code], L1 the best of the measures compared and
    50 the best weight of both terms [paper, as relayed by readers' notes];
    the released YAML has 1, which has almost no effect with this mean.
    ``partial`` is OFD's (arXiv 1904.01866) distance, its bound [ours].

    Args:
        inherit_weight: Weight of the inheritance.
        explore_weight: Weight of the exploration.
        measure: 'norm', 'partial' or 'cosine'.
        p: The norm's order. None: 1 for 'norm', 2 for 'partial' (OFD's).

    Raises:
        ValueError: An unknown measure, a negative weight, or p below 1 or for
            a measure without it.
    """

    MEASURES = ('norm', 'partial', 'cosine')

    def __init__(
        self,
        inherit_weight: float = 50.0,
        explore_weight: float = 50.0,
        measure: str = 'norm',
        p: float | None = None,
    ) -> None:
        super().__init__()
        if measure not in self.MEASURES:
            raise ValueError(
                f'`loss.measure` must be one of {self.MEASURES}, but got '
                f'{measure!r}.'
            )
        if min(inherit_weight, explore_weight) < 0:
            raise ValueError(
                'The weights must not be negative, because exploration '
                'already has its sign, but got '
                f'inherit_weight={inherit_weight} and '
                f'explore_weight={explore_weight}.'
            )
        if p is not None and (measure == 'cosine' or p < 1):
            raise ValueError(
                f'`loss.p` is the order of a norm, 1 or more, but got {p} '
                f'with measure={measure!r}.'
            )
        self.inherit_weight = inherit_weight
        self.explore_weight = explore_weight
        self.measure = measure
        self.p = p or (2.0 if measure == 'partial' else 1.0)

    def _distance(self, student_factor: Tensor, teacher_factor: Tensor):
        student, teacher = unit(student_factor), unit(teacher_factor)
        difference = student - teacher
        if self.measure == 'partial':
            off = (student <= teacher) & (teacher <= 0)
            difference = difference.masked_fill(off, 0)
        # vector_norm has the gradient 0 at distance 0, where a root has none.
        norm = torch.linalg.vector_norm(difference, ord=self.p)
        scale = (difference.shape[1] / REFERENCE_SIZE) ** 0.5
        return scale * norm / difference.numel() ** (1 / self.p)

    def inherit(
        self, *, student_factor: Tensor, teacher_factor: Tensor
    ) -> Tensor:
        """The weighted inheritance term, lowest if the factors agree.

        Shape:
            - student_factor, teacher_factor: ``(N, C, H, W)``
            - out: scalar
        """
        if self.measure == 'cosine':
            term = 1 - _cosines(student_factor, teacher_factor).mean()
        else:
            term = self._distance(student_factor, teacher_factor)
        return self.inherit_weight * term

    def explore(
        self, *, student_factor: Tensor, teacher_factor: Tensor
    ) -> Tensor:
        """The weighted exploration term, lowest if they differ most.

        Shape:
            - student_factor, teacher_factor: ``(N, C, H, W)``
            - out: scalar
        """
        if self.measure == 'cosine':
            term = _cosines(student_factor, teacher_factor).abs().mean()
        else:
            term = -self._distance(student_factor, teacher_factor)
        return self.explore_weight * term


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    return cosine_similarity(
        full_precision(first).flatten(1),
        full_precision(second).flatten(1),
        dim=1,
    )


@torch.no_grad()
def similarity(*, student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """Mean cosine between the samples' factors, for the log.

    Shape:
        - student_factor, teacher_factor: ``(N, C, H, W)``
        - out: scalar in [-1, 1]
    """
    return _cosines(student_factor, teacher_factor).mean()
