"""The residuals of a level, and the errors of the estimates that they give.

Legend: N batch, B branches, C_t channels of the teacher, w channels of a
branch, * any spatial dimensions.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...layers import full_precision
from .losses import estimates_of


def _error(prediction: Tensor, target: Tensor) -> Tensor:
    """The difference, in float32 or better."""
    prediction = full_precision(prediction)
    return prediction - target.to(prediction.dtype)


class _StepErrors(torch.autograd.Function):
    """See :func:`step_errors`.

    It keeps its inputs, which exist anyway, and recomputes the differences in
    the backward pass; otherwise a map of each estimate would be kept.
    """

    @staticmethod
    def forward(
        ctx: Any, aligned: Tensor, residuals: Tensor, target: Tensor
    ) -> Tensor:
        ctx.save_for_backward(aligned, residuals, target)
        error = _error(aligned, target)
        errors = [error.square().mean()]
        for residual in residuals.unbind(dim=1):
            error += residual
            errors.append(error.square().mean())
        return torch.stack(errors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        aligned, residuals, target = ctx.saved_tensors
        error = _error(aligned, target)
        scales = (2 / error.numel() * grad).unbind()
        of_first = scales[0] * error
        of_later = torch.empty_like(residuals)
        for step, residual in enumerate(residuals.unbind(dim=1)):
            error += residual
            of_later[:, step] = scales[step + 1] * error
        return (
            of_first.to(aligned.dtype),
            of_later,
            # SoKD is trained to refine the teacher's feature.
            -of_first.to(target.dtype) if ctx.needs_input_grad[2] else None,
        )


def step_errors(
    *, aligned: Tensor, residuals: Tensor, target: Tensor
) -> Tensor:
    """The squared error of each estimate of a level.

        MSE(e_0, t), MSE(d_1, r_1), ..., MSE(d_n, r_n)
        r_i = sg(t - e_(i-1))

    In value all are MSE(e_i, t); the gradient of the first reaches u and t
    alone, that of the others d_i alone. In float32 or better.

    Source: ERA [official code] for the targets; in one function is ours.

    Shape:
        - aligned, target: ``(N, C_t, *)``
        - residuals: ``(N, B, C_t, *)``
        - out: ``(B + 1,)``
    """
    return _StepErrors.apply(aligned, residuals, target)


def _factors(
    hidden: Tensor, weight: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each branch ``(N, C_t, w + 1)`` and ``(N, w + 1, positions)``."""
    parts = full_precision(hidden.flatten(2))
    # The channel of ones is for the bias.
    parts = pad(parts.unflatten(1, (len(weight), -1)), (0, 0, 0, 1), value=1.0)
    for matrix, part in zip(weight, parts.unbind(dim=1), strict=True):
        yield matrix.to(part).expand(len(part), -1, -1), part


class _FactoredErrors(torch.autograd.Function):
    """See :func:`factored_errors`.

    No residual is kept, nor the gradient of one: both are a map of the
    teacher's width for each branch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        aligned: Tensor,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(aligned, hidden, weight, target)
        error = _error(aligned, target).flatten(2)
        errors = [error.square().mean()]
        # Half precision loses the small last residuals.
        with torch.autocast(hidden.device.type, enabled=False):
            for matrix, part in _factors(hidden, weight):
                error.baddbmm_(matrix, part)
                errors.append(error.square().mean())
        return torch.stack(errors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        aligned, hidden, weight, target = ctx.saved_tensors
        error = _error(aligned, target).flatten(2)
        scales = (2 / error.numel() * grad).unbind()
        of_first = (scales[0] * error).view_as(aligned)
        of_hidden, of_weight = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for scale, (matrix, part) in zip(
                scales[1:], _factors(hidden, weight), strict=True
            ):
                error.baddbmm_(matrix, part)
                of_residual = scale * error
                of_weight.append(
                    torch.bmm(of_residual, part.transpose(1, 2)).sum(dim=0)
                )
                of_hidden.append(
                    torch.bmm(matrix[..., :-1].transpose(1, 2), of_residual)
                )
        return (
            of_first.to(aligned.dtype),
            torch.cat(of_hidden, dim=1).view_as(hidden).to(hidden.dtype),
            torch.stack(of_weight).to(weight.dtype),
            -of_first.to(target.dtype) if ctx.needs_input_grad[3] else None,
        )


def factored_errors(
    *, aligned: Tensor, hidden: Tensor, weight: Tensor, target: Tensor
) -> Tensor:
    """:func:`step_errors` of residuals that are a matrix times a feature.

        d_i = A_i h_i + b_i

    Source: ours.

    Shape:
        - aligned, target: ``(N, C_t, *)``
        - hidden: ``(N, B * w, *)``, the h_i
        - weight: ``(B, C_t, w + 1)``, the A_i with b_i as the last column
        - out: ``(B + 1,)``
    """
    return _FactoredErrors.apply(aligned, hidden, weight, target)


class Residuals(ABC):
    """The residuals d_1 ... d_n of a level."""

    @abstractmethod
    def errors(self, *, aligned: Tensor, target: Tensor) -> Tensor:
        """See :func:`step_errors`, ``(B + 1,)``."""

    @abstractmethod
    def estimate(self, aligned: Tensor, step: int) -> Tensor:
        """e_step = aligned + d_1 + ... + d_step, with its graph."""


class ListedResiduals(Residuals):
    """Residuals one by one.

    Args:
        values: B of ``(N, C_t, *)``.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        self.values = values

    def errors(self, *, aligned: Tensor, target: Tensor) -> Tensor:
        """As in the base class."""
        stacked = torch.stack(list(self.values), dim=1)
        return step_errors(aligned=aligned, residuals=stacked, target=target)

    def estimate(self, aligned: Tensor, step: int) -> Tensor:
        """As in the base class."""
        residuals = self.values[:step]
        return estimates_of(aligned=aligned, residuals=residuals)[-1]


class FactoredResiduals(Residuals):
    """Residuals as products, which need not all exist at once.

    Args:
        hidden: As for :func:`factored_errors`.
        weight: Likewise.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden = hidden
        self.weight = weight

    def errors(self, *, aligned: Tensor, target: Tensor) -> Tensor:
        """As in the base class."""
        return factored_errors(
            aligned=aligned,
            hidden=self.hidden,
            weight=self.weight,
            target=target,
        )

    def estimate(self, aligned: Tensor, step: int) -> Tensor:
        """As in the base class; the sum of the residuals is one product."""
        if step == 0:
            return aligned
        weight = self.weight[:step]
        width = weight.shape[2] - 1
        matrix = weight[..., :-1].transpose(0, 1).flatten(1)
        hidden = self.hidden[:, : step * width].flatten(2)
        total = full_precision(torch.matmul(matrix.to(hidden), hidden))
        total = total + weight[..., -1].sum(dim=0)[:, None]
        return aligned + total.view_as(aligned)
