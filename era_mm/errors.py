"""Errors that a user of era_mm can cause and mend."""


class UserError(ValueError):
    """A mistake in a command, a config or a file, said in one message.

    The message names what was expected, what came and what to do; the
    command line prints it without a traceback.
    """


def first_line(error: BaseException) -> str:
    """What an error says, without its further lines."""
    lines = str(error).splitlines()
    return lines[0] if lines else 'no details'
