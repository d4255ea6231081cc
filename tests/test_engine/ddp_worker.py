"""One of the ranks that test_ddp.py starts."""

import os
from types import SimpleNamespace

import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import distributed, nn

from era_mm.cli import leave_group
from era_mm.engine import DistillationDataParallel, FiniteHook


class ToyModel(BaseModel):
    """One weight; its loss is weight times input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.linear.weight)
        self.pretraining = False

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.linear(inputs).mean())

    def pretrain_step(self, data) -> dict:
        return dict(loss_pretrain=data['inputs'].sum())


def skip_together(rank: int) -> None:
    """Nan on one rank: both leave the step out, and go on together."""
    wrapped = DistillationDataParallel(ToyModel(), broadcast_buffers=False)
    optimizer = OptimWrapper(torch.optim.SGD(wrapped.parameters(), lr=1.0))
    hook = FiniteHook(action='skip')
    runner = SimpleNamespace(
        model=wrapped,
        optim_wrapper=optimizer,
        message_hub=MessageHub('skip'),
        logger=MMLogger.get_current_instance(),
    )
    hook.before_train(runner)
    for runner.iter, value in enumerate((float('nan') if rank else 1.0, 1.0)):
        hook.before_train_iter(runner, 0)
        inputs = torch.full((1, 1), value)
        logged = wrapped.train_step(dict(inputs=inputs), optimizer)
        hook.after_train_iter(runner, 0, None, logged)
    runner.iter = 2
    hook.after_train(runner)
    # From 1 by one step of gradient 1.
    assert wrapped.module.linear.weight.item() == 0.0
    assert runner.message_hub.get_info('era_mm_left_out') == 1


def main() -> None:
    distributed.init_process_group('gloo')
    rank = int(os.environ['RANK'])
    # As mmengine builds it: with a device id even on the CPU.
    wrapped = DistillationDataParallel(
        ToyModel(), device_ids=[rank], broadcast_buffers=False
    )
    weight = wrapped.module.linear.weight
    optimizer = OptimWrapper(torch.optim.SGD(wrapped.parameters(), lr=1.0))
    inputs = torch.full((1, 1), float(rank))
    wrapped.train_step(dict(inputs=inputs), optimizer)
    # d loss / d weight is the input: 0 on rank 0, 1 on rank 1, mean 0.5.
    assert abs(weight.item() - 0.5) < 1e-6

    wrapped.module.pretraining = True
    log = wrapped.train_step(dict(inputs=inputs), optimizer)
    assert log == dict(loss_pretrain=inputs.sum())
    assert abs(weight.item() - 0.5) < 1e-6
    skip_together(rank)
    leave_group()
    print(f'rank {rank} agrees')


if __name__ == '__main__':
    main()
