"""Chooses the features of a distillation to show with the teacher's."""

from __future__ import annotations

import copy
from typing import Any

import torch

from era_mm.core.step import DistilledStudent
from era_mm.core.utils import evaluating, preserve_rng
from era_mm.methods.era.decompose import Decomposition, decompose


def parts_of(
    model: DistilledStudent, batch: Any
) -> tuple[Decomposition, list[str]] | None:
    """A batch's features of the first distiller that compares any.

    The model is not changed, and no random number is drawn.

    Args:
        model: The distillation with its teachers' weights, or a half of a
            ``MutualDistillation``.
        batch: A batch from a val dataloader.

    Returns:
        Teacher and estimates, with the names of the estimates: e0 ... en for
        ERA, 'student' for other methods if the features have the same shape.
        None if no distiller compares any.
    """
    with evaluating(model), preserve_rng(), torch.no_grad():
        # Preprocessors write into the samples.
        return _parts_of(model, copy.deepcopy(batch))


def _parts_of(
    model: DistilledStudent, batch: Any
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
