"""Writes the config of a distillation for two existing configs."""

import importlib
import os
import pkgutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import era_mm.methods
from era_mm.core import (
    BaseDistiller,
    Distillation,
    MeasuredPair,
    Plan,
    distillation_kind,
)
from era_mm.core.host_models import whole_model
from era_mm.core.teacher import RANDOM
from era_mm.core.utils import preserve_rng
from era_mm.engine.host_configs import (
    HostConfig,
    class_names,
    crop_size,
    published_checkpoint,
    read_host_config,
)
from era_mm.engine.make_config_report import Made, match_of, report
from era_mm.engine.measure import Member
from era_mm.engine.pairing import Pair
from era_mm.engine.preflight import check_checkpoints, find_fault_among
from era_mm.errors import UserError

LINE_LENGTH = 79
#: Methods of two students, with configs to copy: of classifiers, of detectors.
MUTUAL = {
    'dml': (
        'dml_resnet18w8_resnet18w8_digit_crops',
        'dml_retinanet_r18w16_r18w16_digits',
    ),
    'ie_dml': (
        'ie_dml_resnet18w8_resnet18w8_digit_crops',
        'ie_dml_retinanet_r18w16_r18w16_digits',
    ),
}
#: What plans a method for a pair.
Planner = Callable[[MeasuredPair], Plan]


class Draft(NamedTuple):
    """Everything that a config is written from.

    Args:
        student: The student's whole config.
        teacher: The teacher's whole config.
        teacher_checkpoint: The teacher's weights.
        student_checkpoint: Weights that the student starts from, if any.
        plans: Each method's plan for the pair, by method.
        input_size: Side of the image of the dry run.
    """

    student: HostConfig
    teacher: HostConfig
    teacher_checkpoint: str
    student_checkpoint: str | None
    plans: dict[str, Plan]
    input_size: int


class Code(str):
    """Text that is written without quotes."""

    __repr__ = str.__str__


def methods() -> dict[str, Planner]:
    """What plans the methods that learn from a teacher, by name.

    The name is the module's, or the class's if a module has several; a
    method's ``recipes`` have their own.
    """
    found: dict[str, Planner] = {}
    for info in pkgutil.iter_modules(era_mm.methods.__path__):
        module = importlib.import_module(f'era_mm.methods.{info.name}')
        classes = [
            cls
            for cls in vars(module).values()
            if isinstance(cls, type)
            and issubclass(cls, BaseDistiller)
            and cls.needs_teacher
            and cls.__module__.startswith(module.__name__)
        ]
        for cls in classes:
            name = info.name if len(classes) == 1 else cls.__name__
            found[name] = cls.plan_for
            found |= cls.recipes()
    return found


def find_methods(names: Sequence[str]) -> dict[str, Planner]:
    """Some of :func:`methods`, by name.

    Raises:
        UserError: A name is unknown, given twice, or a method without
            teacher.
    """
    known = methods()
    for name in names:
        if name in MUTUAL:
            classifiers, detectors = MUTUAL[name]
            raise UserError(
                f'--method: expected a method with a teacher, but {name!r} '
                'has two students that teach each other. Copy the config '
                f'{classifiers} for classifiers, or {detectors} for '
                'detectors, and set its `students`.'
            )
        if name not in known:
            raise UserError(
                f'--method: expected one of {", ".join(sorted(known))}, but '
                f'got {name!r}.'
            )
    if len(set(names)) < len(names):
        raise UserError(
            '--method: expected each method once, but got '
            f'{", ".join(names)}. Write two distillers of the same method '
            'by hand.'
        )
    return {name: known[name] for name in names}


def pair_of(student: HostConfig, teacher: HostConfig) -> Pair:
    """Build both models of two configs and run them on one image.

    Raises:
        UserError: One cannot be built or run, or they are of different kinds.
    """
    first, second = (
        Member(
            role=role,
            name=config.reference,
            config=config.model,
            scope=config.scope,
            classes=class_names(config),
        )
        for role, config in (('student', student), ('teacher', teacher))
    )
    crop = crop_size(student) if first.kind == 'classifier' else None
    return Pair(first, second, input_sizes=[crop] if crop else None)


def make_config(
    student: HostConfig,
    teacher: HostConfig,
    *,
    method: str | Sequence[str] = 'era',
    teacher_checkpoint: str,
    student_checkpoint: str | None = None,
) -> Made:
    """The config that distils the teacher into the student.

    Its model is built once as a trial, so that a pair that does not fit is
    refused.

    Args:
        student: The student's whole config; it gives data, schedule and
            hooks.
        teacher: The teacher's whole config.
        method: One of :func:`methods`, or several to be used together.
        teacher_checkpoint: Path or URL of the teacher's weights, or 'random'.
        student_checkpoint: Weights the student starts from.

    Raises:
        UserError: The pair cannot be matched; the message says why.
    """
    check_student(student)
    chosen = find_methods([method] if isinstance(method, str) else method)
    pair = pair_of(student, teacher)
    try:
        with preserve_rng():
            plans = {name: plan(pair) for name, plan in chosen.items()}
    except UserError:
        # Of the pair, which names the model that is at fault.
        raise
    except ValueError as error:
        raise UserError(f'--method: {error}') from error
    _check_different(plans)
    for plan in plans.values():
        pair.check_training(match_of(plan))
    draft = Draft(
        student=student,
        teacher=teacher,
        teacher_checkpoint=teacher_checkpoint,
        student_checkpoint=student_checkpoint,
        plans=plans,
        input_size=pair.input_size,
    )
    model = _build(_text(draft, {}), student)
    modes: dict[str, list[str]] = {}
    for plan, (name, distiller) in zip(
        plans.values(), model.distillers.items(), strict=True
    ):
        # As the model names them.
        prefix = f'{name}.' if len(plans) > 1 else ''
        names = {m: f'{prefix}{m}' for m in distiller.inference_modes()}
        names['S'] = 'S'
        offered = [names[mode] for mode in plan.modes if mode in names]
        if offered:
            modes.setdefault(plan.hook, []).extend(offered)
    return Made(_text(draft, modes), pair, plans, model)


def _check_different(plans: Mapping[str, Plan]) -> None:
    kinds: dict[str, str] = {}
    for name, plan in plans.items():
        kind = plan.distiller['type']
        if kind in kinds:
            raise UserError(
                f'--method: expected different methods, but {kinds[kind]} and '
                f'{name} are both settings of {kind}. Write two distillers of '
                'the same method by hand.'
            )
        kinds[kind] = name


def check_student(student: HostConfig) -> None:
    """Refuse a student whose config cannot be inherited.

    Raises:
        UserError: It is a distillation, or a config that cannot be trained.
    """
    kind = student.cfg.model.get('type')
    if not isinstance(kind, str):
        raise UserError(
            f'--student: {student.reference} is a config of the new style, '
            'with imported classes, which a text config cannot inherit. Give '
            'one of the text style (`_base_ = ...`); the hosts have one for '
            'each.'
        )
    kind = distillation_kind(student.cfg.model)
    if kind is not None:
        raise UserError(
            f'--student: {student.reference} is already a {kind}. Give the '
            'plain config that it inherits from. A distilled checkpoint can '
            'be given as --student-checkpoint.'
        )
    missing = [
        key
        for key in ('train_dataloader', 'train_cfg', 'optim_wrapper')
        if student.cfg.get(key) is None
    ]
    if missing:
        raise UserError(
            f'--student: expected a config that the host can train, but '
            f'{student.reference} has no {", ".join(missing)}. Give one with '
            'data and schedule.'
        )


def _build(text: str, student: HostConfig) -> Distillation:
    """Build the model of a config's text."""
    with tempfile.TemporaryDirectory(prefix='era_mm-') as folder:
        file = Path(folder, 'made.py')
        file.write_text(_filled(text, student, file))
        cfg = Config.fromfile(file)
    check_checkpoints(cfg)
    try:
        with DefaultScope.overwrite_default_scope(student.scope):
            return MODELS.build(whole_model(cfg))
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise UserError(
            f'--method: the pair was matched, but the model cannot be built: '
            f'{error}'
        ) from error


def write_config(made: Made, student: HostConfig, out: str | Path) -> None:
    """Write the file, completely or not at all.

    Raises:
        UserError: It exists already, or cannot be written there.
    """
    out = Path(out)
    check_out(out)
    text = _filled(made.text, student, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Unlike renaming, this replaces nothing, and unlike a link it works
        # on every file system.
        with open(out, 'x', encoding='utf-8') as file:
            try:
                file.write(text)
                file.flush()
            except BaseException:
                out.unlink()
                raise
    except FileExistsError:
        check_out(out)
    except OSError as error:
        raise UserError(
            f'--out: {out} cannot be written: {error.strerror}. Choose '
            'another path.'
        ) from error


def check_out(out: Path) -> None:
    """Refuse an invalid name for a config.

    Raises:
        UserError: The file exists, its name does not end in ``.py``, or its
            folder cannot be written to.
    """
    if out.suffix != '.py':
        raise UserError(
            f'--out: expected a name that ends in .py, but got {str(out)!r}.'
        )
    if out.exists() or out.is_symlink():
        raise UserError(
            f'--out: {out} exists already. Choose another name, or remove it.'
        )
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(
            f'--out: expected a folder that can be written to, but {folder} '
            f'{"cannot" if folder.is_dir() else "is a file"}. Choose another '
            'path.'
        )


def _filled(text: str, student: HostConfig, out: Path) -> str:
    """A config's text with the parts that depend on its path."""
    return text.replace('{base}', _base(student, out)).replace(
        '{work_dir}', repr(f'./work_dirs/{out.stem}')
    )


def _base(student: HostConfig, out: Path) -> str:
    if '::' in student.reference:
        return repr(student.reference)
    return repr(os.path.relpath(student.path, out.resolve().parent))


# -- the text ----------------------------------------------------------------


def _text(draft: Draft, modes: Mapping[str, Sequence[str]]) -> str:
    student, teacher = draft.student, draft.teacher
    distillers = [plan.distiller for plan in draft.plans.values()]
    entries: dict[str, Any] = {'_base_': Code('{base}')}
    imports = student.cfg.get('custom_imports') or {}
    names = [n for n in imports.get('imports', []) if n != 'era_mm']
    entries['custom_imports'] = dict(
        imports=[*names, 'era_mm'], allow_failed_imports=False
    )
    if modes:
        hooks = [dict(type=kind, modes=own) for kind, own in modes.items()]
        entries['custom_hooks'] = (
            [Code('*_base_.custom_hooks'), *hooks]
            if student.cfg.get('custom_hooks')
            else hooks
        )
    if student.cfg.get('work_dir'):
        # The files of a plain run there must not be overwritten.
        entries['work_dir'] = Code('{work_dir}')
    if student.cfg.get('resume'):
        entries['resume'] = False
        entries['load_from'] = None
    if draft.student_checkpoint is not None:
        entries['load_from'] = draft.student_checkpoint
    entries['model'] = dict(
        _delete_=True,
        type='era_mm.Distillation',
        student=Code('_base_.model'),
        teacher=dict(
            config=teacher.reference,
            checkpoint=draft.teacher_checkpoint,
        ),
        distiller=distillers[0]
        if len(distillers) == 1
        else dict(zip(draft.plans, distillers, strict=True)),
        input_size=draft.input_size,
    )
    inherited = [
        name for plan in draft.plans.values() for name in plan.inherit
    ]
    if inherited:
        entries['model']['inherit'] = inherited
    lines = [
        f'# {", ".join(draft.plans)}: {Path(teacher.reference).stem} teaches',
        f'# {Path(student.reference).stem}. Made by tools/make_config.py.',
    ]
    lines += [f'{key} = {_render(v, key)}' for key, v in entries.items()]
    return '\n'.join(lines) + '\n'


def _render(value: Any, name: str = '', indent: int = 0) -> str:
    """A value as Python text, in as few lines as possible."""
    flat = _flat(value)
    if indent + len(name) + len(' = ') + len(flat) < LINE_LENGTH:
        return flat
    inner = ' ' * (indent + 4)
    end = '\n' + ' ' * indent
    if isinstance(value, Mapping):
        body = ''.join(
            f'\n{inner}{key}={_render(item, key, indent + 4)},'
            for key, item in value.items()
        )
        return f'dict({body}{end})'
    if isinstance(value, list):
        body = ''.join(
            f'\n{inner}{_render(item, "", indent + 4)},' for item in value
        )
        return f'[{body}{end}]'
    return flat


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        items = ', '.join(f'{k}={_flat(v)}' for k, v in value.items())
        return f'dict({items})'
    if isinstance(value, list):
        return f'[{", ".join(map(_flat, value))}]'
    return repr(value)


# -- the report --------------------------------------------------------------


# -- the command -------------------------------------------------------------


def run(
    student: str,
    teacher: str,
    *,
    method: str | Sequence[str],
    out: str,
    student_checkpoint: str | None,
    teacher_checkpoint: str | None,
) -> str:
    """Find, pair, try out and write; returns the report.

    Raises:
        UserError: If anything fails; nothing is written then.
    """
    check_out(Path(out))
    find_methods([method] if isinstance(method, str) else method)
    given = read_host_config(student, '--student')
    check_student(given)
    theirs = read_host_config(teacher, '--teacher')
    if given.path == theirs.path:
        raise UserError(
            f"--teacher: {teacher} is the student's own config. A student "
            'learns nothing from a copy of itself; give another model.'
        )
    kind = distillation_kind(theirs.cfg.model)
    if kind is not None:
        raise UserError(
            f'--teacher: {teacher} is a {kind}. Give the plain config of the '
            'model that it trained; its files are plain checkpoints.'
        )
    checkpoint = teacher_checkpoint or published_checkpoint(theirs)
    if checkpoint is None:
        raise UserError(
            f'--teacher-checkpoint: expected the weights of {teacher}, but '
            'its host publishes none. Give the path or URL of its trained '
            'weights.'
        )
    _check_weights(checkpoint, student_checkpoint)
    made = make_config(
        given,
        theirs,
        method=method,
        teacher_checkpoint=checkpoint,
        student_checkpoint=student_checkpoint,
    )
    if _is_file(checkpoint):
        try:
            made.model.load_teachers()
        except ValueError as error:
            raise UserError(f'--teacher-checkpoint: {error}') from error
    write_config(made, given, out)
    return report(made, checkpoint)


def _is_file(checkpoint: str) -> bool:
    return checkpoint != RANDOM and '://' not in checkpoint


def _check_weights(teacher: str, student: str | None) -> None:
    """Refuse files that are no checkpoints, before models are built."""
    for role, value in (('teacher', teacher), ('student', student)):
        fault = find_fault_among(value)
        if fault:
            raise UserError(
                f'--{role}-checkpoint: expected a whole checkpoint file, but '
                f'{fault}. Correct the path (it is relative to the folder '
                'the command runs in), or give a URL.'
            )
    if student == RANDOM:
        raise UserError(
            '--student-checkpoint: expected a path or URL. Omit it to start '
            'from random weights.'
        )
    if teacher == student or (
        student
        and _is_file(teacher)
        and os.path.exists(student)
        and os.path.samefile(teacher, student)
    ):
        raise UserError(
            f"--teacher-checkpoint: {teacher} is the student's own file. A "
            'student learns nothing from a copy of itself; give the weights '
            'of the teacher.'
        )
