"""Strict loading of teacher weights, and checkpoints of the plain student.

The ``state_dict`` of a checkpoint has only the student's own keys. The extras
(distillers, inner modules and their optimisers) are in its metadata, where
torch keeps the version numbers of modules and from which every loader of the
hosts passes them to the module that wrote them:
``checkpoint['state_dict']._metadata['']['era_mm']``. So no hook has to be
configured, and EMA, ``--resume`` and ``mim test`` find the extras.
"""

import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .download import download
from .fit import (
    OTHER_KINDS,
    find_misfits,
    first_of,
    lines_of,
    misfits_by_kind,
    names_not_finite,
)
from .places import read_place
from .safe_files import ADVICE, load_file
from .utils import to_cpu

METADATA_KEY = 'era_mm'
_SIZE_MISMATCH = re.compile(
    r'size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\].*'
)


class Extras(OrderedDict):
    """Extras in a state dict's metadata; pickled as a plain dict on the CPU.

    Tensors are copied to the CPU only when a file is written: EMA takes a
    state dict in every iteration, and a copy would synchronise the device.
    """

    def __reduce__(self) -> tuple:
        return (OrderedDict, (), None, None, iter(to_cpu(dict(self)).items()))


def extras_of(state_dict: Mapping[str, Tensor]) -> dict | None:
    """The extras in a state dict's metadata, or None."""
    metadata = getattr(state_dict, '_metadata', None) or {}
    return metadata.get('', {}).get(METADATA_KEY)


def drop_extras(state_dict: Mapping[str, Tensor]) -> None:
    """Take the extras out of a state dict's metadata.

    Also those of the students in it, where there are several.

    Args:
        state_dict: Changed in place; one without extras stays as it is.
    """
    for entry in (getattr(state_dict, '_metadata', None) or {}).values():
        entry.pop(METADATA_KEY, None)


def students_of(state_dict: Mapping[str, Tensor]) -> dict[str, OrderedDict]:
    """The students of a ``MutualDistillation``'s state dict, each plain.

    Returns:
        Each student's own state dict by its name; empty if the state dict is
        another model's.
    """
    students: dict[str, OrderedDict] = {}
    for key, value in state_dict.items():
        start, _, rest = key.partition('.')
        name, _, own = rest.partition('.')
        if start == 'students' and own:
            students.setdefault(name, OrderedDict())[own] = value
    return students


def read_checkpoint(
    filename: str | Sequence[str], sha256: str | None = None
) -> OrderedDict:
    """Read the state dict of a checkpoint file; see ``read_with_meta``."""
    return read_with_meta(filename, sha256)[0]


def read_with_meta(
    filename: str | Sequence[str], sha256: str | None = None
) -> tuple[OrderedDict, dict]:
    """Read the state dict and the meta data of a checkpoint file.

    Args:
        filename: Path or URL, whatever mmengine's loader takes; or several,
            which are tried in order until one can be read.
        sha256: The first digits of the file's SHA-256, as at the end of the
            hosts' file names. None: not checked.

    Returns:
        The state dict, and the file's ``meta`` (classes, epoch, ...).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, not a checkpoint, or does not have
            this ``sha256``; or none of several could be read.
    """
    names = [filename] if isinstance(filename, str) else list(filename)
    if not names:
        raise ValueError('`checkpoint` is an empty list. Give a path or URL.')
    faults: list[Exception] = []
    for name in names:
        try:
            return _read(name, sha256)
        except (FileNotFoundError, ValueError) as error:
            faults.append(error)
            if len(names) > 1:
                print_log(str(error), logger='current', level=logging.WARNING)
    if len(faults) == 1:
        raise faults[0]
    raise ValueError(
        f'None of the {len(names)} given checkpoints can be read:\n'
        + '\n'.join(f'  {fault}' for fault in faults)
    )


def _check_digest(path: Path, sha256: str, *, name: str) -> None:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if not found.startswith(sha256.lower()):
        raise ValueError(
            f'Checkpoint {name!r} is another file: expected a SHA-256 that '
            f'begins with {sha256}, but {path} has '
            f'{found[: max(8, len(sha256))]}. Delete that file and download '
            'it again, or correct `sha256`.'
        )


def _read(filename: str, sha256: str | None) -> tuple[OrderedDict, dict]:
    name = filename
    if filename.startswith(('http://', 'https://')):
        filename = str(download(filename, sha256))
    is_local = '://' not in filename
    if is_local and not Path(filename).is_file():
        raise FileNotFoundError(
            f'Checkpoint {filename!r} does not exist (looked in '
            f'{Path(filename).absolute().parent}). Correct the path, or give '
            'a URL.'
        )
    if sha256 is not None:
        if not is_local:
            raise ValueError(
                f'`sha256` is for files and http(s) URLs, but got {name!r}.'
            )
        _check_digest(Path(filename), sha256, name=name)
    checkpoint = (
        load_file(Path(filename), name=name)
        if is_local
        else read_place(filename)
    )
    state_dict = (
        checkpoint.get('state_dict', checkpoint)
        if isinstance(checkpoint, Mapping)
        else None
    )
    if not isinstance(state_dict, Mapping) or not any(
        isinstance(value, Tensor) for value in state_dict.values()
    ):
        raise ValueError(
            f'Checkpoint {name!r} holds no weights: expected a dict with '
            f'`state_dict`, got {type(checkpoint).__name__}'
            + (
                f' with keys {sorted(map(str, checkpoint))[:5]}'
                if isinstance(checkpoint, Mapping)
                else ''
            )
            + f'. {ADVICE}'
        )
    odd = [key for key in state_dict if not isinstance(key, str)]
    if odd:
        raise ValueError(
            f'Checkpoint {name!r} holds no state dict: expected names of '
            f'weights as keys, but got {odd[0]!r}. {ADVICE}'
        )
    plain = OrderedDict(
        (key.removeprefix('module.'), value)
        for key, value in state_dict.items()
    )
    if hasattr(state_dict, '_metadata'):
        setattr(plain, '_metadata', state_dict._metadata)  # noqa: B010
    meta = checkpoint.get('meta')
    return plain, dict(meta) if isinstance(meta, Mapping) else {}


#: What to do about weights that do not fit.
OF_THE_SAME_MODEL = (
    'Give the config and the checkpoint of the same model (classes, depth and '
    'widths included).'
)


def load_strictly(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    name: str,
    advice: str = OF_THE_SAME_MODEL,
) -> None:
    """Load weights that must fit a model in every key and shape.

    ``num_batches_tracked`` may be missing, as the hosts allow: checkpoints
    older than PyTorch 0.4.1 do not have it and evaluation does not use it.

    Args:
        model: The model.
        state_dict: The weights.
        name: What the message calls the weights, usually the file's name.
        advice: What to do.

    Raises:
        ValueError: Missing or unexpected keys, other shapes, integers
            instead of floating-point numbers, or values that are not finite.
            The first ones are shown.
    """
    problems = find_misfits(model.state_dict(), state_dict)
    _refuse(model, name, problems, advice)
    incompatible = model.load_state_dict(state_dict, strict=False)
    assert not incompatible.unexpected_keys, incompatible


def load_whole(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, name: str
) -> None:
    """Load a file as the host does, but require every tensor of the model.

    The host's own hooks rename and resize tensors of older files. Further
    tensors of the file, such as averaged copies, are named in one log line.
    ``num_batches_tracked`` may be missing, as in :func:`load_strictly`.

    Args:
        model: The model, of a host.
        state_dict: The weights.
        name: What messages call the weights, usually the file's name.

    Raises:
        ValueError: A tensor of the model is missing in the file, or has
            another shape there.
    """
    missing: list[str] = []
    surplus: list[str] = []
    own = model.state_dict()
    # What is loaded takes the kind of the model's.
    kinds = misfits_by_kind(own, state_dict)[OTHER_KINDS]
    infinite = names_not_finite(own)

    def keep(_: nn.Module, incompatible: Any) -> None:
        missing[:] = incompatible.missing_keys
        surplus[:] = incompatible.unexpected_keys

    reshaped: list[str] = []
    handle = model.register_load_state_dict_post_hook(keep)
    try:
        model.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:
        reshaped = other_shapes(str(error).splitlines())
        if not reshaped:
            # The host's own, of what it cannot resize.
            raise
    finally:
        handle.remove()
    missing = [
        key for key in missing if not key.endswith('num_batches_tracked')
    ]
    ways = {
        'missing in the file': missing,
        'other shapes': reshaped,
        OTHER_KINDS: kinds,
        # Under their present names: the file may have older ones.
        'not finite': sorted(names_not_finite(model.state_dict()) - infinite),
    }
    if missing or reshaped:
        # Then an unused tensor may be the one that is missing.
        ways['not in the model'] = surplus
    _refuse(model, name, lines_of(ways))
    if surplus:
        print_log(
            f'{name!r} has {len(surplus)} tensors that '
            f'{type(model).__name__} does not use: '
            f'{first_of(surplus)}.',
            logger='current',
            level=logging.WARNING,
        )


def other_shapes(messages: Iterable[str]) -> list[str]:
    """Names and shapes from torch's messages of tensors that do not fit."""
    found = [_SIZE_MISMATCH.search(message) for message in messages]
    return [
        match.expand(r'\1: file (\2), model (\3)') for match in found if match
    ]


def _refuse(
    model: nn.Module,
    name: str,
    problems: Sequence[str],
    advice: str = OF_THE_SAME_MODEL,
) -> None:
    """Raise an error that says how a file differs, if it does."""
    if problems:
        raise ValueError(
            f'The weights in {name!r} do not fit {type(model).__name__}. '
            + '; '.join(problems)
            + f'. {advice}'
        )


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes: equal only if every bit is equal."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        value = tensors[key].detach().cpu().contiguous()
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
