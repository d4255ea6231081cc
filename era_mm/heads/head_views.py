"""Views of a host's head that share its weights."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..core.utils import random_state

#: Arguments of mmdet's ``get_targets`` that do not depend on predictions.
_FROM_TRUTH = {
    'anchor_list',
    'valid_flag_list',
    'num_level_anchors',
    'points',
    'batch_gt_instances',
    'batch_img_metas',
    'batch_gt_instances_ignore',
    'unmap_outputs',
    'return_sampling_results',
}


def with_children(
    module: nn.Module, **children: nn.Module | None
) -> nn.Module:
    """The same module with some children replaced.

    All else is shared with the original, also when its weights are loaded,
    moved or cast.
    """
    view = copy.copy(module)
    # A copy shares even this table; torch has no public way to separate it.
    view._modules = {**module._modules, **children}
    return view


def assigning_once(
    head: nn.Module,
) -> tuple[nn.Module, Callable[[], None]]:
    """A view of a dense head that assigns a batch's targets only once.

    Heads whose assigner uses predictions (by the arguments of their
    ``get_targets``; guided anchors are predictions too) assign every time.
    What the head's sampler has drawn
    counts as drawn each time: what comes next draws the same.

    Returns:
        The view, and what to call before each of its losses.
    """
    assign = getattr(head, 'get_targets', None)
    if (
        assign is None
        or hasattr(head, 'loss_shape')
        or not _FROM_TRUTH.issuperset(inspect.signature(assign).parameters)
    ):
        return head, lambda: None
    view: Any = with_children(head)
    kept: list[tuple[Any, Callable[[], None]]] = []
    calls = [0]

    def begin() -> None:
        calls[0] = 0

    def get_targets(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > len(kept):
            kept.append((assign(*args, **kwargs), random_state()))
        found, draw = kept[calls[0] - 1]
        draw()
        return found

    view.get_targets = get_targets
    return view, begin
