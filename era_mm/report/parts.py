"""Which features of a distillation are shown beside the teacher's."""

from __future__ import annotations

import copy
from typing import Any

import torch

from era_mm.core import Distillation
from era_mm.core.utils import evaluating, preserve_rng
from era_mm.methods.era.decompose import Decomposition, decompose


def parts_of(
    model: Distillation, batch: Any
) -> tuple[Decomposition, list[str]] | None:
    """A batch's features of the first distiller that compares any.

    Nothing in the model is changed, and no random number is drawn.

    Args:
        model: The distillation, with its teachers' weights.
        batch: What a dataloader of val gives.

    Returns:
        Teacher and estimates, with the estimates' names: e0 ... en for ERA,
        'student' for what else has features of one shape. None without.
    """
    with evaluating(model), preserve_rng(), torch.no_grad():
        # Preprocessors write into the samples.
        return _parts_of(model, copy.deepcopy(batch))


def _parts_of(
    model: Distillation, batch: Any
) -> tuple[Decomposition, list[str]] | None:
    data = model.data_preprocessor.with_teachers(batch, training=False)
    feats_of = model.record(**data)
    for distiller in model.distillers.values():
        feats = feats_of(distiller)
        parts = decompose(distiller, **feats)
        if parts is not None:
            return parts, [f'e{i}' for i in range(len(parts.estimates))]
    for distiller in model.distillers.values():
        feats = feats_of(distiller)
        student, teacher = (
            [level for levels in feats[key].values() for level in levels]
            for key in ('student_feats', 'teacher_feats')
        )
        if student and [x.shape for x in student] == [
            x.shape for x in teacher
        ]:
            return (
                Decomposition(teacher, [student], None),
                ['student'],
            )
    return None
