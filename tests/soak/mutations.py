"""What soak.py does to configs, files and machines."""

import contextlib
import copy
import inspect
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from toys import Toy, methods

from era_mm.core import Distillation, LossSchedule, Teacher
from era_mm.core.safe_files import load_file
from era_mm.engine import whole_files
from era_mm.engine.finite_hook import FiniteHook
from era_mm.engine.preflight_hook import PreflightHook
from era_mm.methods.era import TWIHook

#: What values are replaced by.
WRONG = (
    -1,
    0,
    3,
    float('nan'),
    float('inf'),
    None,
    'no',
    '1',
    [],
    {},
    'ST',
    True,
)


# -- configs -----------------------------------------------------------------


def _leaves(node: Any, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, (*path, key))
    elif path:
        yield path


def _misspell(key: str, chance: random.Random) -> str:
    if len(key) > 3:
        at = chance.randrange(len(key) - 1)
        wrong = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
        if wrong != key:
            return wrong
    return f'{key}x'


def mutate_host(config: dict, chance: random.Random) -> str:
    """Change a value or a key that belongs to the hosts; say what."""
    starts = [
        ('model', 'student'),
        ('model', 'teacher', 'config'),
        ('optim_wrapper',),
        ('train_dataloader',),
        ('train_cfg',),
        ('randomness',),
    ]
    start = chance.choice(
        [s for s in starts if s[1:2] != ('teacher',) or _has_teacher(config)]
    )
    node: Any = config
    for key in start:
        node = node[key]
    *way, last = chance.choice(list(_leaves(node)))
    for key in way:
        node = node[key]
    return _change(node, last, '.'.join(map(str, (*start, *way))), chance)


def _has_teacher(config: dict) -> bool:
    return 'teacher' in config['model']


def mutate_ours(
    config: dict, name: str, chance: random.Random
) -> tuple[str, bool]:
    """Change a value or a key of ours; say what, and if it is wrong for sure.

    Drawn from the signatures, so keys that the config lacks are set, too.
    """
    model = config['model']
    distiller = model['distiller']
    places: list[tuple[str, dict, Callable]] = [
        ('model', model, Distillation),
        ('model.distiller', distiller, methods()[name]),
        ('model.distiller', distiller, methods()[name]),
    ]
    if _has_teacher(config):
        places.append(('model.teacher', model['teacher'], Teacher))
    schedules = distiller.get('schedules') or {}
    for key, value in schedules.items():
        places.append((f'schedules.{key}', value, LossSchedule))
    for key, cls in (
        ('preflight', PreflightHook),
        ('check_finite', FiniteHook),
    ):
        config[key] = {}
        places.append((key, config[key], cls))
    if name == 'ERADistiller':
        hook = dict(type='era_mm.TWIHook')
        config['custom_hooks'] = [hook]
        places += [('custom_hooks[0]', hook, TWIHook)]
        places += [
            (f'model.distiller.{part}', distiller[part], dict)
            for part in ('loss', 'mbrnet')
            if isinstance(distiller.get(part), dict)
        ]
    where, node, cls = chance.choice(places)
    if cls is dict:
        names, defaults = sorted(node), dict(node)
    else:
        parameters = inspect.signature(cls).parameters
        names = list(parameters)
        defaults = {
            key: parameter.default for key, parameter in parameters.items()
        }
    key = chance.choice(names)
    default = defaults[key]
    said = _change(node, key, where, chance)
    if key not in node:
        return said, True
    value = node[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    wrong = (number and value in (float('inf'),)) or value != value
    if isinstance(default, bool | int | float):
        wrong = wrong or isinstance(value, str | list | dict)
    if number and value == -1 and 'weight' in key:
        wrong = True
    return said, wrong


def _change(node: Any, key: Any, where: str, chance: random.Random) -> str:
    """Misspell a key or replace its value; said in words."""
    if chance.random() < 0.25 and isinstance(key, str):
        wrong = _misspell(key, chance)
        node[wrong] = node.pop(key, 1)
        return f'{where}.{key} misspelt {wrong}'
    node[key] = copy.deepcopy(chance.choice(WRONG))
    return f'{where}.{key}={node[key]!r}'


# -- files -------------------------------------------------------------------


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path, way: str) -> None:
        self.mark, self.way = mark, way

    def __reduce__(self) -> tuple:
        if self.way == 'system':
            return (os.system, (f'touch {self.mark}',))
        return (eval, (f"open({str(self.mark)!r}, 'w').close()",))


def mutate_file(
    whole: Path, target: Path, mark: Path, chance: random.Random
) -> str:
    """Write a damaged or harmful copy of a checkpoint; say what was done."""
    kind = chance.choice(['cut', 'bytes', 'entry', 'harm'])
    data = bytearray(whole.read_bytes())
    if kind == 'cut':
        target.write_bytes(data[: chance.randrange(len(data))])
    elif kind == 'bytes':
        for _ in range(chance.choice([1, 20, 500])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        target.write_bytes(data)
    else:
        content = load_file(whole)
        holder = chance.choice(
            [content, content['meta'], content['optimizer']]
        )
        key = chance.choice(list(holder))
        if kind == 'harm':
            holder[key] = Harm(mark, chance.choice(['system', 'eval']))
        else:
            holder[key] = chance.choice([None, 3, 'x', {}, [], float('nan')])
        torch.save(content, target, pickle_protocol=chance.choice([2, 3]))
        return f'{kind} {key}'
    return kind


# -- faults ------------------------------------------------------------------

#: A fault: changes a config and a folder of the toy's data in place, and
#: returns what holds while the run lasts.
Fault = Callable[[dict, Path], contextlib.AbstractContextManager]


def _images(config: dict, folder: Path) -> list[Path]:
    """A copy of the images, which a fault may spoil."""
    dataset = config['train_dataloader']['dataset']
    copied = folder / 'images'
    for file in Path(dataset['data_root']).rglob('*.png'):
        target = copied / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    for loader in ('train_dataloader', 'val_dataloader'):
        config[loader]['dataset']['data_root'] = str(copied)
    return sorted(copied.rglob('*.png'))


def half_an_image(config: dict, folder: Path) -> Any:
    """A file that ends too early."""
    file = _images(config, folder)[0]
    file.write_bytes(file.read_bytes()[:300])
    return contextlib.nullcontext()


def empty_image(config: dict, folder: Path) -> Any:
    """A file of no bytes, read by a worker."""
    _images(config, folder)[0].write_bytes(b'')
    config['train_dataloader']['num_workers'] = 1
    return contextlib.nullcontext()


def folders_without_files(config: dict, folder: Path) -> Any:
    """Folders without images."""
    for file in _images(config, folder):
        file.unlink()
    return contextlib.nullcontext()


def no_data(config: dict, folder: Path) -> Any:
    """A folder that is not there."""
    config['train_dataloader']['dataset']['data_root'] = str(folder / 'none')
    return contextlib.nullcontext()


def no_teacher(config: dict, folder: Path) -> Any:
    """A teacher's file that is not there."""
    config['model']['teacher']['checkpoint'] = str(folder / 'none.pth')
    return contextlib.nullcontext()


def folder_for_teacher(config: dict, folder: Path) -> Any:
    """A teacher's file that is a folder."""
    config['model']['teacher']['checkpoint'] = str(folder)
    return contextlib.nullcontext()


def text_for_teacher(config: dict, folder: Path) -> Any:
    """A teacher's file that is a web page."""
    file = folder / 'page.pth'
    file.write_text('<html>404</html>')
    config['model']['teacher']['checkpoint'] = str(file)
    return contextlib.nullcontext()


def no_numbers(config: dict, folder: Path) -> Any:
    """A learning rate at which the losses are no numbers."""
    config['optim_wrapper'] = dict(
        type='OptimWrapper', optimizer=dict(type='SGD', lr=1e30)
    )
    config['train_cfg']['max_epochs'] = 6
    return contextlib.nullcontext()


def full_disk(config: dict, folder: Path) -> Any:
    """A disk that takes nothing after the first checkpoint."""
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if 'epoch_2' in os.readlink(f'/proc/self/fd/{descriptor}'):
            raise OSError(28, 'No space left on device')
        fsync(descriptor)

    return mock.patch.object(whole_files.os, 'fsync', full)


def read_only_disk(config: dict, folder: Path) -> Any:
    """A disk that takes nothing at all."""

    def refuse(descriptor: int) -> None:
        raise OSError(30, 'Read-only file system')

    return mock.patch.object(whole_files.os, 'fsync', refuse)


def no_module(config: dict, folder: Path) -> Any:
    """A package that is not installed."""
    config['custom_imports'] = dict(imports=['not_installed_anywhere'])
    return contextlib.nullcontext()


def dead_worker(config: dict, folder: Path) -> Any:
    """A data worker that the system kills."""
    dataset = config['train_dataloader']['dataset']
    config['train_dataloader']['num_workers'] = 1
    config['custom_imports'] = dict(imports=['soak_killer'])
    (folder / 'soak_killer.py').write_text(
        'import os, signal\n'
        'from mmengine.registry import TRANSFORMS\n'
        '@TRANSFORMS.register_module(force=True)\n'
        'class KillsItsProcess:\n'
        '    def __call__(self, results):\n'
        '        os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    dataset['pipeline'].insert(0, dict(type='KillsItsProcess'))
    return mock.patch('sys.path', [str(folder), *__import__('sys').path])


FAULTS: tuple[Fault, ...] = (
    half_an_image,
    empty_image,
    folders_without_files,
    no_data,
    no_teacher,
    folder_for_teacher,
    text_for_teacher,
    no_numbers,
    full_disk,
    read_only_disk,
    no_module,
    dead_worker,
)


def base_for(toy: Toy, chance: random.Random, ours: bool) -> tuple[dict, str]:
    """A run to mutate, and the method in it."""
    if not ours or chance.random() < 0.3:
        return copy.deepcopy(toy.config), 'ERADistiller'
    name = chance.choice(sorted(methods()))
    return toy.base_of(name), name
