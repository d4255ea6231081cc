"""Trials of models on one image: its size, and what their errors mean."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from .host_models import is_query_based, kind_of
from .utils import evaluating, preserve_rng

#: Sides of the trial image in pixels, tried in this order.
DETECTOR_SIZES = (256, 512, 1024)
CLASSIFIER_SIZES = (224, 256, 384, 32)

Size = TypeVar('Size')
Found = TypeVar('Found')


def trial_sizes(model: nn.Module) -> tuple[int, ...]:
    """Sides of the images on which a model is tried, in this order.

    Args:
        model: A host model.
    """
    return DETECTOR_SIZES if kind_of(model) == 'detector' else CLASSIFIER_SIZES


def at_first_size(
    sizes: Iterable[Size],
    run: Callable[[Size], Found],
    suits: Callable[[Found], bool],
) -> Found:
    """What a trial finds at the first size that suits.

    If none suits, at the first at which it runs.

    Args:
        sizes: Sizes of the image, in the order in which they are tried.
        run: The trial. A model that does not accept a size may raise
            anything.
        suits: Whether what it found will do.

    Raises:
        Exception: Of the first size, if the trial runs at none.
    """
    usable: list[Found] = []
    failures: list[Exception] = []
    for size in dict.fromkeys(sizes):
        try:
            found = run(size)
        except Exception as error:
            failures.append(error)
            continue
        if suits(found):
            return found
        usable.append(found)
    if usable:
        return usable[0]
    raise failures[0]


def head_runs(
    model: nn.Module, feats: Mapping[str, tuple[Tensor, ...]]
) -> bool:
    """Whether a dense head accepts its features; True for other heads.

    Deformable convolutions in a head refuse the smallest maps.

    Args:
        model: A host model.
        feats: Features by source. True if what feeds the head is not there.
    """
    head = getattr(model, 'bbox_head', None)
    feeds = 'backbone' if getattr(model, 'neck', None) is None else 'neck'
    if head is None or is_query_based(model) or feeds not in feats:
        return True
    try:
        with torch.no_grad(), preserve_rng(), evaluating(head):
            head(feats[feeds])
    # Whatever a host raises.
    except Exception:
        return False
    return True


@contextlib.contextmanager
def explained(owner: str, size: tuple[int, ...]) -> Iterator[None]:
    """Name the model in errors of its dry run.

    Errors of torch name shapes but no part of a config. Our own errors and
    those of the hosts do, so they are passed on.

    Args:
        owner: 'student', or a teacher's name.
        size: Channels, height and width of the image.

    Raises:
        ValueError: Instead of an error of torch.
    """
    try:
        yield
    except (RuntimeError, IndexError, AssertionError) as error:
        lines = str(error).splitlines() or ['no details']
        raise ValueError(
            f'The {owner} cannot run on an image of '
            f'{" x ".join(map(str, size[1:]))} with {size[0]} channels '
            f'({type(error).__name__}: {lines[0]}). Its parts do not fit '
            'together, or it needs another image: compare `in_channels` of '
            'neck and head with what the part before outputs, or set '
            '`input_size` of the Distillation.'
        ) from error
