"""One rank of test_sokd_runs.py; started by torchrun."""

import sys

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from era_mm.cli import leave_group
from era_mm.engine.launch import prepare_launch
from era_mm.testing import distillation_config, run_config

OPTIONS = {'first': {}, 'second': dict(unroll_lr=0.01)}


def main(coco: str, teacher_file: str, out: str) -> None:
    torch.set_num_threads(1)
    for name, options in OPTIONS.items():
        model = distillation_config(
            dict(type='era_mm.SoKDDistiller', search_share=1.0, **options),
            checkpoint=teacher_file,
        )
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
        prepare_launch(cfg)
        assert cfg.model_wrapper_cfg.find_unused_parameters is False
        runner = Runner.from_cfg(cfg)
        model = runner.model.module
        distiller = model.distillers['distiller']
        draws, losses = [], []
        search = distiller._search

        def spy(
            distiller=distiller,
            draws=draws,
            losses=losses,
            search=search,
            **batch,
        ):
            draw = distiller.policy.draw(distiller.step)
            draws.append([draw.chosen, *draw.gates.flatten().tolist()])
            losses.append(search(**batch).item())
            return torch.zeros(())

        distiller._search = spy
        runner.train()
        state = {**model.state_dict(), **distiller.state_dict()}
        rank = torch.distributed.get_rank()
        torch.save(
            dict(
                draws=draws,
                losses=losses,
                policy=dict(distiller.policy.state_dict()),
                # Weights are kept equal by the reducer; statistics are not.
                weights={k: v for k, v in state.items() if 'running' not in k},
            ),
            f'{out}/{name}_rank{rank}.pth',
        )


if __name__ == '__main__':
    main(*sys.argv[1:])
    # Else torch's gloo may abort at exit.
    leave_group()
