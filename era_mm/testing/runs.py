"""Whole runs, told step by step, for tests that interrupt and resume them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner


class _StepLog(Hook):
    """Keeps what each iteration logs, as the rank itself has it."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        self.steps[runner.iter] = {
            k: float(v.detach()) for k, v in outputs.items()
        }


def recorded_run(
    config: Mapping,
    resume_from: str | None = None,
    hooks: Sequence[Hook] = (),
) -> tuple[Runner, dict[int, dict[str, float]]]:
    """Train, from the start or from a file, and record every iteration.

    Images are not flipped: resuming restores the order of the data, not the
    state of what augmentation draws.

    Args:
        config: What :func:`run_config` gives.
        resume_from: A checkpoint of an interrupted run.
        hooks: To register besides.

    Returns:
        The runner, and what each iteration logged.
    """
    cfg = Config(copy.deepcopy(dict(config)))
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline = [t for t in dataset.pipeline if t.type != 'RandomFlip']
    cfg.resume = resume_from is not None
    cfg.load_from = resume_from
    runner = Runner.from_cfg(cfg)
    log = _StepLog()
    for hook in (log, *hooks):
        runner.register_hook(hook)
    runner.train()
    return runner, log.steps
