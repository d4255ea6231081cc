"""Measures the memory of a training step, on a GPU and on a CPU."""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from era_mm.core import Distillation


def peak_of(run: Callable[[], Any], device: torch.device) -> int:
    """The peak memory that a call allocates, in bytes.

    Memory from before the call does not count. On a GPU torch's allocator
    counts it; on a CPU it is the running sum of the allocations and frees
    that torch's profiler sees, work space of operators included if it comes
    from torch's allocator.

    Args:
        run: The function to call. Its result is dropped.
        device: Where it runs.
    """
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with warnings.catch_warnings():
        # It warns that it drops earlier events; there are none.
        warnings.simplefilter('ignore')
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True
        ) as profiler:
            run()
    return running_peak(_memory_events(profiler))


def _memory_events(profiler: profile) -> list[tuple[int, int]]:
    """Address and bytes of each allocation, negative when freed."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, 'trace.json')
        profiler.export_chrome_trace(file)
        with open(file, encoding='utf-8') as opened:
            trace = json.load(opened)
    events = [e for e in trace['traceEvents'] if e.get('name') == '[memory]']
    events.sort(key=lambda event: event['ts'])
    return [(e['args']['Addr'], e['args']['Bytes']) for e in events]


def running_peak(events: Iterable[tuple[int, int]]) -> int:
    """Peak of the live memory, from allocations in order.

    Memory allocated before the first event is ignored, also when it is
    freed.

    Args:
        events: Address and bytes; negative bytes when memory is freed.
    """
    alive: dict[int, int] = {}
    now = peak = 0
    for address, size in events:
        if size > 0:
            alive[address] = size
            now += size
            peak = max(peak, now)
        else:
            now -= alive.pop(address, 0)
    return peak


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storage of tensors; shared storage counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def teacher_bytes(model: Distillation) -> int:
    """Weights and buffers of all teachers, in bytes."""
    return bytes_of(
        tensor
        for teacher in model.teachers.values()
        for tensor in _weights(teacher.model)
    )


def state_bytes(model: nn.Module, wrapper: OptimWrapper) -> int:
    """Bytes that a model keeps between steps.

    Parameters, buffers and the optimiser's state; for a distillation also
    those of distillers and inner modules, without the teachers.
    """
    return bytes_of(_state(model, wrapper))


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of all trained parameters."""
    return sum(
        parameter.numel() * parameter.element_size()
        for part in (model, *_inner_modules(model))
        for parameter in part.parameters()
        if parameter.requires_grad
    )


def _state(model: nn.Module, wrapper: OptimWrapper) -> Iterator[Tensor]:
    for part in (model, *_inner_modules(model)):
        yield from _weights(part)
    yield from _tensors_in(wrapper.optimizer.state_dict())
    if isinstance(model, Distillation):
        for distiller in model.distillers.values():
            if distiller.inner_optimizer is not None:
                yield from _tensors_in(distiller.inner_optimizer.state_dict())


def _tensors_in(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, (dict, list, tuple)):
        for part in node.values() if isinstance(node, dict) else node:
            yield from _tensors_in(part)


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _inner_modules(model: nn.Module) -> list[nn.Module]:
    return model.inner_modules() if isinstance(model, Distillation) else []
