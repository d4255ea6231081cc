"""What rests in a stretch of a run."""

from era_mm.core import Phase


def test_phase__together_freezes_what_any_freezes():
    first = Phase('a', frozen=('neck',))
    second = Phase('b', frozen=('backbone', 'neck.convs'), task=False)
    both = Phase('a+b', ('neck', 'backbone', 'neck.convs'), task=False)
    assert Phase.together(iter([first, second])) == both
    # One that does without the task leaves the other without it too.
    assert not Phase.together([second, first]).task
    assert Phase.together([first]) == first
    assert Phase.together([]) == Phase()
