"""One of the ranks that test_ddp.py starts."""

import os

import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import distributed, nn

from era_mm.cli import leave_group
from era_mm.engine import DistillationDataParallel


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
    leave_group()
    print(f'rank {rank} agrees')


if __name__ == '__main__':
    main()
