"""Reading teacher weights strictly; keeping a student file plain.

What training writes has in ``state_dict`` the student's own keys only. The
rest (distillers, inner modules and their optimisers) rides in the metadata of
the same ``state_dict``, where torch keeps the version numbers of modules and
where every loader of the hosts hands it back to the module that wrote it:
``checkpoint['state_dict']._metadata['']['era_mm']``. So no hook has to be
configured for a file to be right, and EMA, ``--resume`` and ``mim test`` find
the extras without one.
"""

import hashlib
import logging
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from .utils import to_cpu

METADATA_KEY = 'era_mm'


class Extras(OrderedDict):
    """Extras in a state dict's metadata; pickled as a plain dict on the CPU.

    The tensors stay where they are until a file is written: a state dict is
    taken in every iteration under EMA, and copying to the CPU there would
    cost a synchronisation.
    """

    def __reduce__(self) -> tuple:
        return (OrderedDict, (), None, None, iter(to_cpu(dict(self)).items()))


def extras_of(state_dict: Mapping[str, Tensor]) -> dict | None:
    """The extras that ride in a state dict's metadata, or None."""
    metadata = getattr(state_dict, '_metadata', None) or {}
    return metadata.get('', {}).get(METADATA_KEY)


def students_of(state_dict: Mapping[str, Tensor]) -> dict[str, OrderedDict]:
    """The students of a ``MutualDistillation``'s state dict, each plain.

    Returns:
        Each student's own state dict by its name; empty for a state dict of
        another model.
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
    """Read the state dict of a checkpoint file and what it says of itself.

    Args:
        filename: Path or URL, whatever mmengine's loader takes; or several,
            which are tried in their order until one can be read.
        sha256: The first digits of the file's SHA-256, as the hosts' file
            names end in. None: not looked at.

    Returns:
        The state dict, and the file's ``meta`` (classes, epoch, ...).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, not a checkpoint, or another one
            than ``sha256`` says; or none of several could be read.
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
        f'None of {len(names)} places of the checkpoint can be read:\n'
        + '\n'.join(f'  {fault}' for fault in faults)
    )


def _download(url: str, sha256: str | None) -> Path:
    """Where a file of the web lies, after it was fetched if need be.

    What is no checkpoint, or not the one of ``sha256``, is not kept: it would
    stand in the way of the next place, whose file usually has the same name.

    Rank 0 fetches and tells the others how it went: they would wait for ever
    for one that has stopped with an error.
    """
    path = Path(
        torch.hub.get_dir(), 'checkpoints', Path(urlsplit(url).path).name
    )
    problem = ['']
    if get_rank() == 0:
        problem[0] = _fetch(url, path, sha256)
    broadcast_object_list(problem)
    # Other machines have no part in rank 0's folder.
    if get_rank() > 0 and not problem[0]:
        problem[0] = _fetch(url, path, sha256)
    if problem[0]:
        raise FileNotFoundError(
            f'Checkpoint {url!r} cannot be fetched: {problem[0]}. Give a path '
            'or another URL; `checkpoint` takes a list of them.'
        )
    return path


def _fetch(url: str, path: Path, sha256: str | None) -> str:
    """Fetch a file that is not there yet; what went wrong, or ''."""
    if path.is_file():
        return ''
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(
            url,
            str(path),
            hash_prefix=sha256 and sha256.lower(),
            progress=sys.stderr.isatty(),
        )
    # It says with a RuntimeError that the digest is another.
    except (OSError, HTTPException, RuntimeError) as error:
        return f'{type(error).__name__}: {error}'
    with open(path, 'rb') as file:
        start = file.read(2)
    # A zip archive, or a pickle of torch before version 1.6.
    if start != b'PK' and not start.startswith(b'\x80'):
        path.unlink()
        return 'what came is no checkpoint (often a page that says why)'
    return ''


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
            f'{found[: max(8, len(sha256))]}. Remove that file and fetch it '
            'again, or correct `sha256`.'
        )


def _read(filename: str, sha256: str | None) -> tuple[OrderedDict, dict]:
    advice = (
        'Give a checkpoint that mmengine, mmdet or mmpretrain has saved '
        '(a dict with `state_dict`, or a state dict).'
    )
    name = filename
    if filename.startswith(('http://', 'https://')):
        filename = str(_download(filename, sha256))
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
    try:
        checkpoint = CheckpointLoader.load_checkpoint(
            filename, map_location='cpu'
        )
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        size = f' ({Path(filename).stat().st_size} bytes)' if is_local else ''
        raise ValueError(
            f'Checkpoint {name!r}{size} cannot be read: it is truncated '
            f'or not a checkpoint ({type(error).__name__}: '
            f'{str(error).splitlines()[0] if str(error) else "no details"}). '
            f'{advice}'
        ) from error
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
            + f'. {advice}'
        )
    plain = OrderedDict(
        (key.removeprefix('module.'), value)
        for key, value in state_dict.items()
    )
    if hasattr(state_dict, '_metadata'):
        setattr(plain, '_metadata', state_dict._metadata)  # noqa: B010
    return plain, dict(checkpoint.get('meta') or {})


def load_strictly(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, name: str
) -> None:
    """Load weights that must fit a model in every key and shape.

    ``num_batches_tracked`` may lack, as the hosts allow: checkpoints older
    than PyTorch 0.4.1 do not have it and evaluation does not use it.

    Args:
        model: The model.
        state_dict: The weights.
        name: How the message calls the weights, usually the file's name.

    Raises:
        ValueError: Missing or unexpected keys, or other shapes; the first
            ones are shown.
    """
    own = model.state_dict()
    missing = [
        key
        for key in own
        if key not in state_dict and not key.endswith('num_batches_tracked')
    ]
    unexpected = [key for key in state_dict if key not in own]
    reshaped = [
        f'{key}: file {tuple(state_dict[key].shape)}, '
        f'model {tuple(own[key].shape)}'
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
    _refuse(model, name, missing, unexpected, reshaped)
    incompatible = model.load_state_dict(state_dict, strict=False)
    assert not incompatible.unexpected_keys, incompatible


def load_whole(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, name: str
) -> None:
    """Load a host's file as the host does, and every tensor of the model.

    The host's own hooks rename and resize what older files hold. What a file
    has besides, such as averaged copies, is named in one line of the log.
    ``num_batches_tracked`` may lack, as in :func:`load_strictly`.

    Args:
        model: The model, of a host.
        state_dict: The weights.
        name: How messages call the weights, usually the file's name.

    Raises:
        ValueError: The model has a tensor that the file lacks, or has in
            another shape.
    """
    missing: list[str] = []
    surplus: list[str] = []

    def keep(_: nn.Module, incompatible: Any) -> None:
        missing[:] = incompatible.missing_keys
        surplus[:] = incompatible.unexpected_keys

    reshaped: list[str] = []
    handle = model.register_load_state_dict_post_hook(keep)
    try:
        model.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:
        # A line of torch for each tensor of another shape, after the first.
        reshaped = [
            _SIZE_MISMATCH.sub(r'\1: file (\2), model (\3)', line.strip())
            for line in str(error).splitlines()[1:]
        ]
    finally:
        handle.remove()
    missing = [
        key for key in missing if not key.endswith('num_batches_tracked')
    ]
    if missing or reshaped:
        _refuse(model, name, missing, surplus, reshaped)
    if surplus:
        print_log(
            f'{name!r} has {len(surplus)} tensors besides those of '
            f'{type(model).__name__}, which are not used: {_first(surplus)}.',
            logger='current',
            level=logging.WARNING,
        )


_SIZE_MISMATCH = re.compile(
    r'size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\].*'
)


def _first(keys: Sequence[str]) -> str:
    return ', '.join(keys[:3]) + (', ...' if len(keys) > 3 else '')


def _refuse(
    model: nn.Module,
    name: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    reshaped: Sequence[str],
) -> None:
    """Say in what a file differs from a model, if it does."""
    problems = [
        f'{title} ({len(keys)}): {_first(keys)}'
        for title, keys in (
            ('missing in the file', missing),
            ('not in the model', unexpected),
            ('other shapes', reshaped),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f'The weights in {name!r} do not fit {type(model).__name__}. '
            + '; '.join(problems)
            + '. Give the config and the checkpoint of the same model '
            '(classes, depth and widths included).'
        )


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes: equal only if every bit is equal."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        value = tensors[key].detach().cpu().contiguous()
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
