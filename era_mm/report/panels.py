"""Chosen images with the predictions and features of each model.

`look_at_images` is the entry point; ``panel_parts`` has the result types,
``pictures`` the panels of detectors and classifiers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from era_mm.core import Distillation, MutualDistillation
from era_mm.engine.summary import flops_text
from era_mm.methods.era.decompose import Decomposition

from .comparison import Comparison, Group
from .heat import coloured, data_uri, heat_rows
from .models import (
    batch_of,
    build_dataset,
    build_pair,
    build_students,
    number_of_parameters,
    quiet,
)
from .panel_parts import (
    Found,
    HeatCell,
    HeatLine,
    Options,
    Subject,
)
from .parts import parts_of
from .pictures import ClassifierPanels, DetectionPanels, Panels
from .residual_figures import level_bars
from .runs import Run, said_by

#: Number of images on which levels are compared; the means converge soon.
DECOMPOSED = 32


def look_at_images(
    comparison: Comparison,
    options: Options,
    tell: Callable[[str], None] = lambda text: None,
) -> Found:
    """Run the models of a comparison on val images.

    What cannot be built or read is skipped and named in ``missing``.

    Args:
        comparison: The runs.
        options: Limits.
        tell: Called with the current activity.
    """
    found = Found()
    groups = comparison.distilled or [
        group for group in comparison.groups if group.role == 'plain'
    ]
    if not groups:
        found.missing.append('images: no run has a config')
        return found
    subjects, pair = _build_subjects(comparison, found, tell)
    main = next(
        (run for run in groups[0].runs if run.checkpoint), groups[0].runs[0]
    )
    try:
        dataset = build_dataset(main)
        batch = batch_of(dataset, [0])
    except Exception as error:
        found.missing.append(
            f'images: the val data of {main.name} could not be read '
            f'({said_by(error)}). Relative paths in its config are '
            'relative to the folder in which the report runs'
        )
        dataset = batch = None
    for subject in subjects:
        _count(subject, batch, found)
    if dataset is None or not subjects:
        return found
    began = time.monotonic()
    for index in range(min(options.images, len(dataset))):
        if index and time.monotonic() - began > options.seconds:
            break
        if index % 20 == 0:
            tell(f'image {index} of {min(options.images, len(dataset))}')
        batch = batch_of(dataset, [index])
        try:
            results = [
                subject.predict(copy.deepcopy(batch))[0]
                for subject in subjects
            ]
        except Exception as error:
            found.missing.append(
                f'images: predicting failed ({said_by(error)})'
            )
            return found
        for subject, result in zip(subjects, results, strict=True):
            subject.found.append(result)
        found.number = index + 1
    sample = subjects[0].found[0]
    kind: type[Panels]
    if hasattr(sample, 'pred_instances'):
        kind = DetectionPanels
    elif hasattr(sample, 'pred_score'):
        kind = ClassifierPanels
    else:
        found.missing.append(
            'images: predictions are neither boxes nor scores of classes'
        )
        return found
    kind(dataset, subjects, found, options, comparison.plain).fill()
    if pair is not None:
        _decompose(pair, dataset, found, tell)
    return found


def _build_subjects(
    comparison: Comparison, found: Found, tell: Callable[[str], None]
) -> tuple[list[Subject], tuple[Run, Any] | None]:
    """The models that can be built, and the pair for the heat maps."""
    subjects: list[Subject] = []
    pair = None
    teacher: Subject | None = None
    for group in comparison.groups:
        run = next((r for r in group.runs if r.checkpoint), group.runs[0])
        if group.role == 'unknown' or run.config is None:
            continue
        tell(f'building {run.name}')
        try:
            models = build_students(run)
        except Exception as error:
            found.missing.append(
                f'{group.name}: its model could not be built '
                f'({said_by(error)})'
            )
            continue
        title = group.name if len(group.runs) == 1 else run.name
        for number, (name, model) in enumerate(models.items()):
            subject = Subject(
                f'{title}, {name}' if name else title,
                group,
                _predictor(model),
                group.role,
                mode=name if number else '',
            )
            if group.role == 'teacher':
                teacher = teacher or subject
            else:
                subjects.append(subject)
        if group.role == 'distilled' and pair is None:
            try:
                pair = (run, build_pair(run))
            except Exception as error:
                found.missing.append(
                    f'{group.name}: no heat maps ({said_by(error)})'
                )
    if pair is not None and isinstance(pair[1], Distillation):
        # With the preprocessing that the distillation gives it.
        own = next(iter(pair[1].teachers.values()), None)
        if own is not None:
            group = (
                teacher.group if teacher else Group('teacher', 'teacher', [])
            )
            teacher = Subject('teacher', group, own.predict, 'teacher')
    if teacher is not None:
        subjects.insert(0, teacher)
    return subjects, pair


def _predictor(model: nn.Module) -> Callable[[Any], list]:
    def predict(batch: Any) -> list:
        with torch.no_grad():
            return model.test_step(batch)

    predict.model = model  # type: ignore[attr-defined]
    return predict


def _count(subject: Subject, batch: Any, found: Found) -> None:
    model = getattr(subject.predict, 'model', None)
    if model is None:
        model = subject.predict.__self__.model  # type: ignore[attr-defined]
    with quiet():
        text = (
            'GFLOPs not counted (no data)'
            if batch is None
            else flops_text(model, batch)
        )
    found.deployed[subject.name] = (number_of_parameters(model), text)


# -- detectors and classifiers -----------------------------------------------


# -- heat maps ----------------------------------------------------------------


def _decompose(
    pair: tuple[Run, Any],
    dataset: Any,
    found: Found,
    tell: Callable[[str], None],
) -> None:
    """Heat maps of the chosen images, and the shares by level."""
    run, model = pair
    of, own = 'teacher', None
    if isinstance(model, MutualDistillation):
        own, of = model.students
        model = model.first
    tell('heat maps')
    try:
        for picture in found.pictures:
            index = int(picture.name.rpartition('-')[2])
            parts = parts_of(model, batch_of(dataset, [index]))
            if parts is None:
                found.missing.append(
                    f'{run.name}: no heat maps: {"+".join(run.methods)} '
                    f'compares no features of equal shape with the {of}'
                )
                return
            decomposition, names = parts
            picture.heats = _heat_lines(
                decomposition, [own] if own else names, of
            )
        shares = []
        for index in range(min(DECOMPOSED, found.number)):
            parts = parts_of(model, batch_of(dataset, [index]))
            if parts is not None and parts[0].shares is not None:
                shares.append(parts[0].shares)
        if shares:
            found.figures.append(
                level_bars(
                    run.name,
                    torch.stack(shares).mean(dim=0).tolist(),
                    len(shares),
                    0,
                )
            )
    except Exception as error:
        found.missing.append(f'{run.name}: no heat maps ({said_by(error)})')


def _heat_lines(
    parts: Decomposition, names: list[str], of: str
) -> list[HeatLine]:
    lines = []
    for level, target in enumerate(parts.teacher):
        estimates = [step[level][0] for step in parts.estimates]
        for row in heat_rows(target[0], estimates, names, of):
            cells = [
                None
                if values is None
                else HeatCell(name, data_uri(coloured(values, row.most)))
                for name, values in zip(row.names, row.maps, strict=True)
            ]
            lines.append(
                HeatLine(
                    f'level {level}',
                    f'{row.title} (0 to {row.most:.2g})',
                    cells,
                )
            )
    return lines
