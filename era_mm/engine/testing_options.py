"""Applies the flags of ``test`` to a config."""

from copy import deepcopy
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.runner import Runner

from era_mm.errors import UserError


def add_show(
    cfg: Config, show: bool, show_dir: str | None, wait_time: float
) -> None:
    """Make the config's visualization hook draw.

    Args:
        cfg: Changed in place.
        show: Open a window per image.
        show_dir: Folder for painted images, None for none.
        wait_time: Seconds for which a window stays open.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UserError(
            '--show, --show-dir: expected default_hooks.visualization in '
            "the config, but it has none. Add mmdet's "
            "dict(type='DetVisualizationHook') or mmpretrain's "
            "dict(type='VisualizationHook', enable=True)."
        )
    hook.show = show
    hook.wait_time = wait_time
    # The hosts have different names for these two settings.
    if str(hook.type).endswith('DetVisualizationHook'):
        hook.draw = True
        folder_key = 'test_out_dir'
    else:
        hook.enable = True
        folder_key = 'out_dir'
    if show_dir is not None:
        hook[folder_key] = show_dir


def add_outputs(runner: Runner, file: str) -> None:
    """Make the test evaluator also write every prediction to a file."""
    evaluator: Any = runner.test_evaluator
    if runner.cfg.get('default_scope') == 'mmdet':
        from mmdet.evaluation import DumpDetResults

        evaluator.metrics.append(DumpDetResults(out_file_path=file))
    else:
        evaluator.metrics.append(DumpResults(out_file_path=file))


def use_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation.

    It uses the config's ``tta_model`` and ``tta_pipeline``; a detector
    without them is tested with a horizontal flip, as in mmdet.

    Args:
        cfg: Changed in place.
    """
    if str(cfg.model.type).startswith('era_mm.'):
        raise UserError(
            f'--tta: expected a plain model, but the config trains '
            f'{cfg.model.type}. Its checkpoints are plain students: give the '
            "student's own config with the same checkpoint."
        )
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        if cfg.get('default_scope') != 'mmdet':
            raise UserError(
                '--tta: expected tta_model and tta_pipeline in the config, '
                'but they are missing. Add them, or omit the flag.'
            )
        cfg.setdefault(
            'tta_model',
            dict(
                type='DetTTAModel',
                tta_cfg=dict(
                    nms=dict(type='nms', iou_threshold=0.5), max_per_img=100
                ),
            ),
        )
        cfg.setdefault('tta_pipeline', _flip_pipeline(cfg))
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def _flip_pipeline(cfg: Config) -> list:
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    flips = [
        dict(type='RandomFlip', prob=1.0),
        dict(type='RandomFlip', prob=0.0),
    ]
    pack = dict(
        type='PackDetInputs',
        meta_keys=(
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
            'flip',
            'flip_direction',
        ),
    )
    pipeline = deepcopy(list(dataset.pipeline))
    pipeline[-1] = dict(type='TestTimeAug', transforms=[flips, [pack]])
    return pipeline
