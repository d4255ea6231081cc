"""The distributed wrappers under which distillations train."""

from typing import Any

import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import nn

from era_mm.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class DistillationDataParallel(MMDistributedDataParallel):
    """mmengine's wrapper, also for CPU ranks and for pre-training.

    mmengine passes ``device_ids=[local_rank]`` to every wrapper, which torch
    refuses for a model on the CPU. It also never calls the module's own
    ``train_step``, so this wrapper calls the module's pre-training step.

    Args:
        module: The model; its parameters are on one device.
        device_ids: The rank's GPU. Dropped for a model on the CPU.
        kwargs: As in mmengine's ``MMDistributedDataParallel``.
            ``find_unused_parameters`` is on for a model with phases.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if next(module.parameters()).device.type == 'cpu':
            device_ids = None
        if getattr(module, 'has_phases', False):
            # Frozen parameters get no gradient, for which the reducer would
            # wait.
            kwargs['find_unused_parameters'] = True
        super().__init__(module, device_ids=device_ids, **kwargs)

    def train_step(
        self, data: dict | tuple | list, optim_wrapper: OptimWrapper
    ) -> dict[str, torch.Tensor]:
        """One optimiser step, or the module's own pre-training step."""
        if getattr(self.module, 'pretraining', False):
            return self.module.pretrain_step(data)
        return super().train_step(data, optim_wrapper)


@MODEL_WRAPPERS.register_module()
class MutualDataParallel(nn.Module):
    """The wrapper of a ``MutualDistillation``: one DDP per student.

    A single DDP around both would wait in one student's turn for the
    gradients of the other.

    Args:
        module: The model.
        kwargs: As in :class:`DistillationDataParallel`, for each half.
    """

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.module = module
        # A plain dict, so that the module tree and the keys of the state
        # dict do not change.
        self._turns = {
            name: DistillationDataParallel(half, **kwargs)
            for name, half in module.students.items()
        }

    def train_step(self, data: Any, optim_wrapper: Any) -> dict:
        """The module's own step, each turn through its DDP."""
        return self.module.train_step(data, optim_wrapper, self._turns)

    def val_step(self, data: Any) -> list:
        """The module's own."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> list:
        """The module's own."""
        return self.module.test_step(data)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own."""
        return self.module(*args, **kwargs)
