"""Whether weights fit a model: keys, shapes, types of numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

OTHER_KINDS = 'other kinds of numbers'


def find_misfits(
    own: Mapping[str, Any], given: Mapping[str, Any]
) -> list[str]:
    """How weights differ from a model's, a line for each kind of difference.

    ``num_batches_tracked`` may be missing, as the hosts allow: checkpoints
    older than PyTorch 0.4.1 do not have it and evaluation does not use it.

    Args:
        own: The model's state dict.
        given: The weights.

    Returns:
        The lines, each with the first three weights; empty if all fit.
    """
    return lines_of(misfits_by_kind(own, given))


def misfits_by_kind(
    own: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, list[str]]:
    """As :func:`find_misfits`: the names by the kind of difference."""
    both = [key for key in own if key in given]
    return {
        'missing in the file': [
            key
            for key in own
            if key not in given and not key.endswith('num_batches_tracked')
        ],
        'not in the model': [key for key in given if key not in own],
        'other shapes': [
            f'{key}: file {_shape(given[key])}, model {_shape(own[key])}'
            for key in both
            if _shape(given[key]) != _shape(own[key])
        ],
        OTHER_KINDS: [
            f'{key}: file {_kind(given[key])}, model {_kind(own[key])}'
            for key in both
            if _kind(given[key]) != _kind(own[key])
        ],
        # Some hosts keep infinity in a buffer on purpose.
        'not finite': [
            key
            for key in both
            if not is_finite(given[key]) and is_finite(own[key])
        ],
    }


def names_not_finite(weights: Mapping[str, Any]) -> set[str]:
    """Names of tensors with a number that is nan or infinite."""
    return {name for name, value in weights.items() if not is_finite(value)}


def lines_of(ways: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each kind of difference, with the first three weights."""
    return [
        f'{title} ({len(names)}): {first_of(names)}'
        for title, names in ways.items()
        if names
    ]


def first_of(names: Sequence[str]) -> str:
    """The first three of some names."""
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else 'no tensor'


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_floating_point() or value.is_complex():
        return 'real'
    return 'integer'


def is_finite(value: Any) -> bool:
    """Whether a value is no tensor, or one of finite numbers only."""
    return (
        not isinstance(value, Tensor)
        or not value.is_floating_point()
        or bool(torch.isfinite(value).all())
    )
