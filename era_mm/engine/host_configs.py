"""Finds configs of the hosts by the names that users write."""

import difflib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mmengine.registry
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config

from era_mm.core.host_models import whole_model
from era_mm.engine.preflight import find_config
from era_mm.errors import UserError
from era_mm.hosts import shipped

HOSTS = ('mmdet', 'mmpretrain')
#: Pipeline steps after which all images have the same size.
FIXES_SIZE = ('Resize', 'CenterCrop', 'RandomCrop', 'RandomResizedCrop')


class HostConfig(NamedTuple):
    """A whole config and where it came from.

    Args:
        reference: ``mmdet::<folder>/<name>.py`` or a path, as written in a
            config.
        path: Its file.
        cfg: Its content.
    """

    reference: str
    path: Path
    cfg: Config

    @property
    def scope(self) -> str | None:
        """Scope of the types of its model."""
        host = self.reference.partition('::')[0]
        return self.cfg.get('default_scope') or (
            host if '::' in self.reference else None
        )

    @property
    def model(self) -> ConfigDict:
        """The model's config, its data_preprocessor included."""
        return whole_model(self.cfg)


def read_host_config(name: str, role: str = 'config') -> HostConfig:
    """Find and read a config.

    Args:
        name: ``mmdet::<folder>/<name>.py`` (or ``mmpretrain::...``), a path,
            or the base name of a config of era_mm.
        role: What messages call it.

    Raises:
        UserError: It does not exist, cannot be read, or has no model.
    """
    if '::' in name:
        name = name if name.endswith('.py') else f'{name}.py'
        path = _find_in_host(name, role)
    else:
        name = find_config(name, role)
        path = Path(name)
    try:
        cfg = Config.fromfile(path)
    # A config is a program: it may raise anything.
    except Exception as error:
        raise UserError(
            f'{role}: the config {name} cannot be read: '
            f'{type(error).__name__}: {error}'
        ) from error
    if not isinstance(cfg.get('model'), Mapping):
        raise UserError(
            f'{role}: expected a complete config, but {name} has '
            'no `model`. Give one that the host can train.'
        )
    return HostConfig(name, path.resolve(), cfg)


def _find_in_host(name: str, role: str) -> Path:
    host, _, inside = name.partition('::')
    if host not in HOSTS:
        near = difflib.get_close_matches(host, HOSTS, n=1)
        raise UserError(
            f'{role}: expected {" or ".join(f"{h}::..." for h in HOSTS)}, but '
            f'got {name!r}.'
            + (f' Did you mean {near[0]}::{inside}?' if near else '')
        )
    folder = _config_folder(host)
    if (folder / inside).is_file():
        return folder / inside
    known = {
        path.relative_to(folder).as_posix(): path.stem
        for path in sorted(folder.rglob('*.py'))
        if '_base_' not in path.relative_to(folder).parts
    }
    by_stem = {stem: inner for inner, stem in known.items()}
    near = difflib.get_close_matches(inside, known, n=3, cutoff=0.5)
    near += [
        by_stem[stem]
        for stem in difflib.get_close_matches(
            Path(inside).stem, by_stem, n=3, cutoff=0.5
        )
    ]
    hint = '\n'.join(f'  {host}::{n}' for n in list(dict.fromkeys(near))[:4])
    raise UserError(
        f'{role}: {name!r} is not a config of the installed {host}. '
        + (
            f'Nearest names:\n{hint}'
            if near
            else f'Its configs are in {folder}.'
        )
    )


def _config_folder(host: str) -> Path:
    for folder in shipped(host, 'configs'):
        return folder
    raise UserError(
        f'{host}: expected it to be installed with its configs, but they are '
        'not there. Give the path of a config file.'
    )


def published_checkpoint(config: HostConfig) -> str | None:
    """URL of the weights in the host's metafile; None if there is none."""
    if '::' not in config.reference:
        return None
    with warnings.catch_warnings():
        # Entries of other models without a config.
        warnings.simplefilter('ignore')
        try:
            cfg = get_config(config.reference, pretrained=True)
        # mmengine asserts that the entry has weights.
        except AssertionError:
            return None
    return cfg.get('model_path')


def class_names(config: HostConfig) -> tuple[str, ...] | None:
    """Class names of the training data of a config.

    Returns:
        None if neither the config nor the class of its data set has them.
    """
    loader = config.cfg.get('train_dataloader')
    for dataset in _datasets(loader.get('dataset') if loader else None):
        metainfo = dataset.get('metainfo')
        if not isinstance(metainfo, Mapping):
            metainfo = {}
        # mmpretrain's data sets also take them as a separate argument.
        found = dataset.get('classes') or metainfo.get('classes')
        if isinstance(found, str):
            return _read_lines(found)
        found = found or _metainfo_of(dataset.get('type'), config.scope).get(
            'classes'
        )
        if isinstance(found, (list, tuple)):
            return tuple(str(name) for name in found)
    return None


def _read_lines(file: str) -> tuple[str, ...] | None:
    """Names in a file, one per line; None if it cannot be read."""
    try:
        return tuple(Path(file).read_text(encoding='utf-8').splitlines())
    except (OSError, UnicodeError):
        return None


def _datasets(node: Any) -> Iterator[Mapping]:
    """Data sets below wrappers, outer ones first."""
    if isinstance(node, Mapping):
        yield node
        for key in ('dataset', 'datasets'):
            yield from _datasets(node.get(key))
    elif isinstance(node, (list, tuple)):
        for part in node:
            yield from _datasets(part)


def _metainfo_of(kind: Any, scope: str | None) -> Mapping:
    if isinstance(kind, str):
        registry = mmengine.registry.DATASETS
        with registry.switch_scope_and_registry(scope) as scoped:
            kind = scoped.get(kind)
    return getattr(kind, 'METAINFO', None) or {}


def crop_size(config: HostConfig) -> int | None:
    """Side of the images that a classifier's pipeline outputs."""
    loader = config.cfg.get('train_dataloader')
    for dataset in _datasets(loader.get('dataset') if loader else None):
        for step in reversed(dataset.get('pipeline') or []):
            kind = str(step.get('type')).rpartition('.')[2]
            if kind in ('RandomResizedCrop', 'RandomCrop', 'Resize'):
                size = step.get('scale', step.get('crop_size'))
                side = size[0] if isinstance(size, (list, tuple)) else size
                if isinstance(side, int) and side > 0:
                    return side
    return None


def image_size(cfg: Config) -> tuple[int, int, str] | None:
    """Size of the images that a config's data pipelines output.

    It is set by the last step that fixes the size, ``Resize`` or a crop, in
    the training pipeline; or, if that has several sizes, in the test
    pipeline. mmdet's ``Resize`` to ``(1333, 800)`` gives an image 1333 wide.

    Returns:
        Height, width, and the data loader that has the pipeline; None if no
        pipeline fixes the size.
    """
    for name in ('train_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        for dataset in _datasets(loader.get('dataset') if loader else None):
            for step in reversed(dataset.get('pipeline') or []):
                size = step.get('scale', step.get('crop_size'))
                kind = str(step.get('type')).rpartition('.')[2]
                if isinstance(size, int):
                    size = (size, size)
                if kind in FIXES_SIZE and _is_size(size):
                    return size[1], size[0], name
    return None


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(side, int) and side > 0 for side in value)
    )
