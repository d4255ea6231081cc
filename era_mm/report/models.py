"""Builds the models of runs from their configs and checkpoints.

No Runner is built: it would write into the work dir. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from mmengine.utils import import_modules_from_strings
from torch import nn

from era_mm.core import (
    Distillation,
    read_checkpoint,
    student_config_of,
    students_of,
)
from era_mm.core.utils import preserve_rng
from era_mm.errors import UserError

from .runs import Run, several


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what hosts print while they build and load."""
    logger = logging.getLogger('mmengine')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def enter(run: Run) -> Config:
    """Import what a run's config needs and set its scope."""
    assert run.config is not None
    imports = run.config.get('custom_imports')
    if imports:
        import_modules_from_strings(**imports)
    init_default_scope(run.config.get('default_scope', 'mmengine'))
    return run.config


def here(file: str) -> bool:
    """Whether a file, or what was fetched from a URL, is on this machine."""
    if '://' not in file:
        return Path(file).is_file()
    cached = Path(torch.hub.get_dir(), 'checkpoints', os.path.basename(file))
    return cached.is_file()


def model_config(run: Run) -> dict:
    """The run's model, with the preprocessing that the Runner would add."""
    config = enter(run)
    model = copy.deepcopy(config.model)
    if config.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', config.data_preprocessor)
    return model


def build_students(run: Run) -> dict[str, nn.Module]:
    """The deployed models of a run, with their weights, in eval mode.

    Returns:
        One model under ''; for a ``MutualDistillation`` each student under
        its name.

    Raises:
        UserError: It has no checkpoint.
    """
    if run.checkpoint is None:
        raise UserError(f'{run.name} has no checkpoint')
    config = model_config(run)
    if not run.is_distillation:
        return {'': _build(run, config)}
    if 'students' not in config:
        return {'': _build(run, _student_config(config))}
    weights = students_of(read_checkpoint(str(run.checkpoint)))
    students = {}
    for name, student in config['students'].items():
        own = dict(type='era_mm.Distillation', student=student)
        if config.get('data_preprocessor') is not None:
            own['data_preprocessor'] = config['data_preprocessor']
        students[name] = _build(run, _student_config(own), weights[name])
    return students


def _student_config(config: dict) -> dict:
    preprocessor = config.get('data_preprocessor')
    student, scope = student_config_of(config)
    if preprocessor is not None:
        student.setdefault('data_preprocessor', preprocessor)
    if scope is not None:
        init_default_scope(scope)
    return student


def _build(
    run: Run, config: dict, weights: dict[str, Any] | None = None
) -> nn.Module:
    """A host model with the given weights, or those of the checkpoint."""
    with quiet(), preserve_rng():
        model = MODELS.build(config)
        if weights is None:
            load_checkpoint(
                model, str(run.checkpoint), map_location='cpu', strict=True
            )
        else:
            model.load_state_dict(weights)
    return model.eval()


def build_pair(run: Run) -> Any:
    """The whole distillation of a run, with its teachers, in eval mode.

    Raises:
        UserError: A checkpoint is missing.
    """
    if run.checkpoint is None:
        raise UserError(f'{run.name} has no checkpoint')
    for checkpoint in run.teacher_checkpoints:
        if not here(checkpoint):
            raise UserError(
                f"the teacher's weights are not here: {checkpoint} (the "
                'report downloads nothing; run it in the folder of the '
                'training)'
            )
    config = model_config(run)
    for teacher in several(config.get('teacher')):
        _find_config(teacher)
    with quiet(), preserve_rng():
        model = MODELS.build(config)
        load_checkpoint(model, str(run.checkpoint), map_location='cpu')
        if isinstance(model, Distillation):
            model.load_teachers()
    return model.eval()


def _find_config(teacher: Any) -> None:
    """If a teacher's config has moved, use the one next to its weights."""
    config = teacher.get('config')
    if not isinstance(config, str) or '::' in config or Path(config).is_file():
        return
    folder = Path(str(teacher.get('checkpoint'))).parent
    dumped = sorted(folder.glob('*.py')) or sorted(
        folder.glob('*/vis_data/config.py')
    )
    if dumped:
        teacher['config'] = str(dumped[-1])


def build_dataset(run: Run) -> Any:
    """The images that the run was validated on.

    Raises:
        UserError: The config has none.
    """
    config = enter(run)
    loader = config.get('val_dataloader')
    if not loader:
        raise UserError(f'{run.name} has no val_dataloader')
    with quiet():
        dataset = DATASETS.build(copy.deepcopy(loader['dataset']))
        dataset.full_init()
    return dataset


def batch_of(dataset: Any, indices: list[int]) -> Any:
    """Images as a batch from a val dataloader."""
    return pseudo_collate([dataset[index] for index in indices])


def number_of_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())
