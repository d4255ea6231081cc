"""Residual KD's two losses.

Legend: F_S student, F_A assistant, F_T teacher, features of one shape
``(N, C, *)``.
"""

from torch import Tensor
from torch.nn.functional import mse_loss

from ...layers import full_precision


def student_loss(*, student_feat: Tensor, teacher_feat: Tensor) -> Tensor:
    """Mean squared distance of the student's feature to the teacher's.

        L_S = mean((F_T - F_S)^2)

    Source: Residual KD, arXiv 2002.09168 [paper: the student mimics the
    teacher's feature maps]; the squared distance is [inference], from the
    same author's arXiv 1812.01819.

    Shape:
        - student_feat, teacher_feat: ``(N, C, *)``
        - out: scalar
    """
    return mse_loss(full_precision(student_feat), full_precision(teacher_feat))


def assistant_loss(
    *, student_feat: Tensor, assistant_feat: Tensor, teacher_feat: Tensor
) -> Tensor:
    """Mean squared distance of the assistant to the student's residual.

        D = sg(F_T - F_S),   L_A = mean((D - F_A)^2)

    Its value is that of ``mean((F_T - F_int)^2)`` with F_int = F_S + F_A; its
    gradient reaches only the assistant. If D were not a constant, the student
    would learn to make errors that are easy to predict.

    Source: Residual KD [paper: the assistant learns the residual error]; the
    squared distance and the stop-gradient are [inference].

    Shape:
        - student_feat, assistant_feat, teacher_feat: ``(N, C, *)``
        - out: scalar
    """
    student, teacher = map(full_precision, (student_feat, teacher_feat))
    residual = (teacher - student).detach()
    return mse_loss(full_precision(assistant_feat), residual)
