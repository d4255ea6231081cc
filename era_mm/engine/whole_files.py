"""Files that are whole or not there: written beside, then renamed."""

import os
from collections.abc import Iterator
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from era_mm.engine.work_dir import newest_whole
from era_mm.errors import UserError

#: What a file is called until it is whole; hidden, so no pattern for
#: checkpoints meets it.
PART = '.{name}.part'


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that a process killed at any moment leaves it whole.

    Under its name there is the old content or the new one, never a part.

    Args:
        path: Where to.
        content: All of it.

    Raises:
        OSError: It cannot be written; what was under the name still is.
    """
    path = Path(path)
    part = path.with_name(PART.format(name=path.name))
    try:
        with open(part, 'wb') as file:
            file.write(content)
            file.flush()
            # A name must not get to the disk before the bytes it stands for.
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def parts_in(folder: str | Path) -> Iterator[Path]:
    """What killed processes have left of files that never got their name."""
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
        left, _ = newest_whole(path.parent)
        raise UserError(
            f'{path} ({len(content) / 1e6:.1f} MB) cannot be written: '
            f'{error.strerror or error}. '
            + (
                f'{left} is whole: make room, then go on with --resume.'
                if left
                else 'There is no checkpoint to resume from.'
            )
        ) from error


class WholeFileBackend(LocalBackend):
    """mmengine's backend for local files, which writes whole ones.

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
    """Make mmengine write every local file of this process whole.

    mmengine has a backend for each prefix of a path, and takes another one
    in its place; local paths have none. ``train`` calls this.
    """
    register_backend('local', WholeFileBackend, force=True, prefixes='')
