"""Losses between the class logits of student and teacher.

Legend: N batch, K classes, R places of a pyramid with their anchors.
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
    return 1 - torch.cosine_similarity(first, second, dim=1).mean()


def dist_loss(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """DIST: correlation of predictions within samples and within classes.

        tau^2 * [ (1 - rho over the rows) + (1 - rho over the columns) ]

    of the two softmax matrices, rho the Pearson correlation, averaged.

    Source: Huang et al., arXiv 2205.10536, eqs. 6 to 10.

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


def _full(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def bernoulli_kl_loss(
    *, student_logits: Tensor, target: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL from sigmoid scores to their targets, class by class.

        T^2 / R * sum_r sum_c KL(q_rc || sigmoid(z_rc / T))

    The binary cross-entropy less the target's entropy: equal in gradient, and
    0 where both agree.

    Source: [ours], for dense heads.

    Shape:
        - student_logits, target: ``(R, classes)``
        - out: scalar
    """
    logits, target = _full(student_logits), _full(target)
    cross = binary_cross_entropy_with_logits(
        logits / temperature, target, reduction='none'
    )
    entropy = torch.special.entr(target) + torch.special.entr(1 - target)
    return temperature**2 * (cross - entropy).sum(dim=1).mean()


def rows_of_levels(scores: Sequence[Tensor], num_classes: int) -> Tensor:
    """The logits of a dense head, a row for each anchor of each place.

    Shape:
        - scores: one ``(N, A * K, H, W)`` per level, A anchors by place
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
    """Where an image's highest class scores are, as an index ``(N, k)``.

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
