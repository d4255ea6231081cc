"""Stops a run whose losses are not finite."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from era_mm.errors import UserError
from era_mm.registry import HOOKS


@HOOKS.register_module()
class FiniteHook(Hook):
    """Names the first loss term that is nan or infinite, and stops the run.

    Each step keeps its terms on the device. They are checked once in
    ``interval`` steps, and before a checkpoint is written, so that no step
    waits for the device. Dynamic loss scaling (AMP) skips steps whose
    gradients are not finite; such a run is stopped only if no step of a whole
    interval was finite.

    ``train`` adds it to every run; ``check_finite = False`` in the config
    turns it off, ``check_finite = dict(interval=...)`` sets its arguments.

    Source: ours.

    Args:
        interval: Steps between two checks.

    Raises:
        UserError: A term is not finite. The message has the term, its
            iteration, the images of that batch and the other terms.
    """

    # Before mmengine's hook, which would save such weights.
    priority = 'VERY_HIGH'

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self._steps: deque[tuple[int, list[str], list[str], Tensor]] = deque()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the losses, and check them once per interval."""
        terms = {
            name: value.detach().mean()
            for name, value in (outputs or {}).items()
            if 'loss' in name
            and isinstance(value, Tensor)
            and value.is_floating_point()
        }
        if terms:
            first = next(iter(terms.values()))
            values = torch.stack(
                [
                    value.to(first.device, torch.float32)
                    for value in terms.values()
                ]
            )
            self._steps.append(
                (runner.iter, list(terms), _images_in(data_batch), values)
            )
        if len(self._steps) >= self.interval:
            self._look(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check, so that no file has weights that are not finite."""
        self._look(runner)

    def after_train(self, runner: Runner) -> None:
        """Check the last steps."""
        self._look(runner)

    def _look(self, runner: Runner) -> None:
        steps = list(self._steps)
        self._steps.clear()
        if not steps:
            return
        # One copy from the device for all of them.
        table = torch.cat([values for *_, values in steps]).tolist()
        bad = []
        for iteration, names, images, _ in steps:
            row, table = table[: len(names)], table[len(names) :]
            values = dict(zip(names, row, strict=True))
            wrong = [
                name
                for name, value in values.items()
                if value != value or abs(value) == float('inf')
            ]
            if wrong:
                bad.append((iteration, wrong, images, values))
        scales = hasattr(runner.optim_wrapper, 'loss_scaler')
        if not bad or (scales and len(bad) < max(len(steps), self.interval)):
            return
        iteration, wrong, images, values = bad[0]
        # The total says nothing if one of its terms is wrong.
        named = [name for name in wrong if name != 'loss'] or wrong
        beside = {k: v for k, v in values.items() if k not in wrong}
        raise UserError(
            f'the loss is no longer finite: in iteration {iteration + 1} '
            + ', '.join(f'{name} is {values[name]}' for name in named[:4])
            + (', ...' if len(named) > 4 else '')
            + (
                ' (other terms: '
                + ', '.join(f'{k} {v:.4g}' for k, v in beside.items())
                + ')'
                if beside
                else ''
            )
            + '. Images of that batch:\n'
            + '\n'.join(f'  {image}' for image in images or ['not known'])
            + '\nWhat to do: look at these images and their annotations, '
            'lower the learning rate or the weight of that term, or clip '
            'gradients; then go on with --resume from the last checkpoint, '
            'which was written before. check_finite=False turns this off.'
        )


def _images_in(data_batch: Any) -> list[str]:
    samples = (
        data_batch.get('data_samples', [])
        if isinstance(data_batch, Mapping)
        else []
    )
    if not isinstance(samples, Sequence):
        return []
    return [
        str(sample.get('img_path') or sample.get('img_id', 'not known'))
        for sample in samples
        if hasattr(sample, 'get')
    ]


def add_finite_check(runner: Runner) -> None:
    """Register the hook, as set by ``check_finite`` in the config."""
    options = runner.cfg.get('check_finite', True)
    has_one = any(isinstance(hook, FiniteHook) for hook in runner.hooks)
    if options is not False and not has_one:
        arguments = dict(options) if isinstance(options, Mapping) else {}
        runner.register_hook(FiniteHook(**arguments))
