"""The teacher sees its own preprocessing, batch augmentation included."""

import copy

import numpy as np
import pytest
import torch
from mmdet.structures.mask import BitmapMasks
from mmengine.logging import MessageHub
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from mmpretrain.structures import DataSample

from era_mm.core.data_preprocessor import convert, differences
from era_mm.testing import (
    classifier_config,
    detection_batch,
    detector_config,
    distillation_config,
)

ERA = dict(type='era_mm.ERADistiller', mbrnet=dict(num_branches=1))


def detector_preprocessor(**kwargs):
    return MODELS.build(dict(type='mmdet.DetDataPreprocessor', **kwargs))


def classifier_preprocessor(**kwargs):
    return MODELS.build(dict(type='mmpretrain.ClsDataPreprocessor', **kwargs))


def test_differences__of_images_alone():
    plain = detector_preprocessor(pad_size_divisor=32)
    masks = detector_preprocessor(pad_size_divisor=32, pad_mask=True)
    assert differences(plain, masks) == {}
    other = detector_preprocessor(
        mean=[1.0, 2, 3], std=[1.0, 1, 1], pad_size_divisor=32
    )
    found = differences(plain, other)
    assert found['mean'] == (None, [1, 2, 3])
    assert set(found) == {'mean', 'std', 'enable_normalize'}
    # Mixing needs one-hot labels; the images are the same.
    mixing = classifier_preprocessor(
        num_classes=3,
        batch_augments=dict(augments=[dict(type='Mixup', alpha=1.0)]),
    )
    assert differences(mixing, classifier_preprocessor()) == {}


def test_convert__by_hand():
    student = detector_preprocessor(
        mean=[10.0, 20, 30], std=[2.0, 4, 5], bgr_to_rgb=True
    )
    teacher = detector_preprocessor(
        mean=[1.0, 2, 3], std=[1.0, 2, 10], pad_size_divisor=3, pad_value=7
    )
    # Blue 30, green 20, red 12 in the file; the student's channels are RGB.
    pixel = torch.tensor([(12 - 10) / 2, 0, 0])
    inputs = pixel.view(1, 3, 1, 1).expand(1, 3, 2, 2)
    sample = BaseDataElement(metainfo=dict(img_shape=(2, 1)))
    found = convert(inputs, [sample], student=student, teacher=teacher)
    assert found.shape == (1, 3, 3, 3)
    expected = torch.tensor([(30 - 1) / 1, (20 - 2) / 2, (12 - 3) / 10])
    for row in range(2):
        torch.testing.assert_close(found[0, :, row, 0], expected)
    assert (found[0, :, :, 1:] == 7).all()
    assert (found[0, :, 2] == 7).all()


SETTINGS = {
    'raw': dict(mean=None, std=None, bgr_to_rgb=False),
    'caffe': dict(mean=[103.5, 116.3, 123.7], std=[1.0] * 3, bgr_to_rgb=False),
    'rgb': dict(mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4]),
    'padded': dict(pad_size_divisor=48, pad_value=3),
}


@pytest.mark.parametrize('setting', SETTINGS)
def test_convert__is_what_the_teachers_own_gives(setting):
    """Without augmentation both ways must lead to the same images."""
    own = detector_config()['data_preprocessor']
    student = MODELS.build(dict(own, type='mmdet.DetDataPreprocessor'))
    teacher = MODELS.build(
        dict(own, type='mmdet.DetDataPreprocessor') | SETTINGS[setting]
    )
    batch = detection_batch(2, size=60)
    # Another size, so that there is padding between the two.
    batch['inputs'][1] = batch['inputs'][1][:, :50, :40]
    batch['data_samples'][1].set_metainfo(dict(img_shape=(50, 40)))
    expected = teacher(copy.deepcopy(batch), False)['inputs']
    data = student(batch, False)
    before = data['inputs'].clone()
    found = convert(
        data['inputs'], data['data_samples'], student=student, teacher=teacher
    )
    torch.testing.assert_close(
        found[..., : expected.shape[2], : expected.shape[3]],
        expected,
        rtol=0,
        atol=1e-3,
    )
    assert torch.equal(data['inputs'], before)


def test_convert__leaves_the_students_images_alone():
    raw = detector_preprocessor()
    inputs = torch.ones(1, 3, 4, 4)
    sample = BaseDataElement(metainfo=dict(img_shape=(2, 3)))
    teacher = detector_preprocessor(pad_value=5)
    found = convert(inputs, [sample], student=raw, teacher=teacher)
    assert (inputs == 1).all()
    assert (found[..., :2, :3] == 1).all()
    assert found.sum() == 3 * (6 * 1 + 10 * 5)


def test_samples__are_the_students_alone():
    """Preprocessors write into them; a teacher's may pad the masks."""
    student = detector_config()
    teacher = detector_config(width=16, channels=24)
    teacher['data_preprocessor'] |= dict(pad_size_divisor=64, pad_mask=True)
    model = MODELS.build(
        distillation_config(ERA, student=student, teacher=teacher)
    )
    batch = detection_batch(2, size=60)
    for sample in batch['data_samples']:
        number = len(sample.gt_instances)
        sample.gt_instances.masks = BitmapMasks(
            np.ones((number, 60, 60), dtype=np.uint8), 60, 60
        )
    data = model.data_preprocessor(batch, True)
    assert data['teacher_inputs']['teacher'].shape[2:] == (64, 64)
    for sample in data['data_samples']:
        assert sample.gt_instances.masks.masks.shape[1:] == (60, 60)


def test_batch_augments__reach_a_teacher_that_normalises_otherwise():
    student = detector_config()
    student['data_preprocessor'] |= dict(
        batch_augments=[
            dict(
                type='BatchSyncRandomResize',
                random_size_range=(96, 96),
                interval=1,
                size_divisor=32,
            )
        ]
    )
    teacher = detector_config(width=16, channels=24)
    teacher['data_preprocessor'] |= dict(mean=[0.0] * 3, std=[1.0] * 3)
    model = MODELS.build(
        distillation_config(ERA, student=student, teacher=teacher)
    )
    MessageHub.get_current_instance().update_info('iter', 0)
    # It draws its next size at the end of a step.
    model.data_preprocessor(detection_batch(), True)
    data = model.data_preprocessor(detection_batch(), True)
    found = data['teacher_inputs']['teacher']
    assert found.shape == data['inputs'].shape == (2, 3, 96, 96)
    preprocessor = model.data_preprocessor.student
    torch.testing.assert_close(
        found, data['inputs'] * preprocessor.std + preprocessor.mean
    )
    model.train()
    losses = model(**data, mode='loss')
    assert losses['loss_era_align'] > 0


def test_batch_augments__mixed_images_are_mixed_for_the_teacher():
    student = classifier_config()
    student['data_preprocessor'] |= dict(
        mean=[10.0] * 3,
        std=[2.0] * 3,
        batch_augments=dict(augments=[dict(type='Mixup', alpha=1.0)]),
    )
    model = MODELS.build(
        distillation_config(
            ERA, student=student, teacher=classifier_config(width=16)
        )
    )
    labels = [0, 1, 2, 0, 1, 2]
    batch = dict(
        inputs=[
            torch.full((3, 32, 32), 45 * label, dtype=torch.uint8)
            for label in labels
        ],
        data_samples=[DataSample().set_gt_label(label) for label in labels],
    )
    data = model.data_preprocessor(batch, True)
    found = data['teacher_inputs']['teacher']
    torch.testing.assert_close(found, data['inputs'] * 2 + 10)
    # Mixed, with the shares that the labels have.
    shares = torch.stack([sample.gt_score for sample in data['data_samples']])
    assert ((shares > 0.001) & (shares < 0.999)).any()
    expected = 45 * shares[:, 1] + 90 * shares[:, 2]
    torch.testing.assert_close(found.mean((1, 2, 3)), expected)


def test_batch_augments__with_arithmetic_unknown_are_refused():
    student = detector_config()
    student['data_preprocessor'] |= dict(
        batch_augments=[dict(type='BatchFixedSizePad', size=(64, 64))]
    )
    model = MODELS.build(distillation_config(ERA))
    teacher = model.teachers['teacher']
    del teacher.model.data_preprocessor.pad_value
    own = MODELS.build(student).data_preprocessor
    with pytest.raises(ValueError, match='cannot be converted'):
        type(model.data_preprocessor)(own, dict(teacher=teacher))
