"""Download of checkpoints: once, and by one rank for all."""

import sys
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import torch
from mmengine.dist import broadcast_object_list, get_rank


def download(url: str, sha256: str | None) -> Path:
    """Path of a downloaded file; downloads it if it is not there.

    A file that is not a checkpoint, or does not have this ``sha256``, is
    deleted: the next URL of a list usually has the same file name.

    Rank 0 downloads and tells the other ranks the result: they would wait
    for ever for a rank that has stopped with an error.
    """
    path = Path(
        torch.hub.get_dir(), 'checkpoints', Path(urlsplit(url).path).name
    )
    fault = ['']
    if get_rank() == 0:
        fault[0] = _fetch(url, path, sha256)
    broadcast_object_list(fault)
    # Other machines do not share rank 0's folder.
    if get_rank() > 0 and not fault[0]:
        fault[0] = _fetch(url, path, sha256)
    if fault[0]:
        raise FileNotFoundError(
            f'Checkpoint {url!r} cannot be downloaded: {fault[0]}. Give a '
            'path or another URL; `checkpoint` takes a list of them.'
        )
    return path


def _fetch(url: str, path: Path, sha256: str | None) -> str:
    """Download a file that is not there yet; returns the error, or ''."""
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
    # It raises a RuntimeError if the digest differs.
    except (OSError, HTTPException, RuntimeError) as error:
        return f'{type(error).__name__}: {error}'
    with open(path, 'rb') as file:
        start = file.read(2)
    # A zip archive, or a pickle of torch before version 1.6.
    if start != b'PK' and not start.startswith(b'\x80'):
        path.unlink()
        return 'the file is not a checkpoint (often a page that says why)'
    return ''
