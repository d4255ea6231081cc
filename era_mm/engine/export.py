"""Exports the student of a distillation as a config and a checkpoint."""

import copy
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from era_mm.core import (
    BaseDistiller,
    Distillation,
    HostModel,
    distillation_kind,
    extras_of,
    load_strictly,
    student_config_of,
    students_of,
)
from era_mm.core.checkpoint import read_with_meta
from era_mm.core.host_models import image_channels, whole_model
from era_mm.errors import UserError


class Exported(NamedTuple):
    """An exported model.

    Args:
        config: Path of the config.
        checkpoint: Path of the weights.
        model: The model built from them.
        needs_era_mm: Keys of the config that name types of era_mm; none for
            a model that the stock host loads.
    """

    config: Path
    checkpoint: Path
    model: nn.Module
    needs_era_mm: tuple[str, ...]


def export_student(
    cfg: Config,
    checkpoint: str,
    prefix: str,
    *,
    mode: str = 'S',
    distiller: str | None = None,
    keep_align: bool = False,
    student: str | None = None,
) -> Exported:
    """Write ``prefix.py`` and ``prefix.pth``, an ordinary host model.

    The config is the run's own, with data and schedule, and the plain model
    instead of the distillation. Before the files get their names, they are
    read back as a stock host reads them. A failed export leaves no files.

    Args:
        cfg: Config of the distillation.
        checkpoint: Path or URL of a checkpoint of its training.
        prefix: Path to write to, without extension.
        mode: 'S', the student alone; or a mode that a distiller exports.
        distiller: Name of the distiller, if several offer the mode.
        keep_align: An option of ``era_mm.methods.era.export``.
        student: Name of the student of a ``MutualDistillation``.

    Raises:
        UserError: Not a distillation, no such mode or student, a plain
            student's checkpoint for a mode other than S, or files that exist
            already.
    """
    targets = [Path(f'{prefix}.py'), Path(f'{prefix}.pth')]
    if _kind(cfg) == 'MutualDistillation' or student is not None:
        _check_student(cfg, mode, student)
        cfg = _of_one_student(cfg, student)
    _check_request(cfg, targets, mode, distiller, keep_align)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        student_config, scope = _student_config(cfg)
    scope = cfg.get('default_scope') or scope
    state_dict, meta = read_with_meta(checkpoint)
    if student is not None:
        state_dict = _weights_of(state_dict, student, checkpoint)
    with DefaultScope.overwrite_default_scope(scope):
        if mode == 'S':
            exported = HostModel(student_config, _build(student_config))
            load_strictly(exported.module, state_dict, name=checkpoint)
        else:
            exported = _export_mode(
                cfg,
                state_dict,
                mode,
                student_config=student_config,
                checkpoint=checkpoint,
                distiller=distiller,
                keep_align=keep_align,
            )
    plain = _plain_config(cfg, exported.config, scope)
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that renaming moves no bytes and cannot stop
    # halfway.
    with tempfile.TemporaryDirectory(
        dir=targets[0].parent, prefix='.export-'
    ) as folder:
        parts = [Path(folder, target.name) for target in targets]
        plain.dump(parts[0])
        torch.save(
            {
                'meta': {**meta, 'cfg': parts[0].read_text()},
                'state_dict': exported.module.state_dict(),
            },
            parts[1],
        )
        _read_back(*parts)
        for part, target in zip(parts, targets, strict=True):
            os.replace(part, target)
    return Exported(
        config=targets[0],
        checkpoint=targets[1],
        model=exported.module,
        needs_era_mm=tuple(_types_of_ours(plain.to_dict())),
    )


def _check_request(
    cfg: Config,
    targets: list[Path],
    mode: str,
    distiller: str | None,
    keep_align: bool,
) -> None:
    if keep_align and mode == 'S':
        raise UserError(
            '--keep-align: mode S is the student alone and has no align '
            'layer. Omit it.'
        )
    if distiller is not None and mode == 'S':
        raise UserError(
            '--distiller: mode S is the student alone and needs no distiller. '
            'Omit it.'
        )
    if targets[0].stem.endswith(('.py', '.pth')):
        raise UserError(
            f'--out: expected a path without extension, but got '
            f'{str(targets[0].with_suffix(""))!r}: .py and .pth are added.'
        )
    for target in targets:
        if target.exists():
            raise UserError(
                f'--out: {target} exists already. Choose another name, or '
                'remove it.'
            )
    if _kind(cfg) != 'Distillation':
        raise UserError(
            'config: expected one whose model is era_mm.Distillation, but '
            f'{cfg.filename} has {cfg.get("model", {}).get("type")}. A plain '
            'model needs no export; give the config that the distillation '
            'was trained with.'
        )


def _kind(cfg: Config) -> str | None:
    return distillation_kind(cfg.get('model', {}))


def _check_student(cfg: Config, mode: str, student: str | None) -> None:
    if _kind(cfg) != 'MutualDistillation':
        raise UserError(
            '--student: it chooses one of the two of an '
            f'era_mm.MutualDistillation, but {cfg.filename} has '
            f'{cfg.get("model", {}).get("type")}. Omit it.'
        )
    if student not in cfg.model.students:
        raise UserError(
            f'--student: expected one of {list(cfg.model.students)}, but got '
            f'{student!r}. Two students were trained; name one of them.'
        )
    if mode != 'S':
        raise UserError(
            f"--mode: {mode} needs a teacher's head, but these students only "
            'had each other as teachers. Only S can be exported.'
        )


def _of_one_student(cfg: Config, student: Any) -> Config:
    """A config as if only this student had been distilled."""
    cfg = copy.deepcopy(cfg)
    model = cfg.model
    cfg.model = dict(
        type='era_mm.Distillation', student=model.students[student]
    )
    if model.get('data_preprocessor') is not None:
        cfg.model.data_preprocessor = model.data_preprocessor
    wrapper = cfg.get('optim_wrapper') or {}
    wrapper.pop('constructor', None)
    own = wrapper.get(student) or {}
    for name in model.students:
        wrapper.pop(name, None)
    wrapper.update(own)
    return cfg


def _weights_of(
    state_dict: Mapping, student: str, checkpoint: str
) -> OrderedDict:
    students = students_of(state_dict)
    if student not in students:
        raise UserError(
            f'checkpoint: expected weights of the student {student!r}, but '
            f'{checkpoint!r} has {list(students) or "one plain model"}. Give '
            'config and checkpoint of the same run.'
        )
    return students[student]


def _student_config(cfg: Config) -> tuple[ConfigDict, str | None]:
    config, scope = student_config_of(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        config.setdefault('data_preprocessor', cfg.data_preprocessor)
    return config, scope


def _build(config: ConfigDict) -> nn.Module:
    # Detectors write into the config that they are built from.
    return MODELS.build(copy.deepcopy(config)).eval()


def _export_mode(
    cfg: Config,
    state_dict: Mapping,
    mode: str,
    *,
    student_config: ConfigDict,
    checkpoint: str,
    distiller: str | None,
    keep_align: bool,
) -> HostModel:
    extras = extras_of(state_dict)
    if extras is None:
        raise UserError(
            f'checkpoint: {mode} needs the trained modules of the '
            f'distillation, but {checkpoint!r} holds only a plain student. '
            'Give a checkpoint of the training '
            '(epoch_*.pth, iter_*.pth, best_*.pth).'
        )
    model: Distillation = MODELS.build(whole_model(cfg))
    name = _choose(model, mode, distiller)
    method: BaseDistiller = model.distillers[name]
    if extras.get(name, {}).get('type') != type(method).__name__:
        found = {key: entry['type'] for key, entry in extras.items()}
        raise UserError(
            f'checkpoint: expected extras of distiller {name!r} '
            f'({type(method).__name__}), but {checkpoint!r} has {found}. '
            'Give config and checkpoint of the same run.'
        )
    teacher = model.teachers[method.teacher]
    if teacher.is_random and 'teacher' not in extras[name]:
        raise UserError(
            f"{mode} needs the teacher's head, but the {teacher.name} is "
            "'random', so it differs in every run, and the file has no head. "
            'Set its `checkpoint`.'
        )
    load_strictly(model, state_dict, name=checkpoint)
    teacher.load()
    model.eval()
    height, width = model.wiring.input_size
    generator = torch.Generator().manual_seed(0)
    return method.export(
        mode,
        student=HostModel(student_config, model.student),
        teacher=HostModel(teacher.config, teacher.model),
        inputs=torch.randn(
            2,
            image_channels(model.student),
            height,
            width,
            generator=generator,
        ),
        **({'keep_align': True} if keep_align else {}),
    )


def _choose(model: Distillation, mode: str, wanted: str | None) -> str:
    """Name of the distiller that offers the mode."""
    names = list(model.distillers)
    if wanted is not None and wanted not in names:
        raise UserError(
            f'--distiller: expected one of {names}, but got {wanted!r}.'
        )
    offering = [
        name
        for name in names
        if mode in model.distillers[name].inference_modes()
    ]
    chosen = offering if wanted is None else [wanted]
    if len(chosen) > 1:
        raise UserError(
            f'--distiller: {offering} all offer {mode}. Name one of them.'
        )
    if not set(chosen) & set(offering):
        kinds = [
            f'{name!r} ({type(model.distillers[name]).__name__})'
            for name in chosen or names
        ]
        offered = [
            known
            for name in chosen or names
            for known in model.distillers[name].inference_modes()
        ]
        raise UserError(
            f'--mode: {", ".join(kinds) or "a run without distiller"} does '
            f'not offer {mode}, but {", ".join(offered) or "no mode"}. S can '
            'be exported in any case.'
        )
    return chosen[0]


def _plain_config(cfg: Config, model: ConfigDict, scope: str | None) -> Config:
    """The run's config with the plain model."""
    plain = cfg.to_dict()
    plain['model'] = model.to_dict()
    plain['default_scope'] = scope
    # Settings of the distillation run.
    for key in ('work_dir', 'load_from', 'resume', 'launcher'):
        plain.pop(key, None)
    hooks = [
        # The hosts' hook averages the plain student.
        dict(h, type='EMAHook')
        if _ours(h) and h['type'] == 'era_mm.EMAHook'
        else h
        for h in plain.pop('custom_hooks', None) or []
    ]
    hooks = [h for h in hooks if not _ours(h)]
    if hooks:
        plain['custom_hooks'] = hooks
    # A dumped config may hold settings from the command line.
    if _ours(plain.get('model_wrapper_cfg')):
        del plain['model_wrapper_cfg']
    wrapper = plain.get('optim_wrapper') or {}
    if wrapper.get('type') == 'CPUAmpOptimWrapper':
        wrapper['type'] = 'OptimWrapper'
    modules = [m for m in _imports(cfg) if m.partition('.')[0] != 'era_mm']
    if any(_types_of_ours(plain)):
        modules.append('era_mm')
    plain.pop('custom_imports', None)
    if modules:
        plain['custom_imports'] = dict(
            imports=modules, allow_failed_imports=False
        )
    return Config(plain)


def _imports(cfg: Config) -> list[str]:
    """Imports of the config and of the configs that it refers to."""
    teacher = cfg.model.get('teacher') or {}
    entries = [teacher] if 'config' in teacher else list(teacher.values())
    files = [cfg.model.student, *(entry['config'] for entry in entries)]
    configs = [cfg] + [
        Config.fromfile(file)
        for file in files
        if isinstance(file, str) and '::' not in file
    ]
    modules: list[str] = []
    for config in configs:
        found = (config.get('custom_imports') or {}).get('imports', [])
        modules += [found] if isinstance(found, str) else found
    return list(dict.fromkeys(modules))


def _ours(entry: Any) -> bool:
    return isinstance(entry, dict) and str(entry.get('type')).startswith(
        'era_mm.'
    )


def _types_of_ours(node: Any, key: str = '') -> Iterator[str]:
    """Dotted keys of the entries whose type is one of era_mm's."""
    if isinstance(node, dict):
        if _ours(node):
            yield key
        for part, value in node.items():
            yield from _types_of_ours(value, f'{key}.{part}'.lstrip('.'))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _types_of_ours(value, f'{key}[{index}]')


def _read_back(config: Path, checkpoint: Path) -> None:
    """Build and load from the files, or fail."""
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        model = _build(cfg.model)
    state_dict, _ = read_with_meta(str(checkpoint))
    load_strictly(model, state_dict, name=str(checkpoint))
