"""What is asked of features before they are compared."""

import pytest
import torch

from era_mm.layers import check_alike, full_precision, levels_of


@pytest.mark.parametrize(
    ('dtype', 'expected'),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_full_precision__is_float32_at_least(dtype, expected):
    assert full_precision(torch.ones(2, dtype=dtype)).dtype == expected


def test_levels__are_in_the_order_of_the_sources():
    feats = {'a': (1, 2), 'b': (3,), 'c': (4,)}
    assert levels_of(feats, ['c', 'a']) == [4, 1, 2]


@pytest.mark.parametrize(
    ('theirs', 'slack', 'fits'),
    [
        ([(2, 9, 8, 8), (2, 9)], 0, True),
        ([(2, 9, 8, 7), (2, 9)], 0, False),
        ([(2, 9, 8, 7), (2, 9)], 1, True),
        ([(2, 9, 6, 8), (2, 9)], 1, False),
        ([(2, 9, 8, 8)], 0, False),
        ([(2, 9, 8), (2, 9)], 1, False),
    ],
)
def test_alike__in_all_but_the_channels(theirs, slack, fits):
    own = [torch.Size((2, 4, 8, 8)), torch.Size((2, 4))]
    arguments = dict(
        names=('One', 'another'), advice='Do something.', slack=slack
    )
    if fits:
        check_alike(own, theirs, **arguments)
        return
    with pytest.raises(ValueError, match=r"8\), \(2, 4\)\] at 'neck', and"):
        check_alike(own, theirs, at=('neck', 'backbone'), **arguments)
    with pytest.raises(
        ValueError,
        match=r'One has features \[\(2, 4, 8, 8\), \(2, 4\)\], and another .*'
        'all but the channels must agree. Do something.',
    ):
        check_alike(own, theirs, **arguments)
