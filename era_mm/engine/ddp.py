"""The distributed wrapper under which a distillation trains."""

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
    refuses for a model on the CPU. And it never calls the module's own
    ``train_step``, so a model that pre-trains something first is asked here.

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
            # What a phase freezes gets no gradient, which the reducer would
            # wait for.
            kwargs['find_unused_parameters'] = True
        super().__init__(module, device_ids=device_ids, **kwargs)

    def train_step(
        self, data: dict | tuple | list, optim_wrapper: OptimWrapper
    ) -> dict[str, torch.Tensor]:
        """One optimiser step, or the module's own pre-training step."""
        if getattr(self.module, 'pretraining', False):
            return self.module.pretrain_step(data)
        return super().train_step(data, optim_wrapper)
