"""Whose words an error has, and what it is about."""

import pytest
from mmengine.registry import MODELS

from era_mm import errors
from era_mm.core import LossSchedule
from era_mm.core.build import build_distillers
from era_mm.errors import UserError, first_line, is_own, said_of
from era_mm.statistics import estimate


def caught(work):
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError('nothing was raised')


def fail():
    raise RuntimeError('no such thing.\nmore')


def test_is_own__of_what_this_package_raises():
    assert is_own(UserError('x'))
    error = caught(lambda: LossSchedule(shape='wavy'))
    assert type(error) is ValueError
    assert is_own(error)
    error = caught(lambda: build_distillers(3))
    assert type(error) is TypeError
    assert is_own(error)


def test_is_own__not_of_what_others_raise():
    assert not is_own(ValueError('never raised'))
    assert not is_own(caught(fail))
    assert not is_own(caught(lambda: MODELS.build(dict(type='Nothing'))))
    # In this package's code, and yet in Python's words.
    error = caught(lambda: first_line(3).nothing)
    assert not is_own(error)
    error = caught(lambda: estimate('abc'))
    assert not is_own(error)


def test_said_of__names_the_part_and_lets_own_errors_pass():
    with pytest.raises(UserError) as info, said_of('the model', 'Mend it.'):
        fail()
    assert str(info.value) == (
        'the model: RuntimeError: no such thing. Mend it.'
    )
    assert isinstance(info.value.__cause__, RuntimeError)
    with pytest.raises(UserError, match=r'^mine$'), said_of('the model', '.'):
        raise UserError('mine')


def test_said_of__leaves_the_way_to_others_documentation_out():
    with pytest.raises(UserError) as info, said_of('model', 'Mend it.'):
        MODELS.build(dict(type='Nothing'))
    text = str(info.value)
    assert text.startswith('model: KeyError: Nothing is not in the ')
    assert text.endswith(' registry. Mend it.')


def test_without_workers__is_what_was_raised_in_the_worker():
    text = (
        'Caught UserError in DataLoader worker process 0.\n'
        'Original Traceback (most recent call last):\n  File "x"\n\n'
        'During handling:\n  File "y"\n'
        'era_mm.errors.UserError: a.png: no image.\nReplace it.\n'
    )
    found = errors.without_workers(UserError(text), text)
    assert found == 'a.png: no image.\nReplace it.'
    assert errors.without_workers(UserError('plain'), 'plain') == 'plain'
