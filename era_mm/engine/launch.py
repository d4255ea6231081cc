"""Adapts a config to the machine on which it runs."""

import os

from mmengine.config import Config
from mmengine.device import get_device
from torch import distributed

from era_mm.core import distillation_kind
from era_mm.engine.stop_hook import end_with_parent
from era_mm.errors import UserError


def prepare_launch(cfg: Config) -> None:
    """Make a distributed run work on GPUs and on CPUs alike.

    mmengine selects a CUDA device when it starts the process group. So on a
    machine without one the group is started here; mmengine then uses it.

    Args:
        cfg: Changed in place: the model wrapper, unless it is set.

    Raises:
        UserError: The launcher needs GPUs, or did not set its variables.
    """
    if cfg.launcher == 'none':
        return
    end_with_parent()
    kind = distillation_kind(cfg.get('model', {}))
    wrapper = dict(
        type='era_mm.MutualDataParallel'
        if kind == 'MutualDistillation'
        else 'era_mm.DistillationDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.setdefault('model_wrapper_cfg', wrapper)
    if get_device() != 'cpu' or distributed.is_initialized():
        return
    if cfg.launcher != 'pytorch':
        raise UserError(
            f'--launcher {cfg.launcher}: expected an accelerator, but torch '
            'sees none. Without one, start the ranks with torchrun and '
            '--launcher pytorch.'
        )
    missing = [
        name
        for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
        if name not in os.environ
    ]
    if missing:
        raise UserError(
            '--launcher pytorch: expected the variables that torchrun sets, '
            f'but {", ".join(missing)} are not set. Start the ranks with '
            'tools/dist_train.sh, torchrun or mim, or omit the flag.'
        )
    distributed.init_process_group('gloo')


def use_amp(cfg: Config, device: str | None = None) -> None:
    """Turn the config's optimiser wrapper into a mixed-precision one.

    Args:
        cfg: Changed in place.
        device: Device of the model, 'cpu' or an accelerator. None: the
            device that a run would use.

    Raises:
        UserError: The wrapper is of another type.
    """
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if kind in ('AmpOptimWrapper', 'CPUAmpOptimWrapper'):
        return
    if kind != 'OptimWrapper':
        raise UserError(
            "--amp: expected optim_wrapper.type='OptimWrapper' in the "
            f'config, but it is {kind!r}. Omit the flag and set mixed '
            'precision in the config.'
        )
    if (device or get_device()) == 'cpu':
        cfg.optim_wrapper.type = 'CPUAmpOptimWrapper'
    else:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
