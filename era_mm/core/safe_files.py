"""Reads checkpoint files without running code from them.

A checkpoint is a pickle, and unpickling may call any function that the file
names. torch's ``weights_only`` reader knows tensors and plain containers.
What else mmengine's files hold (histories of logged values, numpy arrays) is
allowed here by name. Everything else is refused, unless the user trusts the
file.
"""

import _compat_pickle
import codecs
import contextlib
import io
import os
import pickle
import pickletools
import types
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from ..errors import UserError, first_line

#: Environment variable that lets files run code; ``--trust-checkpoint`` too.
TRUST = 'ERA_MM_TRUST_CHECKPOINT'

ADVICE = (
    'Give a checkpoint that mmengine, mmdet or mmpretrain has saved (a dict '
    'with `state_dict`, or a state dict).'
)

File = str | Path | io.BytesIO


class UntrustedFileError(UserError):
    """A file that might run code if it were read."""


def is_trusted() -> bool:
    """Whether the user allows checkpoints to run code.

    Raises:
        UserError: The variable is neither 0, 1 nor empty.
    """
    value = os.environ.get(TRUST, '')
    if value not in ('', '0', '1'):
        raise UserError(
            f'{TRUST}: expected 1 (checkpoints may run code) or 0, but got '
            f'{value!r}.'
        )
    return value == '1'


def load_file(
    file: File, map_location: Any = 'cpu', *, name: str | None = None
) -> Any:
    """Read a file that ``torch.save`` has written.

    Args:
        file: Its path, or its bytes.
        map_location: As of ``torch.load``.
        name: What messages call it. None: its path.

    Returns:
        What was saved.

    Raises:
        UntrustedFileError: It holds more than tensors, plain containers and
            mmengine's records, and the user does not trust it.
        UserError: It is truncated or not a checkpoint.
    """
    name = str(file) if name is None else name
    trusted = is_trusted()
    try:
        if trusted:
            return torch.load(
                file, map_location=map_location, weights_only=False
            )
        return _load_weights(file, map_location)
    except FileNotFoundError:
        raise
    # A damaged file may raise any error.
    except Exception as error:
        foreign = [] if trusted else _foreign_names(file)
        if foreign or (not trusted and _is_script(file)):
            what = ', '.join(foreign[:3]) or 'a TorchScript program'
            raise UntrustedFileError(
                f'Checkpoint {name!r} is not read: it holds {what}'
                + (', ...' if len(foreign) > 3 else '')
                + ', and reading that may run any code. Expected tensors, '
                'plain containers and the records of mmengine. If you know '
                'where the file comes from and trust it, add '
                f'--trust-checkpoint or set {TRUST}=1 in the environment.'
            ) from error
        raise UserError(
            f'Checkpoint {name!r}{_size(file)} cannot be read: it is '
            f'truncated or not a checkpoint ({type(error).__name__}: '
            f'{first_line(error)}). {ADVICE}'
        ) from error


def _size(file: File) -> str:
    if isinstance(file, io.BytesIO):
        return f' ({len(file.getbuffer())} bytes)'
    with contextlib.suppress(OSError):
        return f' ({Path(file).stat().st_size} bytes)'
    return ''


# -- what is allowed ---------------------------------------------------------


def _method_of_history(owner: Any, name: str) -> Callable:
    """Replaces ``getattr``, by which histories refer to their methods."""
    if owner is not HistoryBuffer or str(name).startswith('_'):
        raise pickle.UnpicklingError(
            f'builtins.getattr of {owner!r} and {name!r}'
        )
    return getattr(HistoryBuffer, name)


def _alias(function: Callable, module: str, name: str) -> Callable:
    """A function under the name by which files refer to it.

    torch 2.6 takes the name from the function, later ones from a pair, too.
    """

    def call(*args: Any) -> Any:
        return function(*args)

    call.__module__, call.__name__, call.__qualname__ = module, name, name
    return call


def allowed_types() -> list[Any]:
    """Types in mmengine's files that torch does not allow by default.

    numpy 2 moved its functions; files may have either name.
    """
    # What this numpy writes itself for an array and for a number.
    functions: dict[str, Any] = {
        '_reconstruct': np.empty(0).__reduce__()[0],
        'scalar': np.float64(0).__reduce__()[0],
    }
    moved = [
        _alias(function, f'{package}.multiarray', name)
        for package in ('numpy.core', 'numpy._core')
        for name, function in functions.items()
    ]
    return [
        HistoryBuffer,
        _alias(_method_of_history, 'builtins', 'getattr'),
        *moved,
        ConfigDict,
        slice,
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in np.typecodes['All']},
    ]


def _load_weights(file: File, map_location: Any) -> Any:
    if hasattr(torch.serialization, 'safe_globals'):
        with torch.serialization.safe_globals(allowed_types()):
            return torch.load(
                file, map_location=map_location, weights_only=True
            )
    # Before torch 2.5 the list of allowed types is closed.
    if _is_script(file):
        raise pickle.UnpicklingError('a TorchScript program')
    return torch.load(
        file,
        map_location=map_location,
        weights_only=False,
        pickle_module=_restricted_pickle(),
    )


def _restricted_pickle() -> types.ModuleType:
    """A pickle module that finds only the allowed names."""
    allowed = _allowed_names()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            try:
                return allowed[_full_name(module, name)]
            except KeyError:
                raise pickle.UnpicklingError(f'{module}.{name}') from None

    module = types.ModuleType('restricted_pickle')
    module.Unpickler = Unpickler  # type: ignore[attr-defined]
    module.load = (  # type: ignore[attr-defined]
        lambda file, **kwargs: Unpickler(file, **kwargs).load()
    )
    return module


def _full_name(module: str, name: str) -> str:
    """A name as Python 3 has it; torch's files have that of Python 2."""
    module, name = _compat_pickle.NAME_MAPPING.get(
        (module, name),
        (_compat_pickle.IMPORT_MAPPING.get(module, module), name),
    )
    return f'{module}.{name}'


def _allowed_names() -> dict[str, Any]:
    """All that is allowed, torch's own part included, by its name."""
    from torch import _weights_only_unpickler as reader

    # torch before 2.5 does not list these, later ones do.
    plain: list[Any] = [codecs.encode, bytearray, complex, set, Counter]
    plain += [torch.device, torch._utils._rebuild_parameter_with_state]
    kinds = [x for x in vars(torch).values() if isinstance(x, torch.dtype)]
    return {
        **{str(kind): kind for kind in kinds},
        **reader._get_allowed_globals(),
        **{
            f'{t.__module__}.{t.__qualname__}': t
            for t in plain + allowed_types()
        },
    }


# -- what a refused file holds -----------------------------------------------


def _foreign_names(file: File) -> list[str]:
    """Names in a file's pickles that are not allowed, without running it.

    Best effort: empty for a file that cannot be parsed.
    """
    allowed = _allowed_names()
    found: dict[str, None] = {}
    with contextlib.suppress(Exception), _pickles_of(file) as pickles:
        for stream in pickles:
            with contextlib.suppress(Exception):
                for name in _names_in(stream):
                    if name not in allowed:
                        found[name] = None
    return list(found)


@contextlib.contextmanager
def _pickles_of(file: File) -> Iterator[list[IO[bytes]]]:
    with contextlib.ExitStack() as stack:
        if isinstance(file, io.BytesIO):
            file.seek(0)
            opened: IO[bytes] = file
        else:
            opened = stack.enter_context(open(file, 'rb'))
        if not zipfile.is_zipfile(opened):
            opened.seek(0)
            yield [opened]
            return
        archive = stack.enter_context(zipfile.ZipFile(opened))
        yield [
            stack.enter_context(archive.open(name))
            for name in archive.namelist()
            if name.endswith('.pkl')
        ]


def _names_in(stream: IO[bytes]) -> Iterator[str]:
    """Names that the pickles of a stream look up, in order."""
    # torch before 1.6 wrote several pickles into one file.
    while True:
        strings: list[str] = []
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ('GLOBAL', 'INST'):
                module, _, name = str(argument).partition(' ')
                yield _full_name(module, name)
            elif opcode.name == 'STACK_GLOBAL':
                yield '.'.join(strings[-2:])
            elif isinstance(argument, str):
                strings.append(argument)


def _is_script(file: File) -> bool:
    with contextlib.suppress(Exception), zipfile.ZipFile(file) as archive:
        return any(
            name.endswith('constants.pkl') for name in archive.namelist()
        )
    if isinstance(file, io.BytesIO):
        # Not where the search for an archive's end has left it.
        file.seek(0)
    return False
