"""Errors that a user of era_mm can cause and mend."""


class UserError(ValueError):
    """A mistake in a command, a config or a file, said in one message.

    The message names what was expected, what came and what to do; the
    command line prints it without a traceback.
    """
