"""One rank of test_ie_kd_runs.py; started by torchrun."""

import sys

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from era_mm.engine.launch import prepare_launch
from era_mm.testing import distillation_config, run_config


def main(coco: str, teacher_file: str, out: str) -> None:
    torch.set_num_threads(1)
    model = distillation_config(
        dict(type='era_mm.IEKDDistiller', pretrain_iters=2),
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
    runner.train()
    distiller = runner.model.module.distillers['distiller']
    state = dict(distiller.named_parameters())
    inner = distiller.inner.state_dict()
    state |= {f'inner.{key}': value for key, value in inner.items()}
    rank = torch.distributed.get_rank()
    torch.save(
        {key: value.detach() for key, value in state.items()},
        f'{out}/rank{rank}.pth',
    )


if __name__ == '__main__':
    main(*sys.argv[1:])
