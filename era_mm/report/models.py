"""Builds the models of runs from their configs and checkpoints, to look at.

No Runner is built: it would write into the work dir. Nothing is fetched.
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

from era_mm.core.distillation import student_config_of
from era_mm.core.utils import preserve_rng
from era_mm.errors import UserError

from .runs import Run, several


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep to itself what hosts print while they build and load."""
    logger = logging.getLogger('mmengine')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def enter(run: Run) -> Config:
    """Import what a run's config names and take its scope."""
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


def build_student(run: Run) -> nn.Module:
    """The deployed model of a run, with its weights, in eval mode.

    Raises:
        UserError: Its checkpoint is not there.
    """
    if run.checkpoint is None:
        raise UserError(f'{run.name} has no checkpoint')
    config = model_config(run)
    if run.is_distillation:
        if 'student' not in config:
            raise UserError(
                f'{run.name} trained two students in one file; export one of '
                'them to look at it'
            )
        preprocessor = config.get('data_preprocessor')
        config, scope = student_config_of(config)
        if preprocessor is not None:
            config.setdefault('data_preprocessor', preprocessor)
        if scope is not None:
            init_default_scope(scope)
    with quiet(), preserve_rng():
        model = MODELS.build(config)
        load_checkpoint(
            model, str(run.checkpoint), map_location='cpu', strict=True
        )
    return model.eval()


def build_pair(run: Run) -> Any:
    """The whole distillation of a run, teachers and all, in eval mode.

    Raises:
        UserError: A checkpoint is not there.
    """
    if run.checkpoint is None:
        raise UserError(f'{run.name} has no checkpoint')
    for checkpoint in run.teacher_checkpoints:
        if not here(checkpoint):
            raise UserError(
                f"the teacher's weights are not here: {checkpoint} (the "
                'report fetches nothing; run it in the folder that the '
                'training ran in)'
            )
    config = model_config(run)
    for teacher in several(config.get('teacher')):
        _find_config(teacher)
    with quiet(), preserve_rng():
        model = MODELS.build(config)
        load_checkpoint(model, str(run.checkpoint), map_location='cpu')
        model.load_teachers()
    return model.eval()


def _find_config(teacher: Any) -> None:
    """Where a teacher's config has moved away: the one beside its weights."""
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
    """Images as a dataloader of val gives them."""
    return pseudo_collate([dataset[index] for index in indices])


def number_of_parameters(model: nn.Module) -> int:
    """Numbers that training sets."""
    return sum(p.numel() for p in model.parameters())
