"""One rank of test_ddp.py; started by torchrun."""

import copy
import sys

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from era_mm.cli import leave_group
from era_mm.engine.launch import prepare_launch
from era_mm.testing import distillation_config, run_config

OPTIONS = {
    'all': {},
    'sampled': dict(twi_steps='sampled'),
    'none': dict(twi_steps='none'),
    'detached': dict(detach=True),
    'off': dict(
        twi_steps='none', loss=dict(align_weight=0.0, residual_weight=0.0)
    ),
    # One image for each rank, whose last level has one place.
    'lone': dict(form='released'),
}


def with_a_level_of_one_place(config: dict) -> dict:
    config = copy.deepcopy(config)
    config['neck'].update(num_outs=4, add_extra_convs='on_input')
    config['bbox_head']['anchor_generator']['strides'] = [8, 16, 32, 64]
    return config


def main(coco: str, teacher_file: str, out: str) -> None:
    torch.set_num_threads(1)
    for name, options in OPTIONS.items():
        model = distillation_config(
            dict(type='era_mm.ERADistiller', **options),
            checkpoint=teacher_file,
        )
        if name == 'lone':
            teacher = model['teacher']
            teacher['config'] = with_a_level_of_one_place(teacher['config'])
            teacher['checkpoint'] = 'random'
            model['student'] = with_a_level_of_one_place(model['student'])
        cfg = Config(
            run_config(
                model,
                coco,
                f'{out}/{name}',
                experiment_name=name,
                launcher='pytorch',
                train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=5),
            )
        )
        if name == 'lone':
            cfg.train_dataloader.batch_size = 1
        prepare_launch(cfg)
        assert cfg.model_wrapper_cfg.find_unused_parameters is False
        runner = Runner.from_cfg(cfg)
        runner.train()
        model = runner.model.module
        state = {**model.state_dict(), **model.distillers.state_dict()}
        # Weights are kept equal by the reducer; norm statistics are not.
        weights = {k: v for k, v in state.items() if 'running' not in k}
        rank = torch.distributed.get_rank()
        torch.save(weights, f'{out}/{name}_rank{rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
    # Else torch's gloo may abort at exit.
    leave_group()
