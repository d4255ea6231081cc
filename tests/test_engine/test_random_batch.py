"""Random batches for measurements."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from era_mm.engine.random_batch import random_batch
from era_mm.errors import UserError
from era_mm.testing import classifier_config, detector_config


def test_random_batch__has_boxes_inside_the_image():
    model = MODELS.build(detector_config())
    generator = torch.Generator().manual_seed(0)
    batch = random_batch(model, 3, (40, 100), 50, generator)
    assert [tuple(i.shape) for i in batch['inputs']] == [(3, 40, 100)] * 3
    assert all(image.dtype == torch.uint8 for image in batch['inputs'])
    for sample in batch['data_samples']:
        boxes, labels = sample.gt_instances.bboxes, sample.gt_instances.labels
        assert len(boxes) == len(labels) == 50
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([100, 40, 100, 40])).all()
        extents = (boxes[:, 2:] - boxes[:, :2]) / torch.tensor([100, 40])
        assert extents.min() >= 0.099
        assert extents.max() <= 0.401
        assert set(labels.tolist()) == {0, 1, 2}
        assert 'masks' not in sample.gt_instances
    again = random_batch(
        model, 3, (40, 100), 50, torch.Generator().manual_seed(0)
    )
    assert torch.equal(again['inputs'][2], batch['inputs'][2])


def test_random_batch__has_rectangles_for_a_mask_head():
    model = MODELS.build(detector_config())
    type(model).with_mask = property(lambda self: True)
    try:
        batch = random_batch(model, 1, (64, 80), 4, torch.Generator())
    finally:
        del type(model).with_mask
    instances = batch['data_samples'][0].gt_instances
    for box, mask in zip(
        instances.bboxes.round().int().tolist(),
        instances.masks.masks,
        strict=True,
    ):
        x1, y1, x2, y2 = box
        assert mask.shape == (64, 80)
        assert mask[y1:y2, x1:x2].all()
        assert mask.sum() == (x2 - x1) * (y2 - y1) > 0


def test_random_batch__has_a_label_for_a_classifier():
    model = MODELS.build(classifier_config(num_classes=7))
    batch = random_batch(model, 64, (32, 32), 5, torch.Generator())
    labels = [sample.gt_label for sample in batch['data_samples']]
    assert all(label.shape == (1,) for label in labels)
    assert {label.item() for label in labels} == set(range(7))


def test_random_batch__refuses_other_models():
    with pytest.raises(UserError, match='but it is a Linear'):
        random_batch(nn.Linear(1, 1), 1, (8, 8), 1, torch.Generator())
