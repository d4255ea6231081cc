"""Lists the modules of a model with their outputs."""

from collections.abc import Iterator

from torch import Tensor

from era_mm.core import distillation_kind
from era_mm.core.dry_run import trial_sizes
from era_mm.core.host_models import resolve_model_config
from era_mm.engine.host_configs import HostConfig, crop_size
from era_mm.engine.measure import Member, observe
from era_mm.errors import UserError


def print_sources(
    config: HostConfig, depth: int = 2, input_size: int | None = None
) -> str:
    """A table of the modules of each model that a config has.

    Args:
        config: Config of a host model, or of a distillation, whose students
            and teachers are listed in turn.
        depth: Maximum number of parts of a module's name.
        input_size: Side of the image, in pixels. None: the crop size of a
            classifier's pipeline, else the first usual size that works.

    Raises:
        UserError: A model cannot be built or run.
    """
    for flag, number in (('--depth', depth), ('--input-size', input_size)):
        if number is not None and number < 1:
            raise UserError(
                f'{flag}: expected a number of 1 or more, but got {number}.'
            )
    tables = []
    for role, member in _members(config):
        sizes = [input_size] if input_size else _sizes(config, member)
        tables.append(_table(role, member, depth, sizes))
    return '\n\n'.join(tables)


def _members(config: HostConfig) -> Iterator[tuple[str, Member]]:
    """Each model with its role."""
    model = config.model
    if distillation_kind(model) is None:
        yield 'model', Member('model', config.reference, model, config.scope)
        return
    students = model.get('students') or {'student': model.get('student')}
    teachers = model.get('teacher') or {}
    if 'config' in teachers:
        teachers = {'teacher': teachers}
    found = [(name, student) for name, student in students.items()]
    found += [(name, entry['config']) for name, entry in teachers.items()]
    for name, reference in found:
        own, scope = resolve_model_config(reference)
        if 'data_preprocessor' in model:
            own.setdefault('data_preprocessor', model.data_preprocessor)
        shown = reference if isinstance(reference, str) else config.reference
        yield name, Member(name, shown, own, scope or config.scope)


def _sizes(config: HostConfig, member: Member) -> list[int]:
    crop = None if member.kind == 'detector' else crop_size(config)
    return [crop] if crop else list(trial_sizes(member.model))


def _table(role: str, member: Member, depth: int, sizes: list[int]) -> str:
    names = [
        name
        for name, _ in member.model.named_modules()
        if name
        and name.count('.') < depth
        and name.partition('.')[0] != 'data_preprocessor'
    ]
    remark = ''
    for size in sizes:
        try:
            seen = observe(member.model, names, size, whole=True)
            break
        # Heads of some hosts' models cannot run without ground truth.
        except Exception:
            try:
                seen = observe(member.model, names, size)
                remark = ', without the modules after the neck'
                break
            except Exception as error:
                failure = error
    else:
        raise UserError(
            f'{role}: {member.name} cannot run on images of '
            f'{member.channels} channels and {sizes} pixels: '
            f'{type(failure).__name__}: {failure}. Give --input-size; the '
            "channels are those of the backbone's first convolution."
        ) from failure
    shown = '' if member.channels == 3 else f', {member.channels} channels'
    lines = [
        f'{role}: {type(member.model).__name__}, {member.name}, on '
        f'{size}x{size}{shown}{remark}'
    ]
    modules = dict(member.model.named_modules())
    # In the order of the model, not of the calls: a parent ends last.
    rows = [
        (name, type(modules[name]).__name__, shapes(seen.outputs[name], size))
        for name in names
        if name in seen.outputs
    ]
    wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines += [f'  {n:{wide[0]}}  {k:{wide[1]}}  {s}' for n, k, s in rows]
    return '\n'.join(lines)


def shapes(feats: tuple[Tensor, ...], input_size: int) -> str:
    """Shapes of outputs of one image, with the strides of maps.

    Args:
        feats: A module's outputs.
        input_size: Side of the image.
    """
    if not feats:
        return '- (not only tensors: cannot be a source)'
    counts: dict[str, int] = {}
    for feat in feats:
        text = 'x'.join(map(str, feat.shape[1:]))
        if feat.dim() == 4:
            text += f' /{input_size / feat.shape[2]:g}'
        counts[text] = counts.get(text, 0) + 1
    return ', '.join(
        text if number == 1 else f'{number} of {text}'
        for text, number in counts.items()
    )
