"""Stops a run whose losses or weights are not finite, or skips such steps."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from era_mm.core import DistilledStudent
from era_mm.core.fit import first_of, is_finite
from era_mm.errors import UserError
from era_mm.registry import HOOKS

#: Where a run keeps how many steps it has left out.
LEFT_OUT = 'era_mm_left_out'


class _Step(NamedTuple):
    iteration: int
    names: list[str]
    images: list[str]
    values: Tensor


@HOOKS.register_module()
class FiniteHook(Hook):
    """Names the first loss term that is nan or infinite; stops, or skips.

    ``action='stop'``: each step keeps its terms on the device. They are
    checked once in ``interval`` steps, and before a checkpoint is written, so
    that no step waits for the device. Dynamic loss scaling (AMP) skips steps
    whose gradients are not finite; such a run is stopped only if no step of a
    whole interval was finite.

    ``action='skip'``: a step whose gradients are not finite is skipped, as if
    its batch had not been there: weights, the optimisers' states and norm
    statistics stay as they were. The same holds for the step of an inner
    module. With several ranks all skip it or none; with accumulated gradients
    all batches of the step are skipped. Learning-rate schedules go on. Each
    skipped step is logged with its terms and images, and ``max_skipped`` in a
    row stop the run. One number is read between backward pass and step, so
    the step waits for the device once more, in addition to mmengine's own
    reading of the losses. With loss scaling the scaler skips steps itself;
    those whose losses are not finite are counted here. A term that is not
    finite while all gradients are stops the run as with ``'stop'``.

    Either way, no file is written with a weight or buffer that is not finite
    and was before training: a norm's statistics can overflow while the norm's
    output, and so each loss, stays finite.

    ``train`` adds the hook to every run; ``check_finite = False`` in the
    config turns it off, ``check_finite = dict(action='skip')`` sets its
    arguments.

    Source: ours.

    Args:
        interval: Steps between two checks.
        action: ``'stop'`` or ``'skip'``.
        max_skipped: Steps in a row that may be skipped; the last of them
            stops the run.

    Raises:
        UserError: A term is not finite; the message has the term, its
            iteration, the images of that batch and the other terms. Or too
            many steps in a row were skipped. Or weights to save are not
            finite.
    """

    RANGES = {'max_skipped': (1, math.inf)}
    # Before mmengine's hook, which would save such weights.
    priority = 'VERY_HIGH'

    def __init__(
        self,
        interval: int = 10,
        action: Literal['stop', 'skip'] = 'stop',
        max_skipped: int = 10,
    ) -> None:
        self.interval = interval
        self.action = action
        self.max_skipped = max_skipped
        self._steps: deque[_Step] = deque()
        # Batches since the last step of the optimiser.
        self._gathered: list[_Step] = []
        self._handles: list[Any] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._stepped = False
        self._is_left_out = False
        self._in_a_row = 0
        self._never_finite: set[str] = set()

    def before_train(self, runner: Runner) -> None:
        """Stand between gradients and optimisers, if steps are skipped."""
        # Some hosts keep infinity in a buffer on purpose.
        self._never_finite = {
            name.removeprefix('module.')
            for name, buffer in runner.model.named_buffers()
            if not is_finite(buffer)
        }
        if self.action == 'skip':
            for optimizer in _optimizers_of(runner):
                handle = optimizer.register_step_pre_hook(self._guard)
                self._handles.append(handle)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Keep the norm statistics as they are before a step."""
        if self.action == 'skip' and _is_updating(runner):
            self._buffers = [
                (buffer, buffer.detach().clone())
                for buffer in _buffers_of(runner.model)
            ]

    def _guard(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Take the gradients away from an optimiser if any is not finite."""
        self._stepped = True
        parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group['params']
            if parameter.grad is not None and parameter.grad.numel()
        ]
        if not parameters:
            return
        largest = torch.stack(
            [
                torch.linalg.vector_norm(p.grad.detach(), torch.inf).float()
                for p in parameters
            ]
        )
        bad = (~largest.isfinite().all()).float()
        # Gradients that are shards differ from rank to rank.
        all_reduce(bad, 'max')
        if bad.item():
            self._is_left_out = True
            for parameter in parameters:
                # Optimisers pass such a parameter over, momentum, decay and
                # the count of its steps included.
                parameter.grad = None

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
            self._gathered.append(
                _Step(runner.iter, list(terms), _images_in(data_batch), values)
            )
        if self.action == 'stop':
            self._take_gathered()
        elif _is_updating(runner):
            self._leave_out_or_take(runner)
        if len(self._steps) >= self.interval:
            self._look(runner)

    def _take_gathered(self) -> None:
        self._steps.extend(self._gathered)
        self._gathered.clear()

    def _leave_out_or_take(self, runner: Runner) -> None:
        # A scaler that finds no finite gradients calls no optimiser.
        by_scaler = not self._stepped and any(
            bool(step.values.isfinite().all().logical_not())
            for step in self._gathered
            if _scales(runner)
        )
        is_left_out = self._is_left_out or by_scaler
        self._stepped = self._is_left_out = False
        if not is_left_out:
            self._in_a_row = 0
            self._take_gathered()
            return
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        self._in_a_row += 1
        total = int(runner.message_hub.get_info(LEFT_OUT, 0)) + 1
        runner.message_hub.update_info(LEFT_OUT, total)
        bad = _not_finite(self._gathered)
        self._gathered.clear()
        said = (
            _describe(*bad[0])
            if bad
            else (
                f'in iteration {runner.iter + 1} gradients are not finite, '
                "though this rank's losses are"
            )
        )
        if self._in_a_row >= self.max_skipped:
            raise UserError(
                f'{self._in_a_row} steps in a row were left out, as many as '
                f'check_finite.max_skipped allows; in the last one, {said}'
                + ADVICE
            )
        runner.logger.warning(f'A step is left out ({total} so far): {said}')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check, so that no file has weights that are not finite.

        Only the main rank comes here; its error ends the run of all.
        """
        self._look(runner)
        names = [
            name
            for name, value in checkpoint.get('state_dict', {}).items()
            if name not in self._never_finite and not is_finite(value)
        ]
        if names:
            raise UserError(
                f'after iteration {runner.iter} weights are not finite, '
                f'though the losses were ({len(names)}): {first_of(names)}. '
                f'No checkpoint is written.{ADVICE}'
            )

    def after_train(self, runner: Runner) -> None:
        """Check the last steps, and say how many were skipped."""
        while self._handles:
            self._handles.pop().remove()
        self._take_gathered()
        self._look(runner)
        if self.action == 'stop':
            return
        total = runner.message_hub.get_info(LEFT_OUT, 0)
        if total:
            runner.logger.warning(
                f'{total} of {runner.iter} steps were left out, because their '
                'gradients were not finite.'
            )

    def _look(self, runner: Runner) -> None:
        steps = list(self._steps)
        self._steps.clear()
        bad = _not_finite(steps)
        allowed = max(len(steps), self.interval) if _scales(runner) else 1
        if not bad or len(bad) < allowed:
            return
        raise UserError(
            f'the loss is no longer finite: {_describe(*bad[0])}{ADVICE}'
        )


ADVICE = (
    '\nWhat to do: look at these images and their annotations, lower the '
    'learning rate or the weight of that term, or clip gradients; then go on '
    'with --resume from the last checkpoint, which was written before. '
    "check_finite=dict(action='skip') leaves such steps out, "
    'check_finite=False turns this off.'
)


def _not_finite(steps: Sequence[_Step]) -> list[tuple[_Step, dict]]:
    """The steps with a term that is not finite, and their terms."""
    if not steps:
        return []
    # One copy from the device for all of them.
    table = torch.cat([step.values for step in steps]).tolist()
    bad = []
    for step in steps:
        row, table = table[: len(step.names)], table[len(step.names) :]
        if not all(map(math.isfinite, row)):
            bad.append((step, dict(zip(step.names, row, strict=True))))
    return bad


def _describe(step: _Step, values: Mapping[str, float]) -> str:
    wrong = [name for name, v in values.items() if not math.isfinite(v)]
    # The total says nothing if one of its terms is wrong.
    named = [name for name in wrong if name != 'loss'] or wrong
    beside = {k: v for k, v in values.items() if k not in wrong}
    return (
        f'in iteration {step.iteration + 1} '
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
        + '\n'.join(f'  {image}' for image in step.images or ['not known'])
    )


def _wrappers_of(runner: Runner) -> list[Any]:
    wrapper = runner.optim_wrapper
    return list(wrapper.values()) if hasattr(wrapper, 'values') else [wrapper]


def _optimizers_of(runner: Runner) -> Iterator[Any]:
    """The run's optimisers, those of inner modules included."""
    for wrapper in _wrappers_of(runner):
        yield wrapper.optimizer
    for module in runner.model.modules():
        if isinstance(module, DistilledStudent):
            for distiller in module.distillers.values():
                inner = distiller.inner_optimizer
                # SoKD has several in one.
                several = getattr(inner, 'optimizers', {'': inner})
                yield from (one for one in several.values() if one)


def _buffers_of(model: Any) -> Iterator[Tensor]:
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, DistilledStudent):
            for inner in module.inner_modules():
                yield from inner.buffers()


def _scales(runner: Runner) -> bool:
    return any(hasattr(w, 'loss_scaler') for w in _wrappers_of(runner))


def _is_updating(runner: Runner) -> bool:
    """Whether no gradients are being gathered."""
    return all(
        wrapper.should_update()
        for wrapper in _wrappers_of(runner)
        if hasattr(wrapper, 'should_update')
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
