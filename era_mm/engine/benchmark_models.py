"""The models that a benchmark measures: the plain student, distillations.

Weights are initial ones, and no file is read.
"""

import copy
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from era_mm.core import (
    Distillation,
    distillation_kind,
    load_strictly,
    student_config_of,
)
from era_mm.core.host_models import (
    forget_files,
    resolve_model_config,
    whole_model,
)
from era_mm.core.teacher import RANDOM
from era_mm.engine.launch import use_amp
from era_mm.engine.peak_memory import state_bytes
from era_mm.errors import UserError

#: Share of the config's learning rate. The hosts' warm-ups begin with it; with
#: the full rate and no warm-up, random weights diverge.
LR_FACTOR = 0.001


class Trained:
    """A model with its optimiser, and the model that is deployed.

    Args:
        name: What messages call it.
        model: The model, with its weights.
        deployed: The host model that predicts.
        cfg: The config with its ``optim_wrapper``.
        device: Where it is trained.
        amp: Whether to train in mixed precision.

    Raises:
        UserError: The config has no ``optim_wrapper``.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        deployed: nn.Module,
        cfg: Config,
        device: torch.device,
        amp: bool,
    ) -> None:
        if 'optim_wrapper' not in cfg:
            raise UserError(
                f'config: expected an `optim_wrapper`, but {name_of(cfg)} has '
                'none. Give a complete training config.'
            )
        self.name = name
        self.model = model.to(device).train()
        self.deployed = deployed.to(device).eval()
        cfg = copy.deepcopy(cfg)
        if amp:
            use_amp(cfg, device.type)
        self.wrapper: OptimWrapper = build_optim_wrapper(
            self.model, cfg.optim_wrapper
        )
        for group in self.wrapper.optimizer.param_groups:
            group['lr'] *= LR_FACTOR
        self._loss: Tensor | float = 0.0

    @property
    def params(self) -> int:
        """Number of parameters of the deployed model."""
        return sum(p.numel() for p in self.deployed.parameters())

    @property
    def state(self) -> int:
        """Bytes that it keeps between steps, without teachers."""
        return state_bytes(self.model, self.wrapper)

    def step(self, batch: Any) -> None:
        """One training step."""
        log = self.model.train_step(batch, self.wrapper)
        self._loss = log['loss'].detach()

    @torch.no_grad()
    def predict(self, batch: Any) -> None:
        """One prediction, from the raw batch to boxes or scores."""
        self.deployed.test_step(batch)

    def check(self) -> None:
        """Refuse a model whose last loss is not finite.

        Raises:
            UserError: It is infinite or NaN.
        """
        loss = float(self._loss)
        if not math.isfinite(loss):
            raise UserError(
                f'{self.name}: the loss became {loss} on random images, and '
                'the time of such steps means nothing. Give another '
                '`optim_wrapper`, or omit --amp.'
            )


class Student(Trained):
    """The plain student of a pair, trained as the host does.

    Args:
        cfg: The config of a distillation.
        device: Where it is trained.
        amp: Whether to train in mixed precision.
    """

    def __init__(self, cfg: Config, device: torch.device, amp: bool) -> None:
        config, scope = _student_of(cfg)
        with DefaultScope.overwrite_default_scope(scope):
            model = _initialised(config)
        super().__init__(
            'the plain student', model, copy.deepcopy(model), cfg, device, amp
        )


class Distilled(Trained):
    """A distillation, and its student, which is deployed.

    Args:
        cfg: Its config; the teachers' checkpoints are not read.
        device: Where it is trained.
        amp: Whether to train in mixed precision.
    """

    model: Distillation

    def __init__(self, cfg: Config, device: torch.device, amp: bool) -> None:
        config = _model_of(cfg)
        model = _initialised(config)
        host_config, scope = student_config_of(config)
        with DefaultScope.overwrite_default_scope(scope):
            exported = MODELS.build(copy.deepcopy(host_config))
        load_strictly(exported, model.state_dict(), name='the student')
        super().__init__(name_of(cfg), model, exported, cfg, device, amp)
        #: Whether the plain student is deployed, without further modules.
        self.is_plain = host_config == _student_of(cfg)[0]

    @property
    def teachers(self) -> dict[str, Any]:
        """The teachers that run in a step."""
        return {
            name: teacher
            for name, teacher in self.model.teachers.items()
            if teacher.is_recorded
        }

    @property
    def late(self) -> int:
        """The first iteration at which all phases and schedules are active."""
        steps = [0]
        for distiller in self.model.distillers.values():
            steps.append(distiller.min_iters)
            steps += [s.start + s.ramp for s in distiller.schedules.values()]
        return max(steps)

    def preprocess(self, batch: Any) -> Any:
        """A batch, preprocessed for student and teachers as in training."""
        return self.model.data_preprocessor(copy.deepcopy(batch), True)

    def teach(self, data: Any) -> dict[str, Any]:
        """The teachers' forward pass in a step, as deep as needed."""
        with self.wrapper.optim_context(self.model):
            return self.model.wiring.teach(**data)

    def teacher_feats(self, batch: Any) -> int:
        """Bytes of the teachers' features for a batch."""
        return sum(
            feat.numel() * feat.element_size()
            for feats in self.teach(self.preprocess(batch)).values()
            for levels in feats.values()
            for feat in levels
        )


def name_of(cfg: Config) -> str:
    """What a benchmark calls a config."""
    return Path(cfg.filename or 'config').stem


def check_configs(cfgs: Sequence[Config]) -> None:
    """Refuse configs that cannot be measured together.

    Raises:
        UserError: One is not a distillation, or trains two students, or is
            given twice; or students or optimisers differ.
    """
    for cfg in cfgs:
        model = cfg.get('model', {})
        kind = distillation_kind(model)
        if kind == 'MutualDistillation':
            raise UserError(
                f'config: {name_of(cfg)} trains two students that teach each '
                'other, so there is no plain step to compare with. Give '
                'configs whose model is era_mm.Distillation.'
            )
        if kind != 'Distillation':
            raise UserError(
                'config: expected one whose model is era_mm.Distillation, '
                f'but {name_of(cfg)} has {model.get("type")}. The plain '
                'student is measured with its distillation; give only '
                'configs of distillations.'
            )
    names = [name_of(cfg) for cfg in cfgs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f'config: {", ".join(twice)} was given twice. Give each once, '
            'with a unique name.'
        )
    first, *others = cfgs
    for cfg in others:
        if _student_of(cfg) != _student_of(first):
            raise UserError(
                'config: expected configs of one student, but those of '
                f'{name_of(first)} and {name_of(cfg)} differ. Measure them '
                'separately.'
            )
        kinds = [
            each.get('optim_wrapper', {}).get('optimizer', {}).get('type')
            for each in (first, cfg)
        ]
        if kinds[0] != kinds[1]:
            raise UserError(
                f'config: {name_of(first)} trains with {kinds[0]} and '
                f'{name_of(cfg)} with {kinds[1]}, so their plain steps would '
                'differ. Measure them separately.'
            )


def _model_of(cfg: Config) -> ConfigDict:
    """The model's config, with random teachers."""
    model = whole_model(cfg)
    teacher = model.get('teacher') or {}
    for entry in [teacher] if 'config' in teacher else teacher.values():
        entry['checkpoint'] = RANDOM
    return model


def _student_of(cfg: Config) -> tuple[ConfigDict, str | None]:
    """The plain student's config, and the scope of its types."""
    model = _model_of(cfg)
    config, scope = resolve_model_config(model.student)
    if model.get('data_preprocessor') is not None:
        config.setdefault('data_preprocessor', model.data_preprocessor)
    return config, scope


def _initialised(config: ConfigDict) -> nn.Module:
    """A model with initial weights; no file is read.

    The student of a distillation gets the weights of the plain one.
    """
    seed(0)
    model = MODELS.build(copy.deepcopy(config))
    forget_files(model)
    # The student is not a child of a distillation, which has its children.
    if isinstance(model, Distillation):
        forget_files(model.student)
    model.init_weights()
    return model


def seed(number: int) -> None:
    """Seed all random number generators."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
