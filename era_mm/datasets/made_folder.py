"""Folders of made data: written whole or not at all, never overwritten.

Source: ours.

Read in this order: `SplitParams`, `make_folder`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SplitParams:
    """What every made data set depends on.

    Args:
        seed: Seed of every random choice.
        num_train: Images in the train split.
        num_val: Images in the val split.
        num_test: Images in the test split.

    Raises:
        ValueError: Another type or too small a number.
    """

    seed: int = 0
    num_train: int = 1
    num_val: int = 1
    num_test: int = 1

    def __post_init__(self) -> None:
        self.check_integer('seed', 0)
        for split in ('train', 'val', 'test'):
            self.check_integer(f'num_{split}', 1)

    def check_integer(self, name: str, lowest: int) -> None:
        """Refuse what is no integer of at least ``lowest``."""
        value = getattr(self, name)
        if not isinstance(value, int) or value < lowest:
            raise ValueError(
                f'`{name}` must be an integer of at least {lowest}, but got '
                f'{value!r}.'
            )

    def num_images(self, split: str) -> int:
        """Return the number of images of a split."""
        return getattr(self, f'num_{split}')


def make_folder(
    out: str | Path,
    manifest: str,
    noun: str,
    recipe: Mapping[str, int],
    write: Callable[[Path], dict[str, str]],
) -> bool:
    """Write a data set, or leave an equal one as it is.

    Everything is written into a temporary folder beside `out`, which is then
    renamed: `out` never exists in part.

    Args:
        out: Folder of the data set.
        manifest: File in it that says how it was made.
        noun: What it holds, for messages.
        recipe: What decides about the bytes.
        write: Fills a folder; returns checksums for the manifest.

    Returns:
        True if the data set was written, False if it was there already.

    Raises:
        FileExistsError: If `out` holds something else.
    """
    out = Path(out)
    if _is_there(out, manifest, noun, recipe):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(out) as folder:
        checksums = write(folder)
        (folder / manifest).write_text(
            json.dumps(dict(**recipe, sha256=checksums), indent=2) + '\n'
        )
        try:
            folder.rename(out)
        except OSError:
            # Another process may have finished the same set meanwhile.
            if _is_there(out, manifest, noun, recipe):
                return False
            raise
    return True


def _is_there(
    out: Path, manifest: str, noun: str, recipe: Mapping[str, int]
) -> bool:
    """Tell whether `out` holds the data set; refuse anything else."""
    if not out.exists():
        return False
    file = out / manifest
    if not file.is_file():
        if out.is_dir() and not any(out.iterdir()):
            return False
        raise FileExistsError(
            f'{out} must be free or hold {noun}, but it exists without '
            f'{manifest}. Nothing was changed; choose another folder or '
            'move this one away.'
        )
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise FileExistsError(
            f'{file} must say how the {noun} were made, but it cannot be '
            f'read: {error}. Nothing was changed; choose another folder or '
            'move this one away.'
        ) from error
    differing = ', '.join(
        f'{key} {found.get(key)} (there) and {value} (asked for)'
        for key, value in recipe.items()
        if found.get(key) != value
    )
    if not differing:
        return True
    raise FileExistsError(
        f'{out} holds {noun} made otherwise: {differing}. Nothing was '
        'changed; choose another folder or move this one away.'
    )


@contextlib.contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    """A locked folder beside `out` that is gone afterwards."""
    _remove_leftovers(out)
    made = Path(tempfile.mkdtemp(prefix=f'.{out.name}.new-', dir=out.parent))
    folder = made.with_name(made.name.replace('.new-', '.partial-'))
    # mkdtemp makes it private; a data set is readable like any folder.
    umask = os.umask(0)
    os.umask(umask)
    with _locked(made, fcntl.LOCK_EX):
        try:
            made.chmod(0o777 & ~umask)
            # Only now, with its lock, may others take it for a leftover.
            made.rename(folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove what a killed run left: its lock went with the process."""
    for folder in out.parent.glob(f'.{out.name}.partial-*'):
        # It may be another process's: at work, or just done.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            with _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Hold a lock of a folder; dying gives it back, too."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, how)
        yield
    finally:
        os.close(lock)
