"""One rank of test_trunk_to_branch_runs.py; started by torchrun."""

import sys

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from era_mm.cli import leave_group
from era_mm.engine.launch import prepare_launch
from era_mm.methods.trunk_to_branch import mean_squared_correlation
from era_mm.testing import detector_config, run_config


class Net(nn.Module):
    """Three linear peers on a linear trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(5, 4)
        self.peers = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x):
        x = self.trunk(x)
        return [peer(x).relu() for peer in self.peers]


def joint_batch():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(8, 5, generator=generator, dtype=torch.float64)


def measure(net, batch, loss):
    """Loss and gradients of a net, or of a rank's part of it under DDP."""
    net.zero_grad()
    value = loss(net(batch))
    value.backward()
    gradients = {
        name.removeprefix('module.'): parameter.grad.clone()
        for name, parameter in net.named_parameters()
    }
    return {'value': value.detach(), **gradients}


def measures(net, batch, shares):
    return {
        'correlation': measure(net, batch, mean_squared_correlation),
        # Ranks may hold different numbers of samples.
        'uneven': measure(net, shares, mean_squared_correlation),
    }


def plain_net():
    torch.manual_seed(0)
    return Net().double()


def main(coco: str, out: str) -> None:
    torch.set_num_threads(1)
    # One process on the joint batch, before there are ranks.
    assert not dist.is_initialized()
    joint = measures(plain_net(), joint_batch(), joint_batch())
    cfg = Config(
        run_config(
            dict(
                type='era_mm.Distillation',
                student=detector_config(),
                distiller=dict(type='era_mm.TrunkToBranchDistiller'),
            ),
            coco,
            f'{out}/run',
            launcher='pytorch',
            train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=5),
        )
    )
    prepare_launch(cfg)
    assert cfg.model_wrapper_cfg.find_unused_parameters is False
    runner = Runner.from_cfg(cfg)
    runner.train()
    model = runner.model.module
    state = {**model.state_dict(), **model.distillers.state_dict()}
    # Weights are kept equal by the reducer; norm statistics are not.
    weights = {
        key: value
        for key, value in state.items()
        if 'running' not in key and 'tracked' not in key
    }
    logged = float(
        runner.message_hub.get_scalar('train/t2b_correlation').current()
    )
    rank = dist.get_rank()
    batch = joint_batch()
    net = DistributedDataParallel(plain_net())
    found = measures(
        net, batch[rank::2], batch[:3] if rank == 0 else batch[3:]
    )
    torch.save(
        dict(weights=weights, logged=logged, found=found, joint=joint),
        f'{out}/rank{rank}.pth',
    )


if __name__ == '__main__':
    main(*sys.argv[1:])
    # Else torch's gloo may abort at exit.
    leave_group()
