"""Losses whose gradients are computed at once, so that their graph is freed.

Autograd keeps what lies between some tensors and a loss on them until the
backward pass. Where nothing in between is trained, only the gradients at
these tensors are needed, and they can be had earlier.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Settled(torch.autograd.Function):
    """A value with known gradients at its inputs."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: list, *inputs: Tensor
    ) -> Tensor:
        ctx.given = [gradient is not None for gradient in gradients]
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        known = iter(ctx.saved_tensors)
        return (
            None,
            None,
            *(
                next(known) * upstream if given else None
                for given in ctx.given
            ),
        )


def computes_in_half(like: Tensor) -> bool:
    """Whether layers compute in float16 here, by autocast.

    Args:
        like: An input of theirs.
    """
    probe = like.new_zeros(1, 1)
    return (probe @ probe).dtype == torch.float16


def settled(
    losses: Callable[[list[Tensor]], Mapping[str, Tensor]],
    inputs: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Losses of some tensors, with what lies in between freed.

        value_k = losses(x)_k,   d value_k / d x computed now

    They have the value and the gradient of ``losses(inputs)``; second
    derivatives count as 0. What ``losses`` computes must not reach anything
    else that is trained. Each loss takes a backward pass through its own
    part. In float16 gradients without the loss scale of AMP would be zero, so
    there the graph is kept.

    Source: ours.

    Args:
        losses: Scalars by name, from tensors like ``inputs``.
        inputs: Tensors with graph.
    """
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    if not trained or computes_in_half(trained[0]):
        return dict(losses(list(inputs)))
    # Copies, because the first layer may work in place.
    found = dict(losses([leaf.clone() for leaf in leaves]))
    learning = [name for name, value in found.items() if value.requires_grad]
    for name in learning:
        # The backward pass of a run is not under autocast either.
        with torch.autocast(trained[0].device.type, enabled=False):
            # Not `autograd.grad`, which checkpointed parts of a head refuse.
            found[name].backward(retain_graph=name != learning[-1])
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        found[name] = _Settled.apply(found[name].detach(), gradients, *inputs)
    return found
