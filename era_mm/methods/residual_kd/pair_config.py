"""From a given model's config to the pair's."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from torch import Tensor

from ...core.utils import preserve_rng
from ...layers import check_alike
from .pair import FeatureExtractor

CUTS = ('backbone', 'neck')
#: Keys of the given backbone that one with changed widths cannot keep.
PRETRAINING = ('init_cfg', 'pretrained', 'frozen_stages')
FORMS = {
    'image': 'era_mm.ImageAssistant',
    'feature': 'era_mm.FeatureAssistant',
}


def pair_config(
    model: Mapping,
    *,
    source: str = 'neck',
    student: Mapping | None = None,
    assistant: Mapping | None = None,
    norm_cfg: Mapping | None = None,
) -> ConfigDict:
    """The host config of a pair made of a given model.

    The modules before the cut become a ``ResidualPair``, those behind it
    stay. Channels are measured by a dry run and written into the config, as
    are ``in_channels`` of the necks. A changed student backbone and the
    assistant's start from random weights, so nothing in them is frozen.

    Source: ours.

    Args:
        model: The given model, a host config. It is not changed.
        source: The cut: 'backbone' or 'neck', whose output is summed.
        student: Changes to the given model's ``backbone`` and ``neck`` that
            make the student: ``dict(backbone=dict(base_channels=56))``. None:
            the student is the given model.
        assistant: ``dict(form='feature', ...)`` with arguments of
            ``FeatureAssistant``; or ``dict(form='image', ...)`` with changes
            to ``backbone`` and ``neck`` and arguments of ``ImageAssistant``.
            None: the feature form.
        norm_cfg: Norm of the student's adapter. None: BN.

    Raises:
        ValueError: An unknown cut or form, a model without neck, a key that
            is inferred, features that are neither maps nor vectors, or a
            number of levels or sizes of maps other than the given model's.
    """
    pair = ConfigDict(copy.deepcopy(dict(model)))
    given = parts_before(model, source)
    options = dict(assistant or {})
    form = options.pop('form', 'feature')
    if form not in FORMS:
        raise ValueError(
            f'`assistant.form` must be one of {sorted(FORMS)}, but got '
            f'{form!r}.'
        )
    narrow = change_parts(given, student or {}, name='student')
    shapes = feature_shapes(given)
    own_shapes = feature_shapes(narrow) if student else shapes
    _check_shapes(own_shapes, shapes, 'student')
    channels, own_channels = _channels(shapes), _channels(own_shapes)
    if form == 'image':
        changes = {key: options.pop(key) for key in CUTS if key in options}
        parts = change_parts(given, changes, name='assistant', is_new=True)
        their_shapes = feature_shapes(parts)
        _check_shapes(their_shapes, shapes, 'assistant')
        found = dict(parts, in_channels=_channels(their_shapes))
    else:
        found = dict(
            in_channels=own_channels, spatial_dims=len(own_shapes[0]) - 2
        )
    found = dict(found, type=FORMS[form], out_channels=channels)
    for key in sorted(set(found) & set(options)):
        raise ValueError(
            f'`assistant.{key}` is inferred: {found[key]}. Remove the key.'
        )
    pair.backbone = ConfigDict(
        type='era_mm.ResidualPair',
        student=narrow,
        assistant=found | options,
        in_channels=own_channels,
        out_channels=channels,
    )
    if norm_cfg is not None:
        pair.backbone.norm_cfg = norm_cfg
    if source == 'neck':
        # Detectors require the argument.
        pair.neck = None
    return pair


def parts_before(model: Mapping, source: str) -> ConfigDict:
    """The parts of a model config up to a cut."""
    if source not in CUTS:
        raise ValueError(
            f'Residual KD cuts a model behind one of {CUTS}, but `source` is '
            f'{source!r} for the student.'
        )
    if str(model.get('backbone', {}).get('type')) == 'era_mm.ResidualPair':
        raise ValueError(
            'The given model is a pair already. Give the original model, and '
            'only one ResidualKDDistiller.'
        )
    parts = CUTS[: CUTS.index(source) + 1]
    missing = [part for part in parts if not model.get(part)]
    if missing:
        raise ValueError(
            f'`source` is {source!r}, but the given model '
            f'({model.get("type")}) has no {" and no ".join(missing)}. '
            "Choose source='backbone' for a model without neck."
        )
    return ConfigDict({part: copy.deepcopy(model[part]) for part in parts})


def change_parts(
    parts: ConfigDict, changes: Mapping, *, name: str, is_new: bool = False
) -> ConfigDict:
    """Change parts, and fit necks to their backbone.

    Args:
        parts: ``backbone`` and, optionally, ``neck``.
        changes: What to change in each.
        name: 'student' or 'assistant', for messages.
        is_new: Whether they start from random weights even if unchanged.
    """
    unknown = sorted(set(changes) - set(parts))
    if unknown:
        raise ValueError(
            f'`{name}` changes {unknown}, but before the cut there is '
            f'{list(parts)}.'
        )
    changed = copy.deepcopy(parts)
    if is_new or changes.get('backbone'):
        _set_free(changed.backbone)
    whole = Config(dict(parts=changed))
    whole.merge_from_dict(dict(parts=copy.deepcopy(dict(changes))))
    changed = whole.parts
    neck = changed.get('neck')
    first = neck[0] if isinstance(neck, (list, tuple)) else neck
    if first and 'in_channels' in first:
        found = _channels(feature_shapes(dict(backbone=changed.backbone)))
        is_list = isinstance(first.in_channels, (list, tuple))
        first.in_channels = found if is_list else found[-1]
    return changed


def _set_free(backbone: ConfigDict) -> None:
    """Remove what makes sense only with pre-trained weights."""
    inits = backbone.get('init_cfg')
    inits = inits if isinstance(inits, (list, tuple)) else [inits]
    kept = [i for i in inits if i and i.get('type') != 'Pretrained']
    if len(kept) < len([i for i in inits if i]):
        backbone.pop('init_cfg')
        if kept:
            backbone.init_cfg = kept
    backbone.pop('pretrained', None)
    backbone.pop('frozen_stages', None)
    # True by default in mmdet.
    if 'norm_eval' in arguments_of(backbone):
        backbone.norm_eval = False
    if 'requires_grad' in (backbone.get('norm_cfg') or {}):
        backbone.norm_cfg.requires_grad = True


def class_of(config: Mapping) -> type:
    """The class that a host config's ``type`` means."""
    kind = config['type']
    if isinstance(kind, str):
        with MODELS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    if kind is None:
        raise ValueError(f'No model is registered as {config["type"]!r}.')
    return kind


def arguments_of(config: Mapping) -> dict[str, Any]:
    """Arguments that a config's class takes, and their defaults.

    Those of a base class only if ``**kwargs`` passes them on.
    """
    found: dict[str, Any] = {}
    for base in class_of(config).__mro__:
        if '__init__' not in vars(base) or base is object:
            continue
        parameters = inspect.signature(vars(base)['__init__']).parameters
        for name, parameter in parameters.items():
            found.setdefault(name, parameter.default)
        kinds = [parameter.kind for parameter in parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return found


@torch.no_grad()
def feature_shapes(parts: Mapping, size: int = 64) -> list[torch.Size]:
    """Shapes of the features of one image, found by a dry run.

    Args:
        parts: ``backbone`` and, optionally, ``neck``.
        size: Side of the image in pixels.
    """
    with preserve_rng():
        extractor = FeatureExtractor(**copy.deepcopy(dict(parts))).eval()
        feats: tuple[Tensor, ...] = extractor(torch.zeros(1, 3, size, size))
    return [feat.shape for feat in feats]


def _channels(shapes: list[torch.Size]) -> list[int]:
    return [shape[1] for shape in shapes]


def _check_shapes(
    own: list[torch.Size], given: list[torch.Size], name: str
) -> None:
    if any(len(shape) not in (2, 4) for shape in given):
        raise ValueError(
            'Residual KD works on vectors (N, C) and maps (N, C, H, W), but '
            f'the given model has {[tuple(s) for s in given]} at the cut.'
        )
    check_alike(
        own,
        given,
        names=(f'The {name}', 'the given model at the cut'),
        advice='Change widths, not strides or levels.',
    )
