"""Losses between the class logits of student and teacher.

Legend: N batch, K classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, softmax


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
