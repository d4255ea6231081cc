"""One rank of test_twi_hook.py; started by torchrun."""

import sys

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from era_mm.cli import leave_group
from era_mm.engine.launch import prepare_launch
from era_mm.methods.era import TWIHook
from era_mm.testing import distillation_config, run_config


class Listening(TWIHook):
    """Keeps what this rank has measured, and what it reports."""

    def after_val_epoch(self, runner, metrics=None):
        own = self._unexplained.get('distiller', [])
        self.measured = [share.tolist() for share in own]
        super().after_val_epoch(runner, metrics)
        self.reported = dict(metrics)


def main(coco: str, teacher_file: str, out: str) -> None:
    torch.set_num_threads(1)
    for images in (1, 3):
        model = distillation_config(
            dict(type='era_mm.ERADistiller', mbrnet=dict(num_branches=2)),
            checkpoint=teacher_file,
        )
        cfg = run_config(
            model,
            coco,
            f'{out}/{images}',
            experiment_name=str(images),
            launcher='pytorch',
            train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=1),
        )
        # The second rank gets one image less than the first, or none.
        loader = cfg.val_dataloader
        loader.batch_size = 1
        loader.sampler.round_up = False
        loader.dataset.indices = images
        cfg = Config(cfg)
        prepare_launch(cfg)
        runner = Runner.from_cfg(cfg)
        hook = Listening(modes=['T'])
        runner.register_hook(hook)
        runner.train()
        rank = torch.distributed.get_rank()
        torch.save(
            (hook.measured, hook.reported), f'{out}/{images}_rank{rank}.pth'
        )


if __name__ == '__main__':
    main(*sys.argv[1:])
    # Else torch's gloo may abort at exit.
    leave_group()
