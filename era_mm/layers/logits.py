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


def dkd_loss(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """DKD: knowledge distillation, of the true class and of the others apart.

        tau^2 / N * sum_n [ alpha * KL(b_t || b_s) + beta * KL(o_t || o_s) ]

    b are the two probabilities of the true class and of any other one, o is
    the softmax over the other classes alone. With alpha = 1 and beta = 1 -
    p_t(true) of each image it would be :func:`kl_loss`.

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
    """An image's logits with mean 0 and deviation 1 over the classes.

        (z - mean(z)) / (std(z) + eps)

    std divides by K - 1 and eps is added to it, both [official code].

    Source: logit standardisation, Sun et al., arXiv 2403.01427, alg. 1.

    Shape:
        - logits, out: ``(N, K)``
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (logits.std(dim=1, keepdim=True) + eps)


def _full(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def bernoulli_entropy(q: Tensor) -> Tensor:
    """Entropy of each probability of a yes, in nats."""
    return torch.special.entr(q) + torch.special.entr(1 - q)


def bernoulli_kl(
    *, student_logits: Tensor, target: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL from sigmoid scores to their targets, added up by row.

        sum_c KL(q_rc || sigmoid(z_rc / T))

    The binary cross-entropy less the target's entropy: equal in gradient, and
    0 where both agree.

    Source: [ours], for dense heads.

    Shape:
        - student_logits, target: ``(R, classes)``
        - out: ``(R,)``
    """
    logits, target = _full(student_logits), _full(target)
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


def best_rows(levels: Sequence[Tensor], num_classes: int, topk: int) -> Tensor:
    """Where an image's highest class scores are, over all levels.

    A row is an anchor of a place: level by level, place by place, anchor by
    anchor.

    Args:
        levels: One ``(N, A * K, H, W)`` per level, A anchors by place.
        num_classes: K.
        topk: Rows per image; all of them if there are no more.

    Returns:
        Their numbers, ``(N, k)``.
    """
    best = [
        level.unflatten(1, (-1, num_classes))
        .amax(dim=2)
        .permute(0, 2, 3, 1)
        .flatten(1)
        for level in levels
    ]
    scores = torch.cat(best, dim=1)
    return scores.topk(min(topk, scores.shape[1]), dim=1).indices


def rows_at(levels: Sequence[Tensor], rows: Tensor, width: int) -> Tensor:
    """What a dense head says of some rows.

    Only these are copied, not the maps.

    Args:
        levels: One ``(N, A * width, H, W)`` per level.
        rows: As :func:`best_rows` gives them.
        width: Numbers of a row.

    Shape:
        - rows: ``(N, k)``
        - out: ``(N, k, width)``
    """
    images = torch.arange(len(rows), device=rows.device)[:, None, None]
    numbers = torch.arange(width, device=rows.device)
    found, start = None, 0
    for level in levels:
        anchors = level.shape[1] // width
        size = anchors * level.shape[2] * level.shape[3]
        local = rows - start
        inside = (local >= 0) & (local < size)
        local = local.clamp(0, size - 1)
        channels = (local % anchors)[..., None] * width + numbers
        places = (local // anchors)[..., None]
        values = level.flatten(2)[images, channels, places]
        values = torch.where(inside[..., None], values, 0)
        found = values if found is None else found + values
        start += size
    assert found is not None
    return found
