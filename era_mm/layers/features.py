"""Precision, levels and shapes of features that are compared.

Legend: N batch, C channels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> Tensor:
    """Cast to float32 or better: half precision loses small differences."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def levels_of(
    feats: Mapping[str, Sequence[Tensor]], sources: Sequence[str]
) -> list[Tensor]:
    """The features of some sources, concatenated.

    Args:
        feats: Features by source.
        sources: Their names, in the order wanted.
    """
    return [feat for source in sources for feat in feats[source]]


def check_alike(
    own: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    *,
    names: tuple[str, str],
    at: tuple[object, object] | None = None,
    advice: str,
    slack: int = 0,
) -> None:
    """Refuse features that differ in more than their channels.

    Args:
        own: Shapes of one model's features, by level.
        theirs: Shapes of the other's.
        names: What the message calls the two models.
        at: The source of the features in each. None: not named.
        advice: What to do.
        slack: By how many cells a side may differ.

    Shape:
        - own, theirs: L of ``(N, C, *)``

    Raises:
        ValueError: The numbers of levels or dimensions, or the sizes, differ.
    """
    if [len(shape) for shape in own] == [len(shape) for shape in theirs] and (
        all(
            abs(a - b) <= slack
            for s, t in zip(own, theirs, strict=True)
            for a, b in zip(s[2:], t[2:], strict=True)
        )
    ):
        return
    first, second = (
        str([tuple(shape) for shape in shapes])
        + ('' if at is None else f' at {at[index]!r}')
        for index, shapes in enumerate((own, theirs))
    )
    raise ValueError(
        f'{names[0]} has features {first}, and {names[1]} {second}: all but '
        f'the channels must agree. {advice}'
    )
