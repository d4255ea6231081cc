"""What is said of checkpoints that are not all of a run."""

from types import SimpleNamespace

import pytest
from mmengine.hooks import CheckpointHook

from era_mm.engine.checkpoint_hook import lost_gradients


@pytest.mark.parametrize(
    ('gathered', 'interval', 'by_epoch', 'every'),
    [
        # An epoch has three iterations.
        (2, 1, True, 3),
        (2, 5, False, 5),
        (4, 2, True, 6),
        (2, 2, True, None),
        (3, 1, True, None),
        (2, 4, False, None),
        (1, 5, False, None),
        # Written at the end alone, where mmengine updates in any case.
        (2, -1, True, None),
    ],
)
def test_lost_gradients__are_told_where_files_fall_between_updates(
    gathered, interval, by_epoch, every
):
    runner = SimpleNamespace(
        cfg=dict(optim_wrapper=dict(accumulative_counts=gathered)),
        train_loop=SimpleNamespace(dataloader=[0, 1, 2]),
    )
    hook = CheckpointHook(interval=interval, by_epoch=by_epoch)
    said = lost_gradients(hook, runner)
    if every is None:
        assert said == ''
    else:
        assert f'every {every} iterations' in said
        assert f'updated every {gathered} ' in said
