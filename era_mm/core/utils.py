"""Small helpers of the core."""

import contextlib
import copy
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, broadcast, get_world_size
from mmengine.logging import MessageHub, MMLogger
from torch import Tensor, nn


class Unregistered:
    """Holds a module so that its owner does not register it.

    The module is not in the owner's ``parameters()``, ``state_dict()``, DDP
    buckets and EMA, and ``deepcopy`` shares it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict) -> 'Unregistered':
        return self


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore the state of every random generator afterwards.

    Teacher and distiller are built and initialised inside, so the student's
    initial weights, data order and augmentation are those of a plain run with
    the same seed.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


def random_state() -> Callable[[], None]:
    """A function that gives every random generator its present state."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    state, gpu_states = torch.get_rng_state(), torch.cuda.get_rng_state_all()

    def restore() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(state)
        torch.cuda.set_rng_state_all(gpu_states)

    return restore


def run_seed() -> int:
    """The seed of the run, the same on all ranks and after a resume.

    It is kept with the logged values, which checkpoints contain. Ranks may
    have different seeds (``diff_rank_seed``); all use the first rank's, and
    must call this in the same step.
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
    """Log errors only."""

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
    """Put a model in eval mode, and restore every module's mode afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def broadcast_buffers(module: nn.Module) -> None:
    """Give all ranks the first rank's buffers, such as norm statistics.

    Each rank has seen other images, and a checkpoint has only the first
    rank's. A loss on the features of a module in eval mode depends on them:
    without this it would differ between the ranks, and after a resume.
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
        parameters: The parameters it updates.
        gradients: Their gradients on this rank.
    """
    for parameter, gradient in zip(parameters, gradients, strict=True):
        all_reduce(gradient)
        parameter.grad = gradient / get_world_size()
    optimizer.step()
    optimizer.zero_grad()
    # Autocast caches low-precision copies of the old weights.
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
