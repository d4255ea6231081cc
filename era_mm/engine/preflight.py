"""Looks for a run's files before anything is built.

A missing file would otherwise surface minutes later, one at a time, as an
error from deep inside the data loader. Nothing is written here, so a run that
stops has touched nothing.
"""

import difflib
import inspect
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mmengine.registry
from mmengine.config import Config

from era_mm.core.teacher import RANDOM
from era_mm.engine.config_check import own_classes
from era_mm.errors import UserError
from era_mm.hooks import ModesHook
from era_mm.hosts import shipped


def find_config(name: str | Path, role: str = 'config') -> str:
    """The path of a config, given a path or the base name of one of ours.

    Args:
        name: A path, or a base name with or without ``.py``.
        role: What the message calls it.

    Returns:
        ``name`` itself if it exists, else the config of that name.

    Raises:
        UserError: There is no such file; the nearest names are shown.
    """
    if os.path.isfile(name):
        return str(name)
    folders = config_folders()
    known: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob('*.py')):
            if '_base_' not in path.relative_to(folder).parts:
                known.setdefault(path.stem, path)
    stem = Path(name).stem
    if stem in known:
        print(f'{name} is not a file; using {known[stem]}.')
        return str(known[stem])
    hint = _nearest(Path(name), known)
    looked = '\n'.join(f'  {folder}' for folder in folders)
    raise UserError(
        f'{role}: expected the path or the base name of a config, but '
        f'{str(name)!r} is '
        + ('a folder' if os.path.isdir(name) else 'neither')
        + f'. Looked in\n  {Path(name).resolve()}\n{looked}\n{hint}'
    )


def _nearest(name: Path, known: Mapping[str, Path]) -> str:
    """Suggestions for a name that is not a config."""
    host, colon, inside = str(name).partition(':')
    # A single letter is a drive.
    if colon and len(host) > 1 and host.isidentifier():
        return f'A config of a host is written {host}::{inside}.'
    # The user's own come first.
    folder = name if name.is_dir() else name.parent
    beside = {path.stem: path for path in sorted(folder.glob('*.py'))}
    near = [
        files[stem]
        for files, cutoff in ((beside, 0.6), (known, 0.4))
        for stem in difflib.get_close_matches(
            name.stem, files, n=3, cutoff=cutoff
        )
    ] or [*beside.values(), *known.values()][:3]
    return '\n'.join(['Nearest names:', *(f'  {path}' for path in near[:4])])


def config_folders() -> list[Path]:
    """Where configs are looked up by name, the user's own first.

    Then those of an installed wheel, or of a checkout.
    """
    own = shipped('era_mm', 'configs')
    return list(dict.fromkeys([Path('configs').resolve(), *own]))


def check_checkpoints(cfg: Config, training: bool = True) -> None:
    """Stop if the config names a local path that is not a checkpoint.

    Checks every ``checkpoint`` entry below ``model`` (teacher weights,
    ``init_cfg``) and ``load_from``, which ``--resume`` and the checkpoint
    argument of ``test`` set. A teacher's 'random' is not a path.

    Args:
        cfg: A whole config.
        training: Whether the run trains. A test reads only ``load_from``, and
            a teacher's weights if modes that may use them are asked for.

    Raises:
        UserError: Files are missing, truncated or not checkpoints; the
            message lists all of them.
    """
    model = _as_dict(cfg.get('model'))
    wanted: list[tuple[str, Any]] = []
    if training:
        wanted += _find_entries(model, 'checkpoint', 'model')
    elif _asks_for_modes(cfg):
        teacher = model.get('teacher')
        wanted += _find_entries(teacher, 'checkpoint', 'model.teacher')
    wanted.append(('load_from', cfg.get('load_from')))
    faults = [
        f'  {key} = {value!r}: {fault}'
        for key, value in wanted
        # A teacher loads its own checkpoint, not that of its `init_cfg`.
        if not (key.startswith('model.teacher.') and '.config.' in key)
        and (fault := find_fault_among(value))
    ]
    if faults:
        raise UserError(
            'expected a whole checkpoint file, but found none for\n'
            + '\n'.join(faults)
            + '\nWhat to do: correct the path (it is relative to the folder '
            'the command runs in), give a URL, or train that model first.'
        )


def _asks_for_modes(cfg: Config) -> bool:
    """Whether predictions other than the student's own are asked for."""
    if _as_dict(cfg.get('model')).get('inference_mode') not in (None, 'S'):
        return True
    for hook in map(_as_dict, cfg.get('custom_hooks') or []):
        name = str(hook.get('type')).rpartition('.')[2]
        cls = own_classes().get(f'era_mm.{name}', object)
        if issubclass(cls, ModesHook):
            parameters = inspect.signature(cls).parameters
            modes = hook.get('modes', parameters['modes'].default)
            if modes is inspect.Parameter.empty or set(modes) - {'S'}:
                return True
    return False


def find_fault_among(value: Any) -> str:
    """Why an entry, a place or a list of them, has no checkpoint; or ''."""
    places = value if isinstance(value, list | tuple) else [value]
    faults = [
        _find_fault(Path(place))
        if _is_local(place) and place != RANDOM
        else ''
        for place in places
    ]
    return '; '.join(faults) if all(faults) else ''


def _find_fault(checkpoint: Path) -> str:
    """What is wrong with a file, judged by its first and last bytes."""
    if not checkpoint.is_file():
        return f'there is no file {checkpoint.resolve()}'
    with open(checkpoint, 'rb') as file:
        start = file.read(2)
    # torch writes zip archives, whose index is at the end; before version
    # 1.6 it wrote pickles.
    if start == b'PK' and not _has_index(checkpoint):
        return 'the file is cut off (copy or download it again)'
    if start != b'PK' and not start.startswith(b'\x80'):
        return 'the file is not a checkpoint'
    return ''


def _has_index(archive: Path) -> bool:
    try:
        return zipfile.is_zipfile(archive)
    except zipfile.BadZipFile:
        # It has an index, but a damaged one.
        return False


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Stop if data that the run reads is missing.

    Checks the annotation files and image folders of the data loaders, inside
    any dataset wrapper, and the annotation files of the evaluators. Remote
    data (``backend_args``) and data sets that download themselves are skipped.

    Args:
        cfg: A whole config.
        splits: Which of ``train``, ``val`` and ``test`` will be used.

    Raises:
        UserError: Data is missing; the message lists all of it, and how to
            get it.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    missing: list[str] = []
    ways: dict[str, None] = {}
    for split in splits:
        found = [
            *_find_missing(
                _as_dict(cfg.get(f'{split}_dataloader')).get('dataset'),
                f'{split}_dataloader.dataset',
                scope,
            ),
            *_find_missing_annotations(
                cfg.get(f'{split}_evaluator'), f'{split}_evaluator'
            ),
        ]
        for key, path, kind in found:
            ways[_way_to_get(kind, path)] = None
            line = f'  {key}: {path}'
            if line not in missing:
                missing.append(line)
    if missing:
        raise UserError(
            'expected the data that the config names, but these do not '
            f'exist (looked from {Path.cwd()}):\n'
            + '\n'.join(missing)
            + '\nWhat to do: '
            + ''.join(ways)
            + 'set the path of your data with --cfg-options, e.g. '
            'train_dataloader.dataset.data_root=/path/to/data '
            "(val and test likewise, and the evaluators' ann_file)."
        )


def _way_to_get(kind: Any, path: str) -> str:
    """How to get a data set; empty where it is not known."""
    for name in ('digit_scenes', 'digit_crops', 'letter_scenes'):
        if name in path:
            return f'make it with\n  python tools/make_{name}.py\nor '
    if 'coco' in f'{kind}{path}'.lower():
        return _COCO_HELP.format(script=_download_script())
    return ''


_COCO_HELP = """get COCO 2017 with
  python {script} --dataset-name coco2017 --save-dir data/coco --unzip
so that data/coco has annotations/, train2017/ and val2017/; or link a copy
you have to data/coco; or """


def _download_script() -> str:
    inside = ('tools', 'misc', 'download_dataset.py')
    found = shipped('mmdet', *inside)
    return str(found[0] if found else Path(*inside))


def _find_entries(node: Any, name: str, key: str) -> Iterator[tuple[str, Any]]:
    """All ``(dotted key, value)`` in a config tree whose last part is name."""
    if isinstance(node, dict):
        for part, value in node.items():
            if part == name:
                yield f'{key}.{part}', value
            yield from _find_entries(value, name, f'{key}.{part}')
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _find_entries(value, name, f'{key}[{index}]')


def _find_missing(
    dataset: Any, key: str, scope: str
) -> Iterator[tuple[str, str, str]]:
    """Yields ``(config key, path, data set type)`` of what is missing."""
    if isinstance(dataset, list | tuple):
        for index, part in enumerate(dataset):
            yield from _find_missing(part, f'{key}[{index}]', scope)
        return
    if not isinstance(dataset, dict):
        return
    for inner in ('dataset', 'datasets'):
        if inner in dataset:
            yield from _find_missing(dataset[inner], f'{key}.{inner}', scope)
    kind = dataset.get('type', '')
    if _is_remote(dataset):
        return
    missing = list(_find_missing_files(dataset, key))
    # Only now, because looking the type up imports the host.
    if missing and not _downloads_itself(kind, scope):
        name = str(getattr(kind, '__name__', kind))
        for dotted, path in missing:
            yield dotted, path, name


def _find_missing_files(dataset: dict, key: str) -> Iterator[tuple[str, str]]:
    root = dataset.get('data_root') or ''
    annotations = dataset.get('ann_file') or ''
    if _is_local(annotations):
        path = os.path.join(root, annotations)
        if not os.path.isfile(path):
            yield f'{key}.ann_file', path
    prefix = dataset.get('data_prefix', {})
    prefixes = prefix if isinstance(prefix, dict) else {'': prefix}
    for name, folder in prefixes.items():
        if not isinstance(folder, str) or '://' in folder:
            continue
        path = os.path.join(root, folder)
        if path and not os.path.isdir(path):
            dotted = f'{key}.data_prefix.{name}'.rstrip('.')
            yield dotted, path


def _find_missing_annotations(
    evaluator: Any, key: str
) -> Iterator[tuple[str, str, str]]:
    for dotted, value in _find_entries(evaluator, 'ann_file', key):
        if _is_local(value) and not os.path.isfile(value):
            yield dotted, value, ''


def _as_dict(node: Any) -> dict:
    return node if isinstance(node, dict) else {}


def _is_local(value: Any) -> bool:
    return isinstance(value, str) and value != '' and '://' not in value


def _is_remote(dataset: dict) -> bool:
    backend = _as_dict(
        dataset.get('backend_args') or dataset.get('file_client_args')
    ).get('backend', 'local')
    return backend not in ('local', 'disk')


def _downloads_itself(kind: Any, scope: str) -> bool:
    if isinstance(kind, str):
        registry = mmengine.registry.DATASETS
        with registry.switch_scope_and_registry(scope) as scoped:
            kind = scoped.get(kind)
    if not inspect.isclass(kind):
        return False
    signatures = (
        inspect.signature(vars(base)['__init__'])
        for base in kind.__mro__
        if '__init__' in vars(base) and base is not object
    )
    return any('download' in known.parameters for known in signatures)
