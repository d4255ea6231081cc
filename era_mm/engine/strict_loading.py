"""Checks that a checkpoint fits the model before it is loaded."""

import shlex
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import EMAHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from era_mm.core import DistilledStudent
from era_mm.core.checkpoint import METADATA_KEY, other_shapes
from era_mm.core.fit import (
    OTHER_KINDS,
    find_misfits,
    first_of,
    lines_of,
    misfits_by_kind,
    names_not_finite,
)
from era_mm.engine.work_dir import fault_in
from era_mm.errors import UserError, said_of

ADVICE = (
    'Give a file and a config that belong together; strict_load=False in '
    'the config (--cfg-options strict_load=False) loads what fits and leaves '
    'the rest as it is.'
)
#: Buffers of optimisers that have the shape of their parameter.
LIKE_PARAMETERS = ('momentum_buffer', 'exp_avg', 'exp_avg_sq')


class StrictLoading(Runner):
    """A Runner that refuses checkpoints of another model.

    mmengine loads what fits and warns of the rest, on resume as well.
    ``strict_load = False`` in the config restores this. As for a teacher, the
    host may rename and resize what it loads. Tensors beside the model's parts,
    such as averaged copies, are named in the log. On resume the file must be
    exactly of this model.

    Raises:
        UserError: Keys, shapes or kinds of numbers differ, or weights are not
            finite; on resume also if the file does not have the state of a
            run, or not the extras of its distillers.
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
        """As mmengine's; a file of another run is refused."""
        self._is_resuming = True
        try:
            with said_of(
                f'--resume: {filename} cannot be resumed from',
                'It is damaged, or not of this run: give another file.',
            ):
                self._load_resumed(filename, *args, **kwargs)
        finally:
            self._is_resuming = False
        if self._strict:
            self._check_optimizers()

    def _load_resumed(self, filename: str, *args: Any, **kwargs: Any) -> None:
        try:
            super().resume(filename, *args, **kwargs)
        except ValueError as error:
            # From torch's optimisers, which load last.
            if 'parameter group' not in str(error):
                raise
            raise UserError(
                f'--resume: {filename} cannot be resumed from: its optimiser '
                f'has other parameters than this run trains ({error}). '
                + self._start_from(filename)
            ) from error

    def load_checkpoint(
        self, filename: str, *args: Any, **kwargs: Any
    ) -> dict:
        """As mmengine's; what does not fit is refused."""
        self._file = filename
        model = self._bare_model
        infinite = names_not_finite(model.state_dict())
        missing: list[str] = []
        surplus: list[str] = []
        errors: list[str] = []

        def note(module: nn.Module, incompatible: Any) -> None:
            missing[:] = [
                key
                for key in incompatible.missing_keys
                if not key.endswith('num_batches_tracked')
            ]
            surplus[:] = incompatible.unexpected_keys

        def begin(*arguments: Any) -> None:
            nonlocal errors
            errors = arguments[-1]

        # The hosts translate old names of weights only while they load, and
        # mmengine logs what does not fit, and raises nothing. The list of
        # torch's messages is only given to hooks before loading, whose
        # public form torch has from 2.5 on.
        handles = [
            model.register_load_state_dict_post_hook(note),
            model._register_load_state_dict_pre_hook(begin),
        ]
        try:
            with said_of(
                f'checkpoint: {filename} cannot be loaded',
                'It is damaged, or not of this model: give another file.',
            ):
                checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if not self._strict:
            return checkpoint
        ways = {
            'missing in the file': missing,
            'other shapes': other_shapes(errors),
            # Under their present names: the file may have older ones.
            'not finite': sorted(
                names_not_finite(model.state_dict()) - infinite
            ),
        }
        # An unused tensor of a part that the model has is of a deeper model,
        # or the one that is missing; others are beside it, such as averages.
        parts = dict(model.named_children())
        of_parts = [key for key in surplus if key.split('.')[0] in parts]
        misfits = any(ways.values()) or of_parts
        self._refuse(
            lines_of(ways | {'not in the model': surplus if misfits else []})
        )
        if surplus:
            self.logger.warning(
                f'{filename} has {len(surplus)} tensors that '
                f'{type(model).__name__} does not use: {first_of(surplus)}.'
            )
        return checkpoint

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the hooks; check a loaded file before its hooks run."""
        if fn_name == 'after_load_checkpoint':
            self._check(kwargs['checkpoint'])
        super().call_hook(fn_name, **kwargs)

    def _check(self, checkpoint: Any) -> None:
        if not isinstance(checkpoint, Mapping):
            self._refuse([f'it holds a {type(checkpoint).__name__}'])
        if self._is_resuming and (fault := fault_in(checkpoint)):
            # Whatever `strict_load` is: there is no state to resume.
            raise UserError(
                f'--resume: expected a file that a run can resume from, but '
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
        if self._is_resuming:
            self._refuse(find_misfits(own, plain))
            self._check_distillers(weights)
            self._check_rest(checkpoint)
        else:
            # What is loaded takes the kind of the model's.
            kinds = misfits_by_kind(own, plain)[OTHER_KINDS]
            self._refuse(lines_of({OTHER_KINDS: kinds}))

    def _check_rest(self, checkpoint: Mapping) -> None:
        """Check what a resumed run needs besides weights."""
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

    def _check_distillers(self, weights: Mapping) -> None:
        """Refuse a file of a run that had other distillers, or none."""
        metadata = getattr(weights, '_metadata', None) or {}
        saved = {
            f'{name}.{key}'.lstrip('.'): entry['type']
            for name, parts in metadata.items()
            for key, entry in (parts.get(METADATA_KEY) or {}).items()
        }
        own = {
            f'{name}.{key}'.lstrip('.'): type(distiller).__name__
            for name, module in self._bare_model.named_modules()
            if isinstance(module, DistilledStudent)
            for key, distiller in module.distillers.items()
        }
        if saved == own:
            return
        if not saved:
            kind = "a plain run, without the distillers' weights"
        elif not own:
            kind = 'a distillation, and the config is of a plain run'
        else:
            kind = (
                f'a run of other distillers: it has weights of '
                f'{_listed(saved)}, and the config has {_listed(own)}'
            )
        raise UserError(
            f'--resume: {self._file} is of {kind}. So this run cannot resume '
            f'from it. {self._start_from(self._file)}'
        )

    def _start_from(self, file: str) -> str:
        """How a new run starts from the student in a file."""
        start = (
            'To start a new run from the weights of its student, leave '
            '--resume out and '
        )
        if set(file) & set(' ,()[]"\''):
            # mmengine would split a list at these, and remove blanks.
            return f'{start}write into the config: load_from = {file!r}'
        command = shlex.join(
            [
                *('python', '-m', 'era_mm', 'train'),
                self.cfg.filename or 'CONFIG',
                *('--work-dir', f'{self.work_dir}_new'),
                *('--cfg-options', f'load_from={file}'),
            ]
        )
        return f'{start}load them:\n  {command}'

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


def _listed(distillers: Mapping[str, str]) -> str:
    return ', '.join(f'{key!r} ({kind})' for key, kind in distillers.items())


def _lengths(schedulers: Any) -> Any:
    if isinstance(schedulers, Mapping):
        return {name: len(part) for name, part in schedulers.items()}
    return len(schedulers) if isinstance(schedulers, list | tuple) else 0
