"""Explains errors of models in the dry run."""

import contextlib
from collections.abc import Iterator


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
