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


def assigning_regions_once(roi_head: nn.Module) -> nn.Module:
    """A view of a RoI head that assigns the same regions only once.

    Those of the first stage are the given proposals. Regions that a stage has
    refined depend on predictions and are assigned every time. Samplers are
    the head's own.
    """
    assigners = getattr(roi_head, 'bbox_assigner', None)
    if assigners is None:
        return roi_head
    view: Any = with_children(roi_head)
    view.bbox_assigner = (
        [_Remembering(assigner) for assigner in assigners]
        if isinstance(assigners, (list, tuple))
        else _Remembering(assigners)
    )
    return view


class _Remembering:
    """An assigner that keeps its results for the same objects.

    All other values are those of the assigner itself, in both directions:
    Dynamic R-CNN sets its thresholds.
    """

    _assigner: Any
    _kept: list[tuple[Any, Any, Any]]

    def __init__(self, assigner: Any) -> None:
        vars(self).update(_assigner=assigner, _kept=[])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._assigner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._assigner, name, value)

    def assign(
        self, pred_instances: Any, gt_instances: Any, *args: Any, **kwargs: Any
    ) -> Any:
        priors = pred_instances.priors
        for known, truth, found in self._kept:
            if known is priors and truth is gt_instances:
                return copy.copy(found)
        found = self._assigner.assign(
            pred_instances, gt_instances, *args, **kwargs
        )
        # A copy, as samplers add the truth to what they get.
        self._kept.append((priors, gt_instances, copy.copy(found)))
        return found
