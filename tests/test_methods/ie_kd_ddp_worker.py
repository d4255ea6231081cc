"""One rank of test_ie_kd_runs.py; started by torchrun."""

import sys

import torch
from mmengine.config import Config

from era_mm.cli import leave_group
from era_mm.engine.launch import prepare_launch
from era_mm.testing import distillation_config, recorded_run, run_config


def main(coco: str, teacher_file: str, out: str) -> None:
    torch.set_num_threads(1)
    # Two iterations an epoch on each rank, the first epoch within the phase:
    # 0 1 | 2, 3. Without a phase the coder learns to the end.
    for pretrain_iters, begin in ((3, 0), (3, 1), (0, 0), (0, 1)):
        model = distillation_config(
            dict(type='era_mm.IEKDDistiller', pretrain_iters=pretrain_iters),
            checkpoint=teacher_file,
        )
        name = f'pretrain_{pretrain_iters}'
        cfg = Config(
            run_config(
                model,
                coco,
                f'{out}/{name}_from_{begin}',
                launcher='pytorch',
                train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=5),
            )
        )
        prepare_launch(cfg)
        runner, steps = recorded_run(
            cfg,
            resume_from=f'{out}/{name}_from_0/epoch_{begin}.pth'
            if begin
            else None,
        )
        distiller = runner.model.module.distillers['distiller']
        state = dict(distiller.named_parameters())
        inner = distiller.inner.state_dict()
        state |= {f'inner.{key}': value for key, value in inner.items()}
        state = {key: value.detach() for key, value in state.items()}
        rank = torch.distributed.get_rank()
        torch.save((state, steps), f'{out}/{name}_from_{begin}_{rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
    # Else torch's gloo may abort at exit.
    leave_group()
