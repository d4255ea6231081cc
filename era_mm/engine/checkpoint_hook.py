"""mmengine's CheckpointHook, in an order that is safe against kills."""

import hashlib
import os
import pickle
from collections.abc import Collection, Mapping, Sized
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process, master_only
from mmengine.hooks import CheckpointHook
from mmengine.runner import CheckpointLoader, Runner, save_checkpoint

from era_mm.core.checkpoint import drop_extras
from era_mm.engine.whole_files import parts_in, write_or_tell
from era_mm.errors import UserError
from era_mm.registry import HOOKS


class _RemovesLater:
    """A file backend that delays the removal of files."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._outdated: list[tuple[Any, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._outdated.append((self._backend.remove, path))

    def rmtree(self, path: str) -> None:
        self._outdated.append((self._backend.rmtree, path))

    def remove_now(self, wanted: Collection[str | None]) -> None:
        """Remove them now, except for files that are wanted."""
        while self._outdated:
            remove, path = self._outdated.pop(0)
            if path not in wanted and self._backend.exists(path):
                remove(path)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """Writes the new file, then what points to it, then removes the old one.

    mmengine's hook removes the old file before it writes the new one, and
    writes ``last_checkpoint`` in place. With ``max_keep_ckpts=1`` a kill
    between the two loses all checkpoints; a kill while ``best_*.pth`` is
    written leaves no best one. ``train`` replaces mmengine's hook in a config
    with this one. It writes the same files under the same names, with one
    exception: files made by ``published_keys`` are the plain student, without
    the distillers' extras.

    Source: ours.

    Args: As of ``mmengine.hooks.CheckpointHook``.

    Raises:
        UserError: The validation gives no metric of the name ``save_best``.
            If it gives none of its group (``coco/``) either, as where nothing
            was found, that is logged instead.
    """

    def before_train(self, runner: Runner) -> None:
        """Clean up after a former run, and find its best file.

        Removes files whose writing was interrupted. Looks for the best file
        next to the checkpoints, because the work dir may have been moved or
        copied, and a copy must not touch the original's file. Warns if
        checkpoints will be written between two updates of the weights.
        """
        super().before_train(runner)
        lost = lost_gradients(self, runner)
        if lost:
            runner.logger.warning(lost)
        backend: Any = self.file_backend  # type: ignore[has-type]
        self.file_backend = _RemovesLater(backend)
        if '://' in str(self.out_dir):
            return
        if is_main_process() and Path(self.out_dir).is_dir():
            for part in parts_in(self.out_dir):
                part.unlink(missing_ok=True)
        if not self.save_best:
            return
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = self._beside(
                self.best_ckpt_path  # type: ignore[has-type]
            )
        else:
            paths = self.best_ckpt_path_dict
            for key in paths:
                paths[key] = self._beside(paths[key])

    def _beside(self, path: str | None) -> str | None:
        return path and str(Path(self.out_dir, Path(path).name))

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict
    ) -> None:
        if self.max_keep_ckpts > 0:
            kept = self.keep_ckpt_ids
            if step not in list(kept)[-1:]:
                if len(kept) == self.max_keep_ckpts:
                    old = self.filename_tmpl.format(kept.popleft())
                    if is_main_process():
                        path = self.file_backend.join_path(self.out_dir, old)
                        if self.file_backend.isdir(path):
                            self.file_backend.rmtree(path)
                        else:
                            self.file_backend.remove(path)
                kept.append(step)
                runner.message_hub.update_info('keep_ckpt_ids', list(kept))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            pointer = Path(runner.work_dir, 'last_checkpoint')
            write_or_tell(pointer, self.last_ckpt.encode())
            self._remove_outdated()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        for key in self.key_indicators if self.save_best else ():
            if key == 'auto' or key in metrics:
                continue
            said = (
                f'default_hooks.checkpoint.save_best: expected a metric of '
                f'the validation, but {key!r} is none; it gave '
                f'{", ".join(metrics)}.'
            )
            if any(_group_of(other) == _group_of(key) for other in metrics):
                raise UserError(
                    f'{said} Correct the name, then go on with --resume: '
                    f'{self.last_ckpt} is whole.'
                )
            # COCO's metric gives none for a model or mode that finds nothing.
            runner.logger.warning(f'{said} No best file is written this time.')
            return
        super()._save_best_checkpoint(runner, metrics)
        if is_main_process():
            self._remove_outdated()

    @master_only
    def _publish_model(self, runner: Runner, ckpt_path: str) -> None:
        checkpoint = CheckpointLoader.load_checkpoint(ckpt_path, 'cpu')
        kept = {
            key: value
            for key, value in checkpoint.items()
            if key in self.published_keys
        }
        for value in kept.values():
            if isinstance(value, Mapping):
                drop_extras(value)
        digest = hashlib.sha256(pickle.dumps(kept)).hexdigest()
        path = f'{os.path.splitext(ckpt_path)[0]}-{digest[:8]}.pth'
        save_checkpoint(kept, path, backend_args=self.backend_args)
        runner.logger.info(
            f'The checkpoint ({ckpt_path}) is published to {path}, with '
            f'{", ".join(kept)} only, without the distillers.'
        )

    def _remove_outdated(self) -> None:
        best = (
            getattr(self, 'best_ckpt_path', None),
            *getattr(self, 'best_ckpt_path_dict', {}).values(),
        )
        self.file_backend.remove_now((self.last_ckpt, *best))


def _group_of(metric: str) -> str:
    return metric.rpartition('/')[0]


def lost_gradients(hook: CheckpointHook, runner: Runner) -> str:
    """A warning if checkpoints are written between two updates.

    Args:
        hook: The hook that writes them.
        runner: The runner that trains.

    Returns:
        The warning; '' if every checkpoint follows directly on an update.
    """
    wrapper = runner.cfg.get('optim_wrapper') or {}
    counts = wrapper.get('accumulative_counts', 1)
    loader = getattr(runner.train_loop, 'dataloader', None)
    if not isinstance(counts, int) or counts < 2 or hook.interval < 1:
        return ''
    interval = hook.interval
    if hook.by_epoch:
        if not isinstance(loader, Sized):
            return ''
        interval *= len(loader)
    if interval % counts == 0:
        return ''
    return (
        f'A checkpoint is written every {interval} iterations, but the '
        f'weights are updated every {counts} '
        '(optim_wrapper.accumulative_counts). Gradients accumulated since the '
        'last update are not in the file: a run that resumes from it loses '
        'them, and differs from one that was not interrupted. To avoid this, '
        'set default_hooks.checkpoint.interval to a multiple of '
        f'{counts} iterations (by_epoch=False).'
    )
