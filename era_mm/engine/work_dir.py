"""The work dir: checkpoints to resume from, and a lock against other runs."""

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from era_mm.core.safe_files import load_file
from era_mm.errors import UserError

#: Names under which mmengine's CheckpointHook writes.
TEMPLATES = ('epoch_{}.pth', 'iter_{}.pth')
LOCK = '.era_mm.lock'


def checkpoints_in(
    folder: str | Path, templates: Collection[str] = TEMPLATES
) -> list[list[Path]]:
    """A run's checkpoints by template, the highest number first."""
    found = []
    for template in templates:
        start, _, end = template.partition('{}')
        pattern = re.compile(rf'{re.escape(start)}(\d+){re.escape(end)}')
        numbered = [
            (int(match[1]), path)
            for path in Path(folder).glob('*')
            if (match := pattern.fullmatch(path.name))
        ]
        found.append([path for _, path in sorted(numbered, reverse=True)])
    return found


def newest_whole(
    folder: str | Path, templates: Collection[str] = TEMPLATES
) -> tuple[Path | None, list[str]]:
    """The checkpoint of the latest iteration that a run can resume from.

    Found by the names and contents of the files, not by ``last_checkpoint``,
    which may name a file that was moved, is older, or is broken.

    Args:
        folder: Where to look.
        templates: Names of checkpoints.

    Returns:
        The file, or None; and for each later file why it was skipped.
    """
    whole: list[tuple[int, Path]] = []
    skipped = []
    for paths in checkpoints_in(folder, templates):
        for path in paths:
            try:
                whole.append((_iteration_of(path), path))
                break
            except UserError as error:
                skipped.append(f'{path}: {error}')
    return max(whole, default=(0, None))[1], skipped


def _iteration_of(path: Path) -> int:
    content = load_file(path)
    fault = fault_in(content)
    if fault:
        raise UserError(fault)
    return content['meta']['iter']


def fault_in(content: Any) -> str:
    """Why a run cannot resume from a file's content; '' if it can."""
    if not isinstance(content, Mapping):
        return f'expected a dict, got {type(content).__name__}'
    missing = [
        key
        for key in ('meta', 'state_dict', 'message_hub', 'optimizer')
        if not isinstance(content.get(key), Mapping) or not content[key]
    ]
    if missing:
        return (
            f'it has no {", ".join(missing)}, so a run cannot resume from it '
            '(best_*.pth and published files have only weights)'
        )
    for key in ('epoch', 'iter'):
        value = content['meta'].get(key)
        if type(value) is not int or value < 0:
            return f'meta.{key}: expected 0 or more, got {value!r}'
    return ''


def _places(cfg: Config) -> tuple[Path | None, Collection[str]]:
    """The folder of a run's checkpoints, None if remote, and their names."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    template = hook.get('filename_tmpl') if isinstance(hook, dict) else None
    out_dir = hook.get('out_dir') if isinstance(hook, dict) else None
    folder = Path(cfg.work_dir)
    if out_dir and '://' in str(out_dir):
        return None, TEMPLATES
    if out_dir:
        # As mmengine's hook joins them.
        folder = Path(out_dir, folder.name)
    # A run that a signal stopped has a file with a default name as well.
    return folder, dict.fromkeys([template or TEMPLATES[0], *TEMPLATES])


def find_to_resume(cfg: Config) -> tuple[str | None, list[str]]:
    """The file that ``--resume`` takes, and those that it skips.

    Args:
        cfg: A whole config, ``work_dir`` included.

    Returns:
        See :func:`newest_whole`. Also None if checkpoints are in a remote
        ``out_dir``: mmengine then reads ``last_checkpoint``.

    Raises:
        UserError: There is no complete file.
    """
    folder, templates = _places(cfg)
    if folder is None:
        return None, []
    newest, skipped = newest_whole(folder, templates)
    if newest is None:
        raise UserError(
            f'--resume: expected a whole checkpoint in {folder.absolute()}, '
            + (
                'but a run can resume from none of these:\n'
                + '\n'.join(f'  {line}' for line in skipped)
                if skipped
                else 'but there is none.'
            )
            + '\nWhat to do: correct --work-dir, give a file (--resume FILE), '
            'or leave --resume out to start again.'
        )
    return str(newest), skipped


def check_work_dir(cfg: Config) -> None:
    """Stop if a run would mix with another one, or cannot resume.

    Reads only the names of files, and only on rank 0.

    Args:
        cfg: A whole config, ``work_dir`` included.

    Raises:
        UserError: ``resume`` without a checkpoint; or checkpoints of a former
            run without ``resume``.
    """
    folder, templates = _places(cfg)
    if folder is None or not _is_first():
        return
    found = [
        path for paths in checkpoints_in(folder, templates) for path in paths
    ]
    if cfg.get('resume'):
        if cfg.get('load_from') is None and not found:
            find_to_resume(cfg)
    elif found:
        raise UserError(
            f'work_dir: {folder.absolute()} has checkpoints of a former '
            f'run ({", ".join(path.name for path in found[:3])}'
            + (', ...' if len(found) > 3 else '')
            + '), and this run would mix its own with them. Continue that '
            'run (--resume), give another --work-dir, or remove the folder.'
        )


def _is_first() -> bool:
    """Whether this process is rank 0, before any group exists."""
    names = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    return all(os.environ.get(name, '0') == '0' for name in names)


@contextlib.contextmanager
def held(work_dir: str | Path) -> Iterator[None]:
    """Lock a work dir against other runs; a kill releases the lock.

    On a file system without locks nothing is locked.

    Raises:
        UserError: Another run is in it, or nothing can be written into it.
    """
    if not _is_first():
        yield
        return
    try:
        import fcntl
    except ImportError:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            Path(work_dir).mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(Path(work_dir, LOCK), 'a'))
        except OSError as error:
            raise UserError(
                f'work_dir: nothing can be written into '
                f'{Path(work_dir).absolute()} ({error.strerror or error}). '
                'Give another --work-dir, or make that one writable.'
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f'work_dir: another run uses {Path(work_dir).absolute()}. '
                'Wait for it, stop it, or give another --work-dir.'
            ) from None
        except OSError:
            pass
        yield
