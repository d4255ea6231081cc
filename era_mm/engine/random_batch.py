"""Random images with random ground truth, as a dataloader would give them."""

from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from era_mm.core.host_models import (
    image_channels,
    kind_of,
    num_classes_of,
)
from era_mm.errors import UserError

#: Sides of the boxes, relative to those of the image.
BOX_SIDES = (0.1, 0.4)


def random_batch(
    model: nn.Module,
    batch_size: int,
    size: tuple[int, int],
    objects: int,
    generator: Generator,
) -> dict[str, list]:
    """A batch for training or testing a host model.

    Detectors get boxes and labels, and rectangular masks if they have a mask
    head; classifiers get a label.

    Args:
        model: The model, whose classes and kind of ground truth are used.
        batch_size: Number of images.
        size: Height and width of each, in pixels.
        objects: Number of objects in each.
        generator: Draws all random numbers.

    Returns:
        A batch as from a dataloader: ``inputs`` and ``data_samples``.

    Shape:
        - inputs: ``batch_size`` of ``(C, H, W)``, uint8; C as the model's
          images have

    Raises:
        UserError: The model is neither detector nor classifier, or its number
            of classes is not known.
    """
    kind, num_classes = kind_of(model), num_classes_of(model)
    if kind not in ('detector', 'classifier'):
        raise UserError(
            'config: expected a detector of mmdet or a classifier of '
            f'mmpretrain as student, but it is a {kind}. Random ground truth '
            'is not supported for others.'
        )
    if num_classes is None:
        raise UserError(
            'config: expected a student whose head tells its number of '
            f'classes, but the head of {type(model).__name__} has no '
            '`num_classes`. Random ground truth is not supported without it.'
        )
    inputs, samples = [], []
    for index in range(batch_size):
        inputs.append(
            torch.randint(
                256,
                (image_channels(model), *size),
                generator=generator,
                dtype=torch.uint8,
            )
        )
        labels = torch.randint(
            num_classes,
            (objects if kind == 'detector' else 1,),
            generator=generator,
        )
        if kind == 'detector':
            masks = getattr(model, 'with_mask', False)
            sample = _detection_sample(labels, size, masks, generator)
        else:
            sample = _class_sample(labels)
        sample.set_metainfo(
            dict(
                img_id=index,
                img_shape=size,
                ori_shape=size,
                pad_shape=size,
                scale_factor=(1.0, 1.0),
            )
        )
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def _detection_sample(
    labels: Tensor,
    size: tuple[int, int],
    with_masks: bool,
    generator: Generator,
) -> Any:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    height, width = size
    scale = torch.tensor([width, height], dtype=torch.float32)
    least, most = BOX_SIDES
    random = torch.rand(2, len(labels), 2, generator=generator)
    extents = (least + (most - least) * random[0]) * scale
    corners = random[1] * (scale - extents)
    boxes = torch.cat([corners, corners + extents], dim=1)
    sample = DetDataSample()
    sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
    if with_masks:
        masks = np.zeros((len(labels), height, width), dtype=np.uint8)
        for mask, (x1, y1, x2, y2) in zip(
            masks, boxes.round().int().tolist(), strict=True
        ):
            mask[y1:y2, x1:x2] = 1
        sample.gt_instances.masks = BitmapMasks(masks, height, width)
    sample.ignored_instances = InstanceData(
        bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
    )
    return sample


def _class_sample(labels: Tensor) -> Any:
    from mmpretrain.structures import DataSample

    return DataSample().set_gt_label(labels)
