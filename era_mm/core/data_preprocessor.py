"""One raw batch, preprocessed for the student and for each teacher."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn
from torch.nn.functional import pad

from .host_models import images_for, three_channels
from .teacher import BaseTeacher

#: Settings that do not change the images.
_NOT_OF_IMAGES = {
    '_device',
    '_non_blocking',
    'batch_augments',
    'init_cfg',
    # Labels and masks.
    'boxtype2tensor',
    'mask_pad_value',
    'num_classes',
    'pad_mask',
    'pad_seg',
    'seg_pad_value',
    'to_onehot',
}


def _settings(preprocessor: nn.Module) -> dict[str, Any]:
    """The settings that determine a preprocessor's images, unaugmented."""
    # mmengine keeps some of them under private names (the channel order).
    settings = {
        key: value
        for key, value in vars(preprocessor).items()
        if key not in _NOT_OF_IMAGES | set(vars(nn.Module()))
    }
    for key, value in preprocessor.named_buffers():
        settings[key] = value.flatten().tolist()
    return settings | {'type': type(preprocessor)}


def differences(
    student: nn.Module, teacher: nn.Module
) -> dict[str, tuple[Any, Any]]:
    """The settings in which student's and teacher's preprocessor differ.

    Empty if both make the same images.
    """
    own, theirs = _settings(student), _settings(teacher)
    return {
        key.lstrip('_'): (own.get(key), theirs.get(key))
        for key in own | theirs
        if own.get(key) != theirs.get(key)
    }


def convert(
    inputs: Tensor,
    data_samples: Sequence[Any],
    *,
    student: nn.Module,
    teacher: nn.Module,
) -> Tensor:
    """A student's batch as the teacher's preprocessor would have made it.

        x_t = (flip(x_s * std_s + mean_s) - mean_t) / std_t

    with the teacher's padding. It is for batches that were augmented after
    preprocessing: scaling and mixing images commute with it.

    Source: ours.

    Args:
        inputs: The output of the student's preprocessor.
        data_samples: Their ``img_shape`` tells the image from the padding.
        student: The student's preprocessor.
        teacher: The teacher's.

    Shape:
        - inputs: ``(N, 3, H, W)``
        - out: ``(N, 3, H', W')``, larger where the teacher's divisor asks
          for it
    """
    images = inputs
    if 'mean' in dict(student.named_buffers()):
        images = images * student.std + student.mean
    if _flips(student) != _flips(teacher):
        images = images.flip(1)
    if len(getattr(teacher, 'mean', ())) == 3:
        images = three_channels(images)
    if 'mean' in dict(teacher.named_buffers()):
        images = (images - teacher.mean) / teacher.std
    divisor = teacher.pad_size_divisor
    height, width = images.shape[-2:]
    # Makes a copy, also where there is nothing to pad.
    images = pad(
        images,
        (0, -width % divisor, 0, -height % divisor),
        value=teacher.pad_value,
    )
    for image, sample in zip(images, data_samples, strict=True):
        height, width = sample.metainfo.get('img_shape', (height, width))[:2]
        image[:, height:] = teacher.pad_value
        image[:, :, width:] = teacher.pad_value
    return images


def _flips(preprocessor: nn.Module) -> bool:
    """Whether it reverses the channels; mmpretrain's, then mmengine's."""
    settings = vars(preprocessor)
    return settings.get('to_rgb', settings.get('_channel_conversion', False))


class DistillationDataPreprocessor(BaseDataPreprocessor):
    """The student's preprocessor, which also makes the teachers' inputs.

    A teacher whose preprocessor makes the same images gets the student's
    tensors, batch augmentation (mixup, multi-scale) included. Any other
    teacher gets the raw batch through its own preprocessor or, if the
    student has batch augmentation, the student's augmented batch converted
    by :func:`convert`. If the student's images are grey, a teacher of RGB
    images gets their channel three times (``three_channels``).

    Source: ours.

    Args:
        student: The student's preprocessor.
        teachers: The teachers by name.

    Raises:
        ValueError: The student has batch augmentation, and the arithmetic of
            one of the two preprocessors is not known.
    """

    def __init__(
        self, student: nn.Module, teachers: Mapping[str, BaseTeacher]
    ) -> None:
        super().__init__()
        self.student = student
        self._own: dict[str, BaseTeacher] = {
            name: teacher
            for name, teacher in teachers.items()
            if differences(student, teacher.model.data_preprocessor)
        }
        self._check_augments()

    def _augments(self) -> bool:
        """Whether batches are augmented now; hooks of mmpretrain set it."""
        return getattr(self.student, 'batch_augments', None) is not None

    def _check_augments(self) -> None:
        """Refuse augmented batches that cannot be made for a teacher."""
        if not self._augments():
            return
        for name, teacher in self._own.items():
            preprocessor = teacher.model.data_preprocessor
            if not all(
                hasattr(known, 'pad_value')
                for known in (self.student, preprocessor)
            ):
                raise ValueError(
                    f'The {name} has another data_preprocessor than the '
                    'student, and the student has `batch_augments`, which '
                    f'the teacher has to see. Batches of '
                    f'{type(self.student).__name__} cannot be converted to '
                    f'{type(preprocessor).__name__}: remove '
                    '`batch_augments`, or use a teacher with the '
                    "student's preprocessing."
                )

    def __getattr__(self, name: str) -> Any:
        # Host code reads mean, std or padding from a model's preprocessor.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'student':
                raise
            return getattr(self.student, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Hooks of the hosts switch settings such as `batch_augments`.
        student = self.__dict__.get('_modules', {}).get('student')
        if (
            student is None
            or name in self.__dict__
            or not hasattr(student, name)
        ):
            super().__setattr__(name, value)
            return
        setattr(student, name, value)
        self._check_augments()

    def forward(self, data: Any, training: bool = False) -> Any:
        """Preprocess a batch.

        Args:
            data: What the dataloader gives.
            training: In training the result has ``teacher_inputs``, a dict
                with an entry for each teacher whose tensors differ from the
                student's.
        """
        if not training:
            return self.student(data, training)
        return self.with_teachers(data, training)

    def with_teachers(self, data: Any, training: bool) -> Any:
        """Preprocess a batch for the student and for the teachers.

        Args:
            data: What the dataloader gives.
            training: Whether the student's batch is augmented.

        Returns:
            As :meth:`forward` in training.
        """
        if not self._own:
            return self.student(data, training)
        own = {
            name: teacher.model.data_preprocessor
            for name, teacher in self._own.items()
        }
        if self._augments():
            data = self.student(data, training)
            teacher_inputs = {
                name: convert(
                    data['inputs'],
                    data['data_samples'],
                    student=self.student,
                    teacher=preprocessor,
                )
                for name, preprocessor in own.items()
            }
            return {**data, 'teacher_inputs': teacher_inputs}
        teacher_inputs = {}
        for name, preprocessor in own.items():
            # Preprocessors write into the data samples.
            samples = copy.deepcopy(data.get('data_samples'))
            raw = {**data, 'data_samples': samples}
            raw['inputs'] = images_for(self._own[name].model, data['inputs'])
            teacher_inputs[name] = preprocessor(raw, False)['inputs']
        data = self.student(data, training)
        return {**data, 'teacher_inputs': teacher_inputs}
