"""Errors that a user of era_mm can cause and correct."""


class UserError(ValueError):
    """A mistake in a command, a config or a file, explained in one message.

    The message says what was expected, what was found and what to do. The
    command line prints it without a traceback.
    """


def first_line(error: BaseException) -> str:
    """What an error says, without its further lines."""
    lines = str(error).splitlines()
    return lines[0] if lines else 'no details'
