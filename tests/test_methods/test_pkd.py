"""PKD: its published settings; values are tested by feature imitation."""

import pytest
import torch
from mmengine.registry import MODELS

from era_mm.methods.feature_imitation import FeatureImitationDistiller
from era_mm.methods.pkd import PKDDistiller
from era_mm.testing import noise


def pyramids(levels=5):
    sizes = [2 ** (levels - level) for level in range(levels)]
    return [
        {
            'neck': tuple(
                noise(2, 4, size, size, seed=seed + size).float()
                for size in sizes
            )
        }
        for seed in (0, 99)
    ]


def test_loss__is_one_minus_the_correlation_by_hand():
    """Channels (1, 2, 3) and (3, 1, 2) have r = -1/2.

    Standardised: (-1, 0, 1) and (1, -1, 0). Half the mean of 4, 1, 1 is 1;
    10 of it, and the same of the other level, which is 3 times as large.
    """
    student = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    teacher = torch.tensor([[[[3.0, 1.0, 2.0]]]])
    distiller = PKDDistiller(loss_weight=10.0)
    feats = dict(
        student_feats={'neck': (student, 3 * student)},
        teacher_feats={'neck': (teacher, teacher + 5)},
    )
    distiller.prepare(student=None, teacher=None, **feats)
    found = distiller.loss(**feats, data_samples=[])
    assert found['loss_imitation'].item() == pytest.approx(20, rel=1e-4)


def test_distiller__is_feature_imitation_by_pearson():
    own, theirs = pyramids()
    feats = dict(student_feats=own, teacher_feats=theirs)
    values = []
    for distiller in (
        PKDDistiller(),
        FeatureImitationDistiller(measure='pearson'),
    ):
        distiller.prepare(student=None, teacher=None, **feats)
        assert not list(distiller.parameters())
        assert distiller.num_levels == 4
        assert distiller.loss_weights() == {'loss_imitation': 6}
        values.append(distiller.loss(**feats, data_samples=[]))
    assert values[0] == values[1]


def test_distiller__has_no_other_measure():
    with pytest.raises(TypeError, match='measure'):
        MODELS.build(dict(type='era_mm.PKDDistiller', measure='mse'))
