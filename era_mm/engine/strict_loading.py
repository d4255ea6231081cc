"""Checks that a checkpoint is one of the model before it is loaded."""

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import EMAHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from era_mm.core import DistilledStudent
from era_mm.core.fit import find_misfits
from era_mm.engine.work_dir import fault_in
from era_mm.errors import UserError, said_of

ADVICE = (
    'Give the file and the config that belong together; strict_load=False in '
    'the config (--cfg-options strict_load=False) takes what fits and leaves '
    'the rest as it is.'
)
#: Buffers of optimisers that have the shape of their parameter.
LIKE_PARAMETERS = ('momentum_buffer', 'exp_avg', 'exp_avg_sq')


class StrictLoading(Runner):
    """A Runner that refuses checkpoints of another model.

    mmengine's loads what fits and warns of the rest, on resume as well.
    ``strict_load = False`` in the config brings that back.

    Raises:
        UserError: Keys, shapes or kinds of numbers differ, or weights are not
            finite; on resume, too, where a file lacks what a run goes on
            with, or extras of the distillers.
    """

    _file = ''
    _is_resuming = False

    @property
    def _strict(self) -> bool:
        strict = self.cfg.get('strict_load', True)
        if not isinstance(strict, bool):
            raise UserError(
                f'strict_load: expected True or False, but got {strict!r}.'
            )
        return strict

    @property
    def _bare_model(self) -> nn.Module:
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        return model

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """As mmengine's; the file has to be a run's own."""
        self._is_resuming = True
        try:
            with said_of(
                f'--resume: {filename} cannot be gone on from',
                'It is damaged, or not of this run: give another file.',
            ):
                super().resume(filename, *args, **kwargs)
        finally:
            self._is_resuming = False
        if self._strict:
            self._check_optimizers()

    def load_checkpoint(
        self, filename: str, *args: Any, **kwargs: Any
    ) -> dict:
        """As mmengine's; what does not fit is refused."""
        self._file = filename
        keys: dict[str, list[str]] = {}

        def note(module: nn.Module, incompatible: Any) -> None:
            keys['missing in the file'] = [
                key
                for key in incompatible.missing_keys
                if not key.endswith('num_batches_tracked')
            ]
            keys['not in the model'] = list(incompatible.unexpected_keys)

        # Only now are old names of weights translated, as hosts do it.
        handle = self._bare_model.register_load_state_dict_post_hook(note)
        try:
            with said_of(
                f'checkpoint: {filename} cannot be loaded',
                'It is damaged, or not of this model: give another file.',
            ):
                checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        finally:
            handle.remove()
        if self._strict:
            self._refuse(
                f'{title} ({len(names)}): {", ".join(names[:3])}'
                + (', ...' if len(names) > 3 else '')
                for title, names in keys.items()
                if names
            )
            if self._is_resuming:
                self._check_extras()
        return checkpoint

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the hooks; before those of a loaded file, look at it."""
        if fn_name == 'after_load_checkpoint':
            self._check(kwargs['checkpoint'])
        super().call_hook(fn_name, **kwargs)

    def _check(self, checkpoint: Any) -> None:
        if not isinstance(checkpoint, Mapping):
            self._refuse([f'it holds a {type(checkpoint).__name__}'])
        if self._is_resuming and (fault := fault_in(checkpoint)):
            # Not a matter of strictness: there is nothing to go on with.
            raise UserError(
                f'--resume: expected a file that a run goes on from, but '
                f'{self._file} is none: {fault}.'
            )
        if not self._strict:
            return
        weights = checkpoint.get('state_dict', checkpoint)
        if not isinstance(weights, Mapping) or not weights:
            self._refuse(['it holds no weights'])
        own = self._bare_model.state_dict()
        plain = {
            str(key).removeprefix('module.'): value
            for key, value in weights.items()
        }
        self._refuse(find_misfits(own, plain, keys=self._is_resuming))
        if self._is_resuming:
            self._check_rest(checkpoint)

    def _check_rest(self, checkpoint: Mapping) -> None:
        """Look at what a resumed run needs besides weights."""
        for hook in self.hooks:
            if isinstance(hook, EMAHook):
                averages = checkpoint.get('ema_state_dict')
                if not isinstance(averages, Mapping):
                    averages = {}
                    self._refuse(['the averages of EMAHook are missing'])
                self._refuse(
                    f'averages {line}'
                    for line in find_misfits(
                        hook.ema_model.state_dict(), averages
                    )
                )
        schedulers = self.param_schedulers
        if schedulers is None:
            return
        saved = checkpoint.get('param_schedulers')
        if _lengths(saved) != _lengths(schedulers):
            self._refuse(
                [
                    f'its learning rate has {_lengths(saved)} schedules, the '
                    f'config {_lengths(schedulers)}'
                ]
            )

    def _check_extras(self) -> None:
        for module in self._bare_model.modules():
            if isinstance(module, DistilledStudent) and not module.has_extras:
                self._refuse(
                    [
                        'what the distillers have learnt is missing, or that '
                        'of another method'
                    ]
                )

    def _check_optimizers(self) -> None:
        wrappers = self.optim_wrapper
        wrappers = (
            dict(wrappers.items())
            if hasattr(wrappers, 'items')
            else {'': wrappers}
        )
        for wrapper in wrappers.values():
            for parameter, state in wrapper.optimizer.state.items():
                for key in LIKE_PARAMETERS:
                    value = state.get(key)
                    if value is not None and value.shape != parameter.shape:
                        self._refuse(
                            [
                                f'{key} of the optimiser is '
                                f'{tuple(value.shape)}, its parameter '
                                f'{tuple(parameter.shape)}'
                            ]
                        )

    def _refuse(self, problems: Any) -> None:
        lines = [f'  {problem}' for problem in problems]
        if lines:
            role = '--resume' if self._is_resuming else 'checkpoint'
            raise UserError(
                f'{role}: expected the weights of '
                f'{type(self._bare_model).__name__}, but {self._file} does '
                'not fit:\n' + '\n'.join(lines) + f'\n{ADVICE}'
            )


def _lengths(schedulers: Any) -> Any:
    if isinstance(schedulers, Mapping):
        return {name: len(part) for name, part in schedulers.items()}
    return len(schedulers) if isinstance(schedulers, list | tuple) else 0
