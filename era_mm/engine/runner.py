"""mmengine's Runner: safe files, resuming, errors that name their key."""

import copy
import difflib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, get_rank, master_only
from mmengine.registry import OPTIMIZERS
from mmengine.runner.base_loop import BaseLoop

from era_mm.core.student_model import start_of_run
from era_mm.core.utils import preserve_rng
from era_mm.engine.class_rule import leave_other_heads, load_for_modes
from era_mm.engine.image_files import name_image_files
from era_mm.engine.loops import ResumableEpochLoop, validates_now
from era_mm.engine.strict_loading import StrictLoading
from era_mm.engine.whole_files import write_or_tell
from era_mm.engine.work_dir import find_to_resume
from era_mm.errors import UserError, said_of

#: Key of a checkpoint's meta data: iterations per epoch.
ITERS_PER_EPOCH = 'era_mm_iters_per_epoch'


class ToldRunner(StrictLoading):
    """Says which part of the config an error is about.

    Errors of Python, torch or a host while mmengine's Runner builds something
    do not name the part of the config; here the message begins with its key.
    Images that cannot be read are named.
    """

    def build_model(self, model: Any) -> Any:
        """As mmengine's."""
        with _built_from('model'):
            return super().build_model(model)

    def build_dataloader(  # type: ignore[override]
        self, dataloader: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As mmengine's; an error names the image that cannot be read."""
        keys = (f'{part}_dataloader' for part in ('train', 'val', 'test'))
        own = (key for key in keys if self.cfg.get(key) == dataloader)
        with _built_from(next(own, 'the dataloader')):
            built = super().build_dataloader(dataloader, *args, **kwargs)
        name_image_files(built.dataset)
        return built

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """As mmengine's; an unknown optimiser is named."""
        with _built_from('optim_wrapper'):
            _check_optimizer(optim_wrapper)
            return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """As mmengine's."""
        with _built_from('param_scheduler'):
            return super().build_param_scheduler(scheduler)

    def build_train_loop(self, loop: Any) -> BaseLoop:
        """As mmengine's."""
        with _built_from('train_cfg'):
            return super().build_train_loop(loop)

    def build_val_loop(self, loop: Any) -> BaseLoop:
        """As mmengine's."""
        with _built_from('val_cfg'):
            return super().build_val_loop(loop)

    def build_evaluator(self, evaluator: Any) -> Any:
        """As mmengine's."""
        with _built_from('val_evaluator or test_evaluator'):
            return super().build_evaluator(evaluator)

    def register_hook(self, hook: Any, *args: Any, **kwargs: Any) -> None:
        """As mmengine's."""
        name = hook.get('type') if isinstance(hook, dict) else hook
        with _built_from(f'default_hooks or custom_hooks, {name}'):
            super().register_hook(hook, *args, **kwargs)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the hooks; some of them give a dataset another pipeline."""
        super().call_hook(fn_name, **kwargs)
        if fn_name == 'before_train_epoch':
            name_image_files(self.train_dataloader.dataset)


def _check_optimizer(optim_wrapper: Any) -> None:
    optimizer = isinstance(optim_wrapper, dict) and optim_wrapper.get(
        'optimizer'
    )
    kind = optimizer.get('type') if isinstance(optimizer, dict) else None
    if not isinstance(kind, str) or OPTIMIZERS.get(kind) is not None:
        return
    near = difflib.get_close_matches(kind, OPTIMIZERS.module_dict, n=1)
    raise UserError(
        f'optim_wrapper.optimizer.type: no optimiser is called {kind!r}'
        + (f'. Did you mean {near[0]!r}?' if near else '.')
    )


def _built_from(key: str) -> AbstractContextManager[None]:
    return said_of(key, f'Correct {key} in the config.')


class TestingRunner(ToldRunner):
    """Refuses to test a checkpoint of another model."""

    # pytest would take it for a test.
    __test__ = False

    def load_or_resume(self) -> None:
        """As mmengine's; no mode goes through a head of other classes."""
        # Without modes no teacher's file is needed.
        load_for_modes(self)
        leave_other_heads(self, self.test_dataloader.dataset)
        super().load_or_resume()


class TrainingRunner(ToldRunner):
    """Trains so that a kill leaves only complete files in the work dir.

    - The config is written into the work dir when training begins. mmengine
      writes it when the runner is built; a run that then stops, because a
      file or a teacher is wrong, would have overwritten the config of the run
      whose checkpoints are there.
    - mmengine's CheckpointHook is replaced with
      :class:`~era_mm.engine.checkpoint_hook.WholeCheckpointHook`.
    - ``resume`` takes the newest complete checkpoint, can continue inside an
      epoch, and validates first if the file was written before a validation.
    """

    _iters_per_epoch: int | None = None

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """As mmengine's, with ``WholeCheckpointHook``."""
        hooks = copy.copy(hooks) if hooks else {}
        hook = hooks.get('checkpoint', dict(type='CheckpointHook', interval=1))
        if isinstance(hook, dict) and hook.get('type') in (
            'CheckpointHook',
            'mmengine.CheckpointHook',
        ):
            hooks['checkpoint'] = {
                **hook,
                'type': 'era_mm.WholeCheckpointHook',
            }
        super().register_default_hooks(hooks)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """As mmengine's, with epochs that can be resumed."""
        if isinstance(loop, dict) and (
            loop.get('by_epoch')
            if 'type' not in loop
            else loop['type'] == 'EpochBasedTrainLoop'
        ):
            arguments = {
                key: value
                for key, value in loop.items()
                if key not in ('type', 'by_epoch')
            }
            with _built_from('train_cfg'):
                return ResumableEpochLoop(
                    **arguments, runner=self, dataloader=self._train_dataloader
                )
        return super().build_train_loop(loop)

    def load_or_resume(self) -> None:
        """Load or resume; rank 0 decides from which file."""
        auto = self._resume and self._load_from is None  # type: ignore
        if auto and not self._has_loaded:
            self._load_from = self._find_newest()
        # The teachers' files have been read by now.
        leave_other_heads(self, self.train_dataloader.dataset)
        super().load_or_resume()

    def load_checkpoint(
        self, filename: str, *args: Any, **kwargs: Any
    ) -> dict:
        """As mmengine's; without --resume a new run starts from the file."""
        if self._is_resuming:
            return super().load_checkpoint(filename, *args, **kwargs)
        with start_of_run():
            return super().load_checkpoint(filename, *args, **kwargs)

    def _find_newest(self) -> str | None:
        found: list[Any] = [None, [], '']
        if get_rank() == 0:
            try:
                found[:2] = find_to_resume(self.cfg)
            except UserError as error:
                found[2] = str(error)
        broadcast_object_list(found)
        newest, skipped, fault = found
        if fault:
            raise UserError(fault)
        for line in skipped:
            self.logger.warning(f'--resume skips {line}')
        return newest

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """As mmengine's; find out how much of an epoch is done."""
        super().resume(filename, *args, **kwargs)
        loop = self.train_loop
        if not isinstance(loop, ResumableEpochLoop):
            return
        length = len(loop.dataloader)
        former = self._iters_per_epoch or length
        done = loop.iter - loop.epoch * former
        if done and former != length:
            raise UserError(
                f'--resume: {filename} was written in epoch {loop.epoch + 1}, '
                f'after {done} of {former} iterations, but now an epoch has '
                f'{length}. Set the batch size, the number of ranks and the '
                'data as they were, or resume from the end of an epoch.'
            )
        if self._iters_per_epoch or 0 < done <= length:
            loop.num_done = done

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the hooks; store, write and validate at the right moments."""
        if fn_name == 'before_save_checkpoint':
            loader = self.train_loop.dataloader
            if isinstance(self.train_loop, ResumableEpochLoop):
                kwargs['checkpoint']['meta'][ITERS_PER_EPOCH] = len(loader)
        if fn_name == 'after_load_checkpoint':
            meta = kwargs['checkpoint'].get('meta') or {}
            self._iters_per_epoch = meta.get(ITERS_PER_EPOCH)
        super().call_hook(fn_name, **kwargs)
        if fn_name == 'before_train':
            self._write_config()
            if (
                self._resume
                and self.val_loop is not None
                and validates_now(self.train_loop)
            ):
                self.logger.info(
                    'The checkpoint was written before the validation of '
                    'its epoch or iteration; validating now.'
                )
                # It must not change the random state of the training.
                with preserve_rng():
                    self.val_loop.run()

    def dump_config(self) -> None:
        """Do nothing: the config is written when training begins."""

    @master_only
    def _write_config(self) -> None:
        name = self.cfg.filename
        name = Path(name).name if name else f'{self.timestamp}.py'
        write_or_tell(Path(self.work_dir, name), self.cfg.pretty_text.encode())
