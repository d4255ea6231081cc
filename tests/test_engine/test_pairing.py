"""The image on which a pair is tried."""

import pytest
from mmengine.config import ConfigDict

from era_mm.engine.measure import Member
from era_mm.engine.pairing import Pair
from era_mm.testing import detector_config


def members(smallest):
    """A pair whose teacher's head refuses maps below a size."""
    pair = [
        Member(role, role, ConfigDict(detector_config()))
        for role in ('student', 'teacher')
    ]

    def refuse(head, args):
        if min(feat.shape[-1] for feat in args[0]) < smallest:
            raise RuntimeError('input image is smaller than kernel')

    pair[1].model.bbox_head.register_forward_pre_hook(refuse)
    return pair


@pytest.mark.parametrize(
    ('smallest', 'size'),
    [(0, 64), (4, 64), (5, 128), (16, 256), (99, 64)],
    ids=['any', 'fits', 'larger', 'largest', 'never'],
)
def test_size__is_the_first_that_the_teachers_head_takes(smallest, size):
    # Strides are 8 and 16, so the coarsest maps of 64, 128 and 256 pixels
    # have sides of 4, 8 and 16.
    pair = Pair(*members(smallest), input_sizes=[64, 128, 256])
    assert pair.input_size == size
    coarsest = pair.teacher.feats['neck'][-1]
    assert coarsest.shape[-1] == size // 16
    assert pair.student.feats['neck'][-1].shape[-1] == size // 16
