"""Small helpers of the core."""

import contextlib
import copy
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, broadcast, get_world_size
from mmengine.logging import MessageHub, MMLogger
from torch import Tensor, nn


class Unregistered:
    """Holds a module so that the owner does not register it.

    What is inside is absent from the owner's ``parameters()``,
    ``state_dict()``, DDP buckets and EMA, and is shared by ``deepcopy``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict) -> 'Unregistered':
        return self


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Leave every random generator as it was found.

    Building and initialising teacher and distiller inside keeps the student's
    initial weights, its data order and its augmentation those of a plain run
    with the same seed.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


def run_seed() -> int:
    """The seed of the run, alike on all ranks and in a resumed run.

    Kept with what the run logs, so a file has it. Ranks of one run may have
    seeds of their own (``diff_rank_seed``); the first rank's holds for all,
    who must call this in the same step.
    """
    hub = MessageHub.get_current_instance()
    seed = hub.get_info('era_mm_seed', None)
    if seed is None:
        own = torch.tensor(torch.initial_seed() % 2**31)
        broadcast(own)
        seed = int(own)
        hub.update_info('era_mm_seed', seed)
    return int(seed)


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """Keep everything but errors out of the run's log."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    # Not `logging.disable`: mmengine's loggers remember what is enabled.
    logger = MMLogger.get_current_instance()
    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and every module back as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def broadcast_buffers(module: nn.Module) -> None:
    """Give all ranks the first one's buffers, such as norm statistics.

    Each rank has seen other images, and a file has the first rank's alone.
    What learns from a module in eval mode depends on them: without this the
    ranks would differ in it, and so would a resumed run.
    """
    for buffer in module.buffers():
        broadcast(buffer)


def take_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> None:
    """One step of an inner optimiser, gradients averaged over the ranks.

    Args:
        optimizer: The optimiser of these parameters.
        parameters: What it moves.
        gradients: Their gradients on this rank.
    """
    for parameter, gradient in zip(parameters, gradients, strict=True):
        all_reduce(gradient)
        parameter.grad = gradient / get_world_size()
    optimizer.step()
    optimizer.zero_grad()
    # Autocast keeps low-precision copies of the weights from before.
    torch.clear_autocast_cache()


def to_cpu(value: Any) -> Any:
    """Copy nested tensors to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu(item) for item in value)
    return copy.copy(value)
