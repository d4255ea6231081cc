"""Batch norm of a single value per channel, which has no variance."""

from typing import Any

from mmengine.dist import get_world_size
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_RESTS = 'rests_for_lone_value'


def _rest(norm: nn.Module, args: tuple) -> None:
    inputs = args[0]
    if (
        norm.training
        and norm.track_running_stats
        and inputs.numel() == inputs.shape[1]
        # All ranks together have more values.
        and not (isinstance(norm, nn.SyncBatchNorm) and get_world_size() > 1)
    ):
        norm.training = False
        norm.__dict__[_RESTS] = True


def _wake(norm: nn.Module, args: tuple, output: Any) -> None:
    if norm.__dict__.pop(_RESTS, False):
        norm.training = True


def spare_lone_values(module: nn.Module) -> None:
    """Let batch norms accept one value per channel in training.

        y = (x - running mean) / sqrt(running variance + eps) * weight + bias

    as in eval mode, for inputs such as ``(1, C)`` or ``(1, C, 1, 1)``. They
    have no variance over the batch, so torch raises an error; the last batch
    of an epoch may have only one image. The running statistics are not
    updated, and other inputs are normalised as usual. The statistics are the
    rank's own: ranks may have maps of other sizes, so they cannot wait for
    each other here.

    Source: ours.

    Args:
        module: The module that contains the norms.
    """
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.register_forward_pre_hook(_rest)
            norm.register_forward_hook(_wake, always_call=True)
