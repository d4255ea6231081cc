"""A term's weight over time."""

import pytest
from mmengine.registry import MODELS

from era_mm.core import LossSchedule
from era_mm.core.schedule import scheduled
from era_mm.testing import distillation_config

ERA = dict(type='era_mm.ERADistiller')


def test_schedule__unknown_key_shows_the_nearest():
    config = distillation_config(
        dict(ERA, schedules=dict(loss_era_align=dict(strat=1)))
    )
    with pytest.raises(TypeError, match="Did you mean 'start'"):
        MODELS.build(config)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(shape='cubic'),
        dict(start=-1),
        dict(start=5, stop=5),
        dict(scale=-1),
        dict(milestones=[5, 3]),
    ],
)
def test_schedule__refuses(kwargs):
    with pytest.raises(ValueError, match='schedule'):
        LossSchedule(**kwargs)


def test_schedule__values_by_hand():
    schedule = LossSchedule(start=2, stop=8, ramp=4, shape='cosine')
    # (1 - cos(pi x)) / 2 at x = 1/4, 1/2, 3/4, 1.
    assert [round(schedule(step), 4) for step in range(9)] == [
        0,
        0,
        0.1464,
        0.5,
        0.8536,
        1,
        1,
        1,
        0,
    ]
    assert LossSchedule()(10**9) == 1.0
    assert LossSchedule(scale=0.5)(0) == 0.5
    # Down from 0.1 * 10 to 0.1 in four steps: 1 - 0.9 x.
    down = LossSchedule(scale=0.1, initial=10, ramp=4)
    assert [round(down(t), 4) for t in (0, 1, 2, 3, 9)] == [
        0.775,
        0.55,
        0.325,
        0.1,
        0.1,
    ]
    steps = LossSchedule(scale=2, milestones=[2, 5], gamma=0.5)
    assert [steps(t) for t in (1, 2, 4, 5, 9)] == [2, 1, 1, 0.5, 0.5]


def test_schedule__says_itself_in_words():
    assert str(LossSchedule()) == 'times 1'
    assert str(LossSchedule(scale=0.5, start=3, stop=9)) == (
        'times 0.5, from iteration 3, until 9'
    )
    assert str(LossSchedule(scale=0.1, initial=10, ramp=4)) == (
        '1 to 0.1 over 4 iterations (linear)'
    )
    assert str(LossSchedule(milestones=[2, 5], gamma=0.5)) == (
        'times 1, times 0.5 at 2, 5'
    )


def test_scheduled__multiplies_the_losses_that_a_pattern_matches():
    losses = {'loss_a_1': 3.0, 'loss_a_2': 5.0, 'a_seen': 7.0}
    schedules = {
        'loss_a_*': LossSchedule(scale=0.5),
        '*_2': LossSchedule(start=4, scale=2),
        '*': LossSchedule(stop=5),
    }
    told = dict(is_complete=True, owner='A')
    # By hand: 0.5 * 3; at step 3 the second is off, at step 4 0.5 * 2 * 5.
    assert scheduled(losses, schedules, 3, **told) == {
        'loss_a_1': 1.5,
        'loss_a_2': 0.0,
        'a_seen': 7.0,
    }
    assert scheduled(losses, schedules, 4, **told)['loss_a_2'] == 5.0
    assert scheduled(losses, schedules, 5, **told)['loss_a_1'] == 0.0
    absent = {'loss_b': LossSchedule()}
    with pytest.raises(ValueError, match=r"of A has 'loss_b'.*\['a_seen',"):
        scheduled(losses, absent, 0, **told)
    told['is_complete'] = False
    assert scheduled(losses, absent, 0, **told) == losses
