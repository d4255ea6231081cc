"""One rank of the runs in phases of test_residual_kd.py, by torchrun."""

import sys

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from era_mm.cli import leave_group
from era_mm.engine.launch import prepare_launch
from era_mm.testing import distillation_config, recorded_run, run_config


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
    # Two iterations an epoch on each rank, so that epochs end within phases:
    # 0 1 | 2, 3 | 4, 5 | 6, 7 | 8 9.
    phases = dict(student=3, assistant=2, head=2, joint=None)
    model = distillation_config(
        dict(type='era_mm.ResidualKDDistiller', phases=phases),
        checkpoint=teacher_file,
    )
    for begin in (0, 2, 4):
        cfg = Config(
            run_config(
                model,
                coco,
                f'{out}/from_{begin}',
                launcher='pytorch',
                train_cfg=dict(by_epoch=True, max_epochs=5, val_interval=9),
            )
        )
        prepare_launch(cfg)
        resting = RestingStatistics()
        runner, steps = recorded_run(
            cfg,
            resume_from=f'{out}/from_0/epoch_{begin}.pth' if begin else None,
            hooks=(resting,),
        )
        trained = runner.model.module
        state = {**trained.state_dict(), **trained.distillers.state_dict()}
        # Weights are kept equal by the reducer; norm statistics of what
        # trains are not.
        weights = {k: v for k, v in state.items() if 'running' not in k}
        weights |= resting.state
        rank = torch.distributed.get_rank()
        torch.save((weights, steps), f'{out}/from_{begin}_rank{rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
    # Else torch's gloo may abort at exit.
    leave_group()
