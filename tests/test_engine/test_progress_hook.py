"""The bar is shown on a terminal, and the terminal is put back."""

import io
import logging

import pytest
from rich.console import Console

from era_mm import testing
from era_mm.engine.progress_hook import progress_of


def screens(runner):
    return [
        handler.stream
        for handler in runner.logger.handlers
        if type(handler) is logging.StreamHandler
    ]


def test_progress__reaches_the_end(make_runner):
    runner = make_runner(testing.detector_config())
    before = screens(runner)
    out = io.StringIO()
    with progress_of(runner, Console(file=out, force_terminal=True)):
        runner.train()
    assert '8/8' in out.getvalue()
    # The cursor is there again.
    assert out.getvalue().rindex('\x1b[?25h') > out.getvalue().rindex(
        '\x1b[?25l'
    )
    assert screens(runner) == before


def test_progress__puts_the_terminal_back_after_an_error(make_runner):
    runner = make_runner(testing.detector_config())
    before = screens(runner)
    out = io.StringIO()
    with (
        pytest.raises(KeyError),
        progress_of(runner, Console(file=out, force_terminal=True)),
    ):
        raise KeyError
    assert out.getvalue().rstrip().endswith('\x1b[?25h')
    assert screens(runner) == before


def test_progress__nothing_where_no_terminal_is(make_runner):
    runner = make_runner(testing.detector_config())
    hooks = len(runner.hooks)
    with progress_of(runner):
        assert len(runner.hooks) == hooks
