"""Errors that a user of era_mm can cause and correct."""

import contextlib
import dis
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in a command, a config or a file, explained in one message.

    The message says what was expected, what was found and what to do. The
    command line prints it without a traceback.
    """


def first_line(error: BaseException) -> str:
    """What an error says, without its further lines."""
    # str() of a KeyError shows quotes and backslashes.
    is_key = isinstance(error, KeyError) and error.args
    lines = str(error.args[0] if is_key else error).strip().splitlines()
    return lines[0] if lines else 'no details'


def is_own(error: BaseException) -> bool:
    """Whether era_mm itself raised an error, so that its words explain it.

    A :class:`UserError`, or what a ``raise`` of this package raised. An error
    of Python's in this package's code is none, nor is an assertion.
    """
    if isinstance(error, UserError):
        return True
    last = error.__traceback__
    if last is None or isinstance(error, AssertionError):
        return False
    while last.tb_next is not None:
        last = last.tb_next
    module = last.tb_frame.f_globals.get('__name__', '')
    operation = last.tb_frame.f_code.co_code[last.tb_lasti]
    return (
        module.partition('.')[0] == 'era_mm'
        and operation == dis.opmap['RAISE_VARARGS']
    )


def without_workers(error: BaseException, text: str) -> str:
    """What an error says, without the traceback that a data worker adds."""
    if text.startswith('Caught '):
        kind = type(error)
        for name in (f'{kind.__module__}.{kind.__name__}', kind.__name__):
            if f'\n{name}: ' in text:
                return text.rpartition(f'\n{name}: ')[2].strip()
    return text


@contextlib.contextmanager
def said_of(part: str, advice: str) -> Iterator[None]:
    """Say of an error in the words of others which part of a run it is about.

    What Python, torch and the hosts raise names no key of the config.
    Errors of our own pass.

    Args:
        part: What the work inside is about.
        advice: What to do.

    Raises:
        UserError: In place of any other.
    """
    try:
        yield
    except Exception as error:
        if is_own(error):
            raise
        # What mmengine adds of an unknown type leads to its documentation.
        text = first_line(error).partition(' Please check whether ')[0]
        raise UserError(
            f'{part}: {type(error).__name__}: {text.rstrip(".")}. {advice}'
        ) from error
