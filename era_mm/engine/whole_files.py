"""Atomic writing of files: to a temporary file, which is then renamed."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from era_mm.engine.work_dir import newest_whole
from era_mm.errors import UserError

#: Name of a file until it is complete; hidden, so that no pattern for
#: checkpoints matches it.
PART = '.{name}.part'


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that a kill at any moment leaves it complete.

    The file has the old content or the new one, never a part.

    Args:
        path: Path of the file.
        content: The whole content.

    Raises:
        OSError: It cannot be written; the old file is kept.
    """
    path = Path(path)
    part = path.with_name(PART.format(name=path.name))
    try:
        with open(part, 'wb') as file:
            file.write(content)
            file.flush()
            # The content must be on the disk before the name.
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def parts_in(folder: str | Path) -> Iterator[Path]:
    """Temporary files that killed processes have left behind."""
    return Path(folder).glob(PART.format(name='*'))


def write_or_tell(path: str | Path, content: bytes) -> None:
    """:func:`write_whole`, with a message of what is left if it fails.

    Args:
        path: Where to; folders are made.
        content: All of it.

    Raises:
        UserError: The file cannot be written, as when the disk is full; the
            message says what is left to resume from.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise UserError(
            f'{path} ({len(content) / 1e6:.1f} MB) cannot be written: '
            f'{error.strerror or error}. {_left_in(path.parent, path)}'
        ) from error


def _left_in(folder: Path, path: Path | None = None) -> str:
    """What a run can go on from after ``path`` could not be written."""
    left, _ = newest_whole(folder)
    if left is None:
        return 'There is no checkpoint to resume from.'
    return (
        f'{left} is whole'
        + (', as it was written before' if left == path else '')
        + ': make room, then go on with --resume.'
    )


@contextlib.contextmanager
def full_disk_said(folder: str | Path) -> Iterator[None]:
    """Explain that a disk is full where a host writes, such as logged values.

    Args:
        folder: Of the run's checkpoints.

    Raises:
        UserError: The disk is full, or a quota is used up; the message says
            what is left to resume from.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f'{error.filename or "a file of the run"} cannot be written: '
            f'{error.strerror}. {_left_in(Path(folder))}'
        ) from error


class WholeFileBackend(LocalBackend):
    """mmengine's backend for local files, with atomic writing.

    Raises:
        UserError: See :func:`write_or_tell`.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes, see :func:`write_or_tell`."""
        write_or_tell(filepath, obj)

    def put_text(
        self, obj: str, filepath: str | Path, encoding: str = 'utf-8'
    ) -> None:
        """Write text, see :func:`write_or_tell`."""
        self.put(obj.encode(encoding), filepath)


def guard_writing() -> None:
    """Make mmengine write every local file of this process atomically.

    mmengine has a backend for each prefix of a path, which may be replaced;
    local paths have no prefix. ``train`` calls this.
    """
    register_backend('local', WholeFileBackend, force=True, prefixes='')
