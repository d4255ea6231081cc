"""EMA of the extras as well as the student, for modes such as T."""

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import EMAHook as HostEMAHook
from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS
from torch import nn

from ..core import Distillation, extras_of
from ..core.checkpoint import METADATA_KEY
from ..core.fit import find_misfits
from ..layers import with_present_names
from ..registry import HOOKS


@HOOKS.register_module()
class EMAHook(HostEMAHook):
    """mmengine's ``EMAHook``, for the distillers' extras as well.

    mmengine's averages only the student: modes such as T use the averaged
    student with extras that are not averaged. This hook averages the
    parameters of the extras in the same way, evaluates with both averages,
    and writes both to the checkpoint. The extras without averaging, from
    which a resumed run continues, are in ``ema_state_dict``.

    Buffers of the extras (norm statistics) are never averaged, not even with
    ``update_buffers``: some are counters, or statistics of a fixed part of
    the run. Inner modules, which have their own optimiser, are not averaged.

    Source: that MBRNet and align are averaged is ERA's [official code]; the
    files are [ours].

    Args:
        kwargs: As in mmengine's ``EMAHook``.

    Raises:
        TypeError: The model is not a ``Distillation``.
    """

    def before_run(self, runner: Any) -> None:
        """Copy the extras."""
        model = runner.model
        if is_model_wrapper(model):
            model = model.module
        if not isinstance(model, Distillation):
            raise TypeError(
                '`era_mm.EMAHook` averages the extras of a Distillation, but '
                f'the model is a {type(model).__name__}. Use EMAHook.'
            )
        super().before_run(runner)
        self.ema_extras = MODELS.build(
            dict(self.ema_cfg, update_buffers=False),
            default_args=dict(model=model.distillers),
        )

    def _put(self, extras: Mapping[str, Any] | None) -> None:
        """Load the extras of a file, as far as present, as averages."""
        for name, distiller in self._averages.items():
            entry = (extras or {}).get(name)
            if entry is None or entry['type'] != type(distiller).__name__:
                continue
            # The model refuses those that do not fit, or leaves them out.
            state = with_present_names(distiller, entry['state_dict'])
            if not find_misfits(distiller.state_dict(), state):
                distiller.load_state_dict(state)

    @property
    def _averages(self) -> nn.ModuleDict:
        return self.ema_extras.module

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Update the averages."""
        super().after_train_iter(runner, *args, **kwargs)
        own = self.src_model.distillers
        if self._ema_started(runner):
            self.ema_extras.update_parameters(own)
        else:
            self._averages.load_state_dict(own.state_dict())

    def _swap_ema_parameters(self) -> None:
        super()._swap_ema_parameters()
        pairs = zip(
            self._averages.parameters(),
            self.src_model.distillers.parameters(),
            strict=True,
        )
        for average, own in pairs:
            kept = average.data.clone()
            average.data.copy_(own.data)
            own.data.copy_(kept)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Write averaged extras with the averaged student."""
        super().before_save_checkpoint(runner, checkpoint)
        # The metadata of `ema_state_dict` has the extras without averaging:
        # its model shares them.
        extras = extras_of(checkpoint['state_dict']) or {}
        for name, distiller in self._averages.items():
            extras[name]['state_dict'] = dict(distiller.state_dict())

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Load the averages; a resumed run trains on the extras themselves."""
        super().after_load_checkpoint(runner, checkpoint)
        state = checkpoint['state_dict']
        extras = extras_of(state)
        self._put(extras)
        if 'ema_state_dict' not in checkpoint or not runner._resume:
            return
        self.ema_extras.steps.copy_(self.ema_model.steps)
        metadata = getattr(checkpoint['ema_state_dict'], '_metadata', {})
        trained = metadata.get('module', {}).get(METADATA_KEY)
        if extras is not None and trained is not None:
            state._metadata[''][METADATA_KEY] = trained
