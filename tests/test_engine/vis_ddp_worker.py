"""One rank of test_residual_vis_hook.py; started by torchrun."""

import sys

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from era_mm.cli import leave_group
from era_mm.engine.launch import prepare_launch
from era_mm.testing import distillation_config, run_config

HOOK = dict(type='era_mm.ResidualVisHook', interval=1, num_images=1)


def main(coco: str, teacher_file: str, out: str) -> None:
    torch.set_num_threads(1)
    for name, hooks in (('without', []), ('with', [HOOK])):
        model = distillation_config(
            # The ranks have to draw the same estimate in each step.
            dict(type='era_mm.ERADistiller', twi_steps='sampled'),
            checkpoint=teacher_file,
        )
        cfg = Config(
            run_config(
                model,
                coco,
                f'{out}/{name}',
                experiment_name=name,
                launcher='pytorch',
                custom_hooks=hooks,
                train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=1),
            )
        )
        prepare_launch(cfg)
        runner = Runner.from_cfg(cfg)
        runner.train()
        rank = torch.distributed.get_rank()
        for hook in runner.hooks:
            if type(hook).__name__ == 'ResidualVisHook':
                assert len(hook._batches) == (0 if rank else 1)
        model = runner.model.module
        state = {**model.state_dict(), **model.distillers.state_dict()}
        state['random'] = torch.get_rng_state()
        torch.save(state, f'{out}/{name}_rank{rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
    # Else torch's gloo may abort at exit.
    leave_group()
