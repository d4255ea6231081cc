"""One rank of the run in phases of test_residual_kd.py, by torchrun."""

import sys

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from era_mm.engine.launch import prepare_launch
from era_mm.testing import distillation_config, run_config


class RestingStatistics(Hook):
    """Keeps the norm statistics of the student while it rests."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        model = runner.model.module
        phase = model.distillers['distiller'].phase()
        for name in phase.frozen:
            buffers = model.student.get_submodule(name).named_buffers()
            self.state |= {
                f'{phase.name}.{name}.{key}': value.clone()
                for key, value in buffers
            }


def main(coco: str, teacher_file: str, out: str) -> None:
    torch.set_num_threads(1)
    # Two epochs of two iterations on each rank: 0 | 1 | 2 | 3.
    phases = dict(student=1, assistant=1, head=1, joint=None)
    model = distillation_config(
        dict(type='era_mm.ResidualKDDistiller', phases=phases),
        checkpoint=teacher_file,
    )
    cfg = Config(
        run_config(
            model,
            coco,
            f'{out}/run',
            launcher='pytorch',
            train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=5),
        )
    )
    prepare_launch(cfg)
    runner = Runner.from_cfg(cfg)
    resting = RestingStatistics()
    runner.register_hook(resting)
    runner.train()
    model = runner.model.module
    state = {**model.state_dict(), **model.distillers.state_dict()}
    # Weights are kept equal by the reducer; norm statistics of what trains
    # are not.
    weights = {k: v for k, v in state.items() if 'running' not in k}
    weights |= resting.state
    torch.save(weights, f'{out}/rank{torch.distributed.get_rank()}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
