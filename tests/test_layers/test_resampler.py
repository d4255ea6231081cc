"""What resamplers do, by hand."""

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.layers import Resampler, crop_to_common
from era_mm.layers.resampler import resize, tokens_to_map


def grid(height, width):
    return torch.arange(float(height * width)).view(1, 1, height, width)


def test_tokens_to_map__rows_from_the_top_left_without_the_extra_ones():
    # Two extra tokens, then four places of two channels.
    tokens = torch.tensor(
        [[[9.0, 9], [8, 8], [1, 10], [2, 20], [3, 30], [4, 40]]]
    )
    assert tokens_to_map(tokens, 2).tolist() == [
        [[[1, 2], [3, 4]], [[10, 20], [30, 40]]]
    ]


@pytest.mark.parametrize(('number', 'extra'), [(6, 1), (1, 1), (3, 4)])
def test_tokens_to_map__refuses_what_fills_no_square(number, extra):
    with pytest.raises(ValueError, match='do not fill a square'):
        tokens_to_map(torch.zeros(1, number, 2), extra)


def test_resize__smaller_is_the_mean_of_what_a_cell_covers():
    assert resize(grid(4, 4), 0.5).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    # All four rows and columns count, not the middle ones alone.
    assert resize(grid(4, 4), 0.25).tolist() == [[[[7.5]]]]


def test_resize__larger_is_bilinear_between_the_centres():
    # Centres of the new cells at -0.25, 0.25, 0.75, 1.25 of the old ones.
    assert resize(grid(1, 2), 2)[0, 0, 0].tolist() == [0, 0.25, 0.75, 1]


@pytest.mark.parametrize(
    ('side', 'scale', 'expected'),
    [(25, 0.5, 13), (8, 0.5, 4), (7, 1.1429, 8), (8, 0.875, 7), (1, 0.25, 1)],
)
def test_resize__rounds_up_as_strided_convolutions_do(side, scale, expected):
    assert resize(grid(side, side), scale).shape[2:] == (expected, expected)


def test_connector__chooses_then_resizes():
    feats = (grid(4, 4), grid(2, 2), torch.zeros(1, 1, 1, 1))
    found = Resampler(levels=[1, 1, 0], scales=[1, 0.5, 0.5])(feats)
    assert found[0] is feats[1]
    assert found[1].tolist() == [[[[1.5]]]]
    assert found[2].tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]


def test_connector__reduces_tokens_and_maps():
    tokens = torch.tensor([[[7.0], [1], [3]]])
    assert Resampler(tokens='mean')([tokens])[0].tolist() == [[2]]
    assert Resampler(tokens='mean', num_extra=0)([tokens])[0].allclose(
        torch.tensor([[11 / 3]])
    )
    assert Resampler(tokens='class')([tokens])[0].tolist() == [[7]]
    assert Resampler(tokens='mean')([grid(2, 2)])[0].tolist() == [[1.5]]
    mapped = Resampler(tokens='map', num_extra=2, scales=[2])([tokens])
    assert mapped[0].tolist() == [[[[3, 3], [3, 3]]]]


def test_connector__does_nothing_by_default():
    feats = (grid(2, 2), torch.zeros(1, 3))
    assert all(a is b for a, b in zip(Resampler()(feats), feats, strict=True))
    assert Resampler().steps() == []


def test_connector__says_what_it_does():
    resampler = Resampler(levels=[2, 0, 1], tokens='map', scales=[2, 1, 0.5])
    assert resampler.steps() == [
        'outputs [2, 0, 1]',
        'tokens arranged as a map',
        'level 0 resized by 2 (bilinear)',
        'level 2 resized by 0.5 (mean of the cells)',
    ]


def test_connector__gradients_pass():
    feat = torch.ones(1, 1, 4, 4, requires_grad=True)
    Resampler(scales=[0.5])([feat])[0].sum().backward()
    assert feat.grad.tolist() == torch.full((1, 1, 4, 4), 0.25).tolist()


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(tokens='cls'), 'must be one of'),
        (dict(scales=[0.0]), 'positive factor'),
        (dict(levels=[0, 1], scales=[1]), 'positive factor'),
    ],
)
def test_connector__refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Resampler(**kwargs)


def test_connector__refuses_levels_that_are_not_there():
    with pytest.raises(ValueError, match=r'levels \[0, 2\].*outputs 2'):
        Resampler(levels=[0, 2])([grid(1, 1), grid(1, 1)])
    with pytest.raises(ValueError, match='outputs 2'):
        Resampler(scales=[1])([grid(1, 1), grid(1, 1)])


def test_connector__is_a_neck_of_configs():
    assert isinstance(MODELS.build(dict(type='era_mm.Resampler')), Resampler)
    with pytest.raises(TypeError, match="Did you mean 'scales'"):
        MODELS.build(dict(type='era_mm.Resampler', scale=[1]))


def test_crop_to_common__keeps_the_top_left():
    student, teacher = crop_to_common(
        student_feats=[grid(2, 4), torch.zeros(1, 5)],
        teacher_feats=[grid(3, 3), torch.ones(1, 7)],
    )
    assert student[0].tolist() == [[[[0, 1, 2], [4, 5, 6]]]]
    assert teacher[0].tolist() == [[[[0, 1, 2], [3, 4, 5]]]]
    assert student[1].shape == (1, 5)
    assert teacher[1].shape == (1, 7)
