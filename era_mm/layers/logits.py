"""Losses between the class logits of student and teacher.

Legend: N batch, K classes, R anchors of all positions of a pyramid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    kl_div,
    log_softmax,
    softmax,
)

from .features import full_precision

#: Added to the product of the norms in DIST's correlation. [official code]
DIST_EPS = 1e-8


def kl_loss(
    *, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0
) -> Tensor:
    """Knowledge distillation: KL from the student's to the teacher's softmax.

        tau^2 / N * sum_n KL(softmax(z_t / tau) || softmax(z_s / tau))

    Source: Hinton et al., arXiv 1503.02531; the batch mean as in ERA's
    [official code].

    Shape:
        - student_logits, teacher_logits: ``(N, K)``
        - out: scalar
    """
    return temperature**2 * kl_div(
        log_softmax(student_logits / temperature, dim=1),
        log_softmax(teacher_logits / temperature, dim=1),
        reduction='batchmean',
        log_target=True,
    )


def _correlation_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 - Pearson correlation of the rows, averaged."""
    first = first - first.mean(dim=1, keepdim=True)
    second = second - second.mean(dim=1, keepdim=True)
    # torch's cosine_similarity clamps each norm instead.
    norms = first.norm(dim=1) * second.norm(dim=1)
    return 1 - ((first * second).sum(dim=1) / (norms + DIST_EPS)).mean()


def dist_loss(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """DIST: correlation of predictions within samples and within classes.

        tau^2 * [ (1 - rho over the rows) + (1 - rho over the columns) ]

    of the two softmax matrices, averaged, with the Pearson correlation

        rho(a, b) = <a', b'> / (||a'|| ||b'|| + 1e-8),   a' = a - mean(a)

    The 1e-8 added to the product is more than a guard. With confident logits,
    most of 1000 classes have probabilities near 0 in the whole batch, and it
    gives such columns little weight.

    Source: Huang et al., arXiv 2205.10536, eqs. 6 to 10; the place of 1e-8 as
    in ERA's [official code] and in DIST's own.

    Shape:
        - student_logits, teacher_logits: ``(N, K)``
        - out: scalar
    """
    student = softmax(student_logits / temperature, dim=1)
    teacher = softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * (
        _correlation_distance(student, teacher)
        + _correlation_distance(student.t(), teacher.t())
    )


def dkd_loss(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """DKD: target-class and non-target-class distillation, decoupled.

        tau^2 / N * sum_n [ alpha * KL(b_t || b_s) + beta * KL(o_t || o_s) ]

    b are the probabilities of the true class and of all others together, o is
    the softmax over the other classes only. With alpha = 1 and beta = 1 -
    p_t(true) of each image it equals :func:`kl_loss`.

    Source: Zhao et al., arXiv 2203.08679, eq. 7; tau, alpha and beta are its
    released CIFAR-100 configs', tau^2 its [official code]'s.

    Shape:
        - student_logits, teacher_logits: ``(N, K)``
        - labels: ``(N,)``
        - out: scalar
    """
    is_true = torch.zeros_like(student_logits, dtype=torch.bool)
    is_true.scatter_(1, labels[:, None], True)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = log_softmax(logits / temperature, dim=1)
        others = scores[~is_true].view(len(scores), -1)
        other = others.logsumexp(dim=1)
        return torch.stack([scores[is_true], other], dim=1), log_softmax(
            others, dim=1
        )

    losses = [
        kl_div(student, teacher, reduction='batchmean', log_target=True)
        for student, teacher in zip(
            parts(student_logits), parts(teacher_logits), strict=True
        )
    ]
    return temperature**2 * (alpha * losses[0] + beta * losses[1])


def standardise_logits(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Logits with mean 0 and standard deviation 1 over the classes.

        (z - mean(z)) / (std(z) + eps)

    std divides by K - 1 and eps is added to it, both [official code].

    Source: logit standardisation, Sun et al., arXiv 2403.01427, alg. 1.

    Shape:
        - logits, out: ``(N, K)``
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (logits.std(dim=1, keepdim=True) + eps)


def bernoulli_entropy(q: Tensor) -> Tensor:
    """Entropy of each Bernoulli probability, in nats."""
    return torch.special.entr(q) + torch.special.entr(1 - q)


def bernoulli_kl(
    *, student_logits: Tensor, target: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL between targets and sigmoid scores, summed per row.

        sum_c KL(q_rc || sigmoid(z_rc / T))

    The binary cross-entropy minus the target's entropy: it has the same
    gradient, and is 0 where both agree.

    Source: [ours], for dense heads.

    Shape:
        - student_logits, target: ``(R, classes)``
        - out: ``(R,)``
    """
    logits, target = full_precision(student_logits), full_precision(target)
    cross = binary_cross_entropy_with_logits(
        logits / temperature, target, reduction='none'
    )
    return (cross - bernoulli_entropy(target)).sum(dim=1)


def bernoulli_kl_loss(
    *, student_logits: Tensor, target: Tensor, temperature: float = 1.0
) -> Tensor:
    """``T^2`` times the mean of :func:`bernoulli_kl` over the rows.

    Source: [ours], for dense heads.

    Shape:
        - student_logits, target: ``(R, classes)``
        - out: scalar
    """
    gap = bernoulli_kl(
        student_logits=student_logits, target=target, temperature=temperature
    )
    return temperature**2 * gap.mean()


def rows_of_levels(scores: Sequence[Tensor], num_classes: int) -> Tensor:
    """The logits of a dense head, one row per anchor and position.

    Shape:
        - scores: one ``(N, A * K, H, W)`` per level, A anchors per position
        - out: ``(N, R, K)``
    """
    return torch.cat(
        [
            level.permute(0, 2, 3, 1).reshape(len(level), -1, num_classes)
            for level in scores
        ],
        dim=1,
    )


def top_rows(scores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Indices ``(N, k)`` of the rows with an image's highest class scores.

    Args:
        scores: ``(N, R, K)``.
        topk: Rows per image; all of them if there are no more.

    Returns:
        Index of rows and of columns, for ``tensor[rows, columns]``.
    """
    best = scores.amax(dim=2)
    columns = best.topk(min(topk, best.shape[1]), dim=1).indices
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    return rows, columns


class Rows:
    """Some anchors of each image, to be read from outputs of a dense head.

    A row is an anchor at a position. Rows are ordered by level, position and
    anchor. Their indices are computed once for all outputs.

    Args:
        numbers: Numbers of the rows, ``(N, k)``.
        shapes: Anchors per position, height and width of each level.
    """

    def __init__(
        self, numbers: Tensor, shapes: Sequence[tuple[int, int, int]]
    ) -> None:
        self.numbers = numbers
        self.shapes = shapes
        self._places: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def _places_of(self, width: int) -> list[tuple[Tensor, Tensor]]:
        """By level: indices of values, and which belong to this level."""
        if width not in self._places:
            found, start = [], 0
            values = torch.arange(width, device=self.numbers.device)
            for anchors, height, length in self.shapes:
                area = height * length
                local = self.numbers - start
                inside = (local >= 0) & (local < anchors * area)
                local = local.clamp(0, anchors * area - 1)
                channels = (local % anchors)[..., None] * width + values
                places = channels * area + (local // anchors)[..., None]
                found.append((places.flatten(1), inside[..., None]))
                start += anchors * area
            self._places[width] = found
        return self._places[width]

    def of(self, levels: Sequence[Tensor]) -> Tensor:
        """A head's outputs at these rows.

        Only these values are copied, not the maps.

        Args:
            levels: One ``(N, A * width, H, W)`` per level. Maps may be larger
                than those of the rows; the rest is ignored.

        Returns:
            ``(N, k, width)``.
        """
        anchors = self.shapes[0][0]
        width = levels[0].shape[1] // anchors
        found = None
        for level, (_, height, length), (places, inside) in zip(
            levels, self.shapes, self._places_of(width), strict=True
        ):
            cut = level[..., :height, :length].flatten(1)
            values = cut.gather(1, places).unflatten(1, (-1, width))
            values = torch.where(inside, values, 0)
            found = values if found is None else found + values
        assert found is not None
        return found


def best_rows(levels: Sequence[Tensor], num_classes: int, topk: int) -> Rows:
    """The rows with an image's highest class scores, over all levels.

    Args:
        levels: One ``(N, A * K, H, W)`` per level, A anchors per position.
        num_classes: K.
        topk: Rows per image; all of them if there are no more.
    """
    best = [
        level.unflatten(1, (-1, num_classes))
        .amax(dim=2)
        .permute(0, 2, 3, 1)
        .flatten(1)
        for level in levels
    ]
    scores = torch.cat(best, dim=1)
    return Rows(
        scores.topk(min(topk, scores.shape[1]), dim=1).indices,
        [
            (level.shape[1] // num_classes, *level.shape[2:])
            for level in levels
        ],
    )
