"""One rank of test_mutual.py; started by torchrun."""

import sys

import torch
from mmengine.config import Config

from era_mm.cli import leave_group
from era_mm.engine.launch import prepare_launch
from era_mm.testing import detector_config, recorded_run, run_config


def main(coco: str, out: str) -> None:
    torch.set_num_threads(1)
    model = dict(
        type='era_mm.MutualDistillation',
        students=dict(
            first=detector_config(), second=detector_config(width=12)
        ),
        distiller=dict(type='era_mm.IEKDDistiller'),
    )
    for begin in (0, 1):
        cfg = Config(
            run_config(
                model,
                coco,
                f'{out}/from_{begin}',
                launcher='pytorch',
                optim_wrapper=dict(
                    type='OptimWrapper',
                    constructor='era_mm.MutualOptimWrapperConstructor',
                    optimizer=dict(type='SGD', lr=0.01),
                ),
                train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=5),
            )
        )
        prepare_launch(cfg)
        assert cfg.model_wrapper_cfg.type == 'era_mm.MutualDataParallel'
        runner, steps = recorded_run(
            cfg,
            resume_from=f'{out}/from_0/epoch_{begin}.pth' if begin else None,
        )
        state = {}
        for name, half in runner.model.module.students.items():
            state |= {f'{name}.{k}': v for k, v in half.named_parameters()}
            inner = half.distillers['distiller'].inner
            state |= {
                f'{name}.inner.{k}': v for k, v in inner.named_parameters()
            }
        state = {k: v.detach() for k, v in state.items()}
        rank = torch.distributed.get_rank()
        torch.save((state, steps), f'{out}/from_{begin}_rank{rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
    # Else torch's gloo may abort at exit.
    leave_group()
