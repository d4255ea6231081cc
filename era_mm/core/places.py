"""Reads checkpoints from wherever mmengine can, without running code."""

import io
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from mmengine.fileio import get_file_backend
from mmengine.runner.checkpoint import (
    CheckpointLoader,
    _get_mmengine_home,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
    load_from_pavi,
)

from ..errors import UserError
from .download import download
from .safe_files import TRUST, UntrustedFileError, is_trusted, load_file

#: Prefixes for which mmengine has its own reader; '' is a local path.
PREFIXES = (
    '',
    'http://',
    'https://',
    'modelzoo://',
    'torchvision://',
    'open-mmlab://',
    'openmmlab://',
    'mmcls://',
    'pavi://',
    r'(\S+\:)?s3://',
    r'(\S+\:)?petrel://',
)


def read_place(place: str, map_location: Any = 'cpu') -> Any:
    """Read a checkpoint from a path, URL or name, like ``load_file``.

    Args:
        place: A path, a URL, or a name that mmengine knows, such as
            ``torchvision://resnet50``.
        map_location: As of ``torch.load``.

    Returns:
        What was saved.

    Raises:
        FileNotFoundError: There is no such file.
        UntrustedFileError: See ``load_file``; also for places that only
            mmengine's unsafe reader knows (``pavi://``).
        UserError: It is not a checkpoint, or the name is not known.
    """
    scheme, separator, rest = place.partition('://')
    if not separator:
        path = os.path.expanduser(place)
        if not os.path.isfile(path):
            raise FileNotFoundError(f'Checkpoint {place!r} does not exist.')
        return load_file(path, map_location, name=place)
    if scheme in ('http', 'https'):
        return load_file(download(place, None), map_location, name=place)
    if scheme in ('modelzoo', 'torchvision'):
        url = _look_up(get_torchvision_models(), rest, place)
        return read_place(url, map_location)
    if scheme in ('open-mmlab', 'openmmlab'):
        rest = get_deprecated_model_names().get(rest, rest)
        url = _look_up(get_external_models(), rest, place)
        if '://' not in url:
            url = os.path.join(_get_mmengine_home(), url)
        return read_place(url, map_location)
    if scheme == 'mmcls':
        url = _look_up(get_mmcls_models(), rest, place)
        return _backbone_of(read_place(url, map_location))
    if re.fullmatch(r'(\S+:)?(s3|petrel)', scheme):
        backend = get_file_backend(place, backend_args={'backend': 'petrel'})
        content = io.BytesIO(backend.get(place))
        return load_file(content, map_location, name=place)
    if scheme == 'pavi' and is_trusted():
        return load_from_pavi(place, map_location)
    if scheme == 'pavi':
        raise UntrustedFileError(
            f'Checkpoint {place!r} is not read: its reader may run code from '
            f'the file. Download the file, or trust it with {TRUST}=1.'
        )
    raise UserError(
        f'Checkpoint {place!r}: no reader for {scheme}://. Give a path or an '
        'http(s) URL.'
    )


def _look_up(known: Mapping[str, str], name: str, place: str) -> str:
    if name not in known:
        raise UserError(
            f'Checkpoint {place!r}: mmengine does not know {name!r} there. '
            'Correct the name, or give a path or URL.'
        )
    return known[name]


def _backbone_of(checkpoint: Mapping) -> dict:
    """A classifier's backbone, without prefix, as mmengine takes it."""
    weights = checkpoint.get('state_dict', checkpoint)
    return dict(
        state_dict=OrderedDict(
            (key.removeprefix('backbone.'), value)
            for key, value in weights.items()
            if key.startswith('backbone.')
        )
    )


def load_from_checked(filename: str, map_location: Any) -> Any:
    """The reader that mmengine's loader calls in a guarded process.

    It leaves out a config in the meta data, which ``Runner.resume`` would
    run as Python.
    """
    checkpoint = read_place(filename, map_location)
    if isinstance(checkpoint, Mapping):
        meta = checkpoint.get('meta')
        if isinstance(meta, dict):
            meta.pop('config', None)
    return checkpoint


def guard_reading() -> None:
    """Make mmengine read every checkpoint of this process by ``read_place``.

    mmengine's own readers may run code from files that hold more than
    weights. Its loader allows other readers, so ``load_from``, ``resume`` and
    ``init_cfg`` are safe as well. The commands of era_mm call this; importing
    era_mm does not change how a host reads.
    """
    CheckpointLoader.register_scheme(
        prefixes=list(PREFIXES), loader=load_from_checked, force=True
    )
