"""One raw batch, preprocessed for the student and for each teacher."""

import copy
from collections.abc import Mapping
from typing import Any

from mmengine.model import BaseDataPreprocessor
from torch import nn

from .teacher import Teacher


def _settings(preprocessor: nn.Module) -> dict[str, Any]:
    """What decides a preprocessor's output, augmentation aside."""
    # mmengine keeps some of them under private names (the channel order).
    other = {'_device', '_non_blocking', 'batch_augments', 'init_cfg'}
    settings = {
        key: value
        for key, value in vars(preprocessor).items()
        if key not in other | set(vars(nn.Module()))
    }
    for key, value in preprocessor.named_buffers():
        settings[key] = value.flatten().tolist()
    return settings | {'type': type(preprocessor)}


class DistillationDataPreprocessor(BaseDataPreprocessor):
    """The student's preprocessor, with the teachers' inputs beside.

    A teacher whose own preprocessor has the student's settings gets the
    student's tensors, batch augmentation (mixup, multi-scale) included; any
    other gets the raw batch through its own preprocessor.

    Source: ours.

    Args:
        student: The student's preprocessor.
        teachers: The teachers by name.

    Raises:
        ValueError: A teacher normalises otherwise while the student has batch
            augmentation: the teacher would see other images.
    """

    def __init__(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        super().__init__()
        self.student = student
        self._own: dict[str, Teacher] = {}
        for name, teacher in teachers.items():
            preprocessor = teacher.model.data_preprocessor
            if _settings(preprocessor) == _settings(student):
                continue
            if getattr(student, 'batch_augments', None) is not None:
                raise ValueError(
                    f'The {name} has another data_preprocessor than the '
                    'student, and the student has `batch_augments`, which '
                    'the teacher would not see. Remove `batch_augments`, or '
                    'use a teacher with the same mean, std and padding.'
                )
            self._own[name] = teacher

    def __getattr__(self, name: str) -> Any:
        # Host code asks a model's preprocessor for mean, std or the padding.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'student':
                raise
            return getattr(self.student, name)

    def forward(self, data: Any, training: bool = False) -> Any:
        """Preprocess a batch.

        Args:
            data: What the dataloader gives.
            training: In training the result has ``teacher_inputs``, a dict
                with an entry for each teacher that sees other tensors than
                the student.
        """
        teacher_inputs = {}
        if training:
            for name, teacher in self._own.items():
                # Preprocessors write into the data samples.
                own = {
                    **data,
                    'data_samples': copy.deepcopy(data.get('data_samples')),
                }
                preprocessor = teacher.model.data_preprocessor
                teacher_inputs[name] = preprocessor(own, False)['inputs']
        data = self.student(data, training)
        if teacher_inputs:
            data['teacher_inputs'] = teacher_inputs
        return data
