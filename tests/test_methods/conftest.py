"""Pairs that the tests of several methods share."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

from era_mm.testing import classifier_config, save_teacher


@pytest.fixture
def classifiers(tmp_path):
    """Builds a Distillation of toy classifiers, the teacher twice as wide."""
    init_default_scope('mmpretrain')

    def make(distiller, teacher=None, student=None, **kwargs):
        teacher = teacher or classifier_config(width=16)
        file = save_teacher(teacher, tmp_path / 't.pth', scope='mmpretrain')
        model = MODELS.build(
            dict(
                type='era_mm.Distillation',
                student=student or classifier_config(),
                teacher=dict(config=teacher, checkpoint=file),
                distiller=distiller,
            )
            | kwargs
        )
        model.init_weights()
        return model

    return make


@pytest.fixture
def image_batch():
    """Preprocessed images of three classes, as a classifier gets them."""

    def make(num=6, size=64):
        generator = torch.Generator().manual_seed(3)
        return dict(
            inputs=torch.randn(num, 3, size, size, generator=generator),
            data_samples=[
                DataSample().set_gt_label(index % 3) for index in range(num)
            ],
        )

    return make
