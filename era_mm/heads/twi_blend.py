"""Blends the outputs of two detectors: the arithmetic of mode ST."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn


def same_priors(
    student_head: nn.Module, teacher_head: nn.Module, maps: Sequence[Tensor]
) -> bool:
    """Whether two dense heads have equal priors on maps of these sizes.

    True for heads without a prior generator.
    """
    generators: list[Any] = [
        getattr(head, 'prior_generator', None)
        for head in (student_head, teacher_head)
    ]
    if None in generators:
        return generators == [None, None]
    sizes = [m.shape[-2:] for m in maps]
    student, teacher = (
        generator.grid_priors(sizes, device=maps[0].device)
        for generator in generators
    )
    return all(
        torch.equal(s, t) for s, t in zip(student, teacher, strict=True)
    )


def can_blend_raw(
    student_head: nn.Module,
    student_outs: Sequence,
    teacher_head: nn.Module,
    teacher_outs: Sequence,
) -> bool:
    """Whether two dense heads' raw outputs have the same meaning."""
    if type(student_head) is not type(teacher_head):
        return False
    if not hasattr(teacher_head, 'prior_generator'):
        return False
    if len(student_outs) != len(teacher_outs):
        return False
    for student_maps, teacher_maps in zip(
        student_outs, teacher_outs, strict=True
    ):
        if [m.shape for m in student_maps] != [m.shape for m in teacher_maps]:
            return False
    if not same_priors(student_head, teacher_head, student_outs[0]):
        return False
    return coder_of(student_head) == coder_of(teacher_head)


def coder_of(head: nn.Module) -> dict[str, Any] | None:
    """A box coder's settings; None for heads without a coder (YOLOX)."""
    coder = getattr(head, 'bbox_coder', None)
    if coder is None:
        return None
    return {
        key: value
        for key, value in vars(coder).items()
        if not isinstance(value, nn.Module)
    } | {'type': type(coder)}


def blend_raw(
    student_outs: Sequence, teacher_outs: Sequence, alpha: float
) -> list[list[Tensor]]:
    """``(1 - alpha) * student + alpha * teacher``, map by map."""
    return [
        [(1 - alpha) * s + alpha * t for s, t in zip(*pair, strict=True)]
        for pair in zip(student_outs, teacher_outs, strict=True)
    ]


def merge(
    pair: Sequence[InstanceData], alpha: float, test_cfg: Any
) -> InstanceData:
    """Merge the objects that student and teacher head found in an image.

    The scores of the side with the smaller weight are multiplied by the ratio
    of the weights; then NMS over both, as in ``test_cfg``.
    """
    from mmcv.ops import batched_nms

    student, teacher = pair
    # The scores of the side with the larger weight do not change, so that
    # thresholds keep their meaning.
    heavier = max(alpha, 1 - alpha)
    student.scores = student.scores * (1 - alpha) / heavier
    teacher.scores = teacher.scores * alpha / heavier
    # What only one of them predicts (masks) is dropped.
    for one, other in ((student, teacher), (teacher, student)):
        for key in set(one.keys()) - set(other.keys()):
            delattr(one, key)
    both = InstanceData.cat([student, teacher])
    both = both[both.scores > 0]
    if not len(both):
        return both
    nms = test_cfg.get('nms', dict(type='nms', iou_threshold=0.5))
    found, keep = batched_nms(both.bboxes, both.scores, both.labels, dict(nms))
    both = both[keep]
    # Soft NMS lowers scores instead of dropping boxes.
    both.scores = found[:, -1]
    return both[: test_cfg.get('max_per_img', len(both))]
