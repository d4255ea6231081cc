"""Routes features of student and teachers to the distillers."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base_distiller import BaseDistiller, Features
from .dry_run import at_first_size, explained, head_runs, trial_sizes
from .host_models import (
    blank_sample,
    forward_until,
    image_channels,
    images_for,
)
from .recorder import Recorder
from .teacher import BaseTeacher
from .utils import evaluating

#: The student's features by source, and those of each teacher.
Recorded = tuple[Features, Mapping[str, Features]]
Shapes = dict[str, list[tuple[int, ...]]]


def _shapes_of(feats: Features) -> Shapes:
    return {
        source: [tuple(level.shape) for level in levels]
        for source, levels in feats.items()
    }


def _channels(number: int) -> str:
    return 'one channel' if number == 1 else f'{number} channels'


class Wiring:
    """Records a student's and its teachers' features for the distillers.

    A dry run on a blank image prepares each distiller for its pair.

    Source: ours.

    Args:
        student: The student.
        teachers: The teachers by name.
        distillers: The distillers by name; an ``nn.ModuleDict``, which
            copies of the model share.
        input_size: Height and width of the image of the dry run, in pixels;
            or one number for both. None: the first usual size that all models
            accept, the teachers' dense heads included. It has as many
            channels as the student's images.

    Raises:
        ValueError: A distiller without its teacher, or with one that learns
            though it must not, a teacher of images with other channels,
            sources that do not exist, or pairs that do not fit.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        teachers: Mapping[str, BaseTeacher],
        distillers: Mapping[str, BaseDistiller],
        input_size: int | tuple[int, int] | None,
    ) -> None:
        self._student = student
        self._teachers = dict(teachers)
        self._distillers = distillers
        self._check_teachers()
        self._check_images()
        for distiller in distillers.values():
            distiller.choose_sources(**self._pair_of(distiller))
        self._check_moved()
        #: Height and width of the dry run's image.
        self.input_size, feats = at_first_size(
            self._sizes(input_size), self._dry_run, self._heads_run
        )
        #: Shapes of each source of the student there, one per level.
        self.student_shapes: Shapes = _shapes_of(feats[0])
        #: The same for each teacher.
        self.teacher_shapes: dict[str, Shapes] = {
            name: _shapes_of(theirs) for name, theirs in feats[1].items()
        }
        for distiller in distillers.values():
            met: dict[str, Any] = distiller.connections.meet(
                **self.feats_of(distiller, feats)
            )
            distiller.prepare(**self._pair_of(distiller), **met)
            distiller.set_up_inner()
            distiller.check_early()
        #: Records the student's sources.
        # Again: a distiller may drop sources when it meets the pair.
        self.recorder = self._listen_to_all()

    def _check_teachers(self) -> None:
        for distiller in self._distillers.values():
            if distiller.needs_teacher and (
                distiller.teacher not in self._teachers
            ):
                raise ValueError(
                    f'{type(distiller).__name__} learns from a teacher named '
                    f'{distiller.teacher!r}, but the model has '
                    f'{sorted(self._teachers) or "none"}. Set '
                    '`model.teacher`.'
                )
            if distiller.needs_frozen_teacher and any(
                parameter.requires_grad
                for parameter in self._teachers[
                    distiller.teacher
                ].model.parameters()
            ):
                raise ValueError(
                    f'{type(distiller).__name__} needs a teacher that does '
                    'not change, but this one learns. MutualDistillation '
                    'needs another method on features or logits, such as '
                    'era_mm.IEKDDistiller or era_mm.LogitDistiller.'
                )

    def _check_images(self) -> None:
        """Refuse teachers that cannot take the student's images."""
        own = image_channels(self._student)
        for name, teacher in self._teachers.items():
            theirs = image_channels(teacher.model)
            if theirs != own and (own, theirs) != (1, 3):
                raise ValueError(
                    f'The {name} is for images of {_channels(theirs)}, and '
                    f"the student's have {own}. Both have to see the same "
                    'images; only a grey student may have a teacher of RGB '
                    'ones, which gets its one channel three times. Correct '
                    '`in_channels` of a backbone, or give another teacher.'
                )

    def _check_moved(self) -> None:
        """Refuse sources that a method has moved, and give the new name."""
        for mover in self._distillers.values():
            for source, place in mover.moved_sources.items():
                for name, distiller in self._distillers.items():
                    if source in distiller.student_sources:
                        raise ValueError(
                            f'Distiller {name!r} ({type(distiller).__name__}) '
                            f'reads {source!r} of the student, which '
                            f'{type(mover).__name__} has replaced by '
                            f'{place!r}. Set source=dict(student={place!r}, '
                            f'teacher={source!r}).'
                        )

    def _pair_of(self, distiller: BaseDistiller) -> dict[str, Any]:
        return dict(
            student=self._student,
            teacher=self._teachers[distiller.teacher].model
            if distiller.needs_teacher
            else None,
        )

    def _listen_to_all(self) -> Recorder:
        return self.listen(
            source
            for distiller in self._distillers.values()
            for source in distiller.student_sources
        )

    def _sizes(
        self, given: int | tuple[int, int] | None
    ) -> list[tuple[int, int]]:
        if given is None:
            return [(side, side) for side in trial_sizes(self._student)]
        height, width = (given, given) if isinstance(given, int) else given
        return [(height, width)]

    def _heads_run(self, found: tuple[tuple[int, int], Recorded]) -> bool:
        """Whether each teacher's head accepts what the dry run found."""
        _, (_, teacher_feats) = found
        return all(
            head_runs(self._teachers[name].model, feats)
            for name, feats in teacher_feats.items()
        )

    def _dry_run(
        self, size: tuple[int, int]
    ) -> tuple[tuple[int, int], Recorded]:
        channels = image_channels(self._student)
        inputs = torch.zeros(1, channels, *size)
        samples = [blank_sample(*size)]
        recorder = self._listen_to_all()
        own = explained('student', tuple(inputs.shape[1:]))
        with own, torch.no_grad(), evaluating(self._student), recorder:
            forward_until(self._student, inputs, recorder.sources, samples)
        student_feats = recorder.pop()
        teacher_feats = {}
        for name, teacher in self._teachers.items():
            teacher.record(
                dict.fromkeys(
                    source
                    for distiller in self._distillers.values()
                    if distiller.teacher == name
                    for source in distiller.teacher_sources
                )
            )
            if teacher.is_recorded:
                theirs = images_for(teacher.model, inputs)
                with explained(name, tuple(theirs.shape[1:])):
                    teacher_feats[name] = teacher.extract(theirs, samples)
        return size, (student_feats, teacher_feats)

    def listen(self, sources: Iterable[str]) -> Recorder:
        """A recorder for some of the student's sources, each once."""
        return Recorder(self._student, dict.fromkeys(sources), owner='student')

    def teach(
        self,
        inputs: Tensor,
        data_samples: list | None,
        teacher_inputs: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Features]:
        """The features of each teacher that is needed in this step.

        Args:
            inputs: The student's batch.
            data_samples: Ground truth and meta data.
            teacher_inputs: Batches of teachers whose tensors differ.
        """
        own = teacher_inputs or {}
        return {
            name: teacher.extract(
                images_for(teacher.model, own.get(name, inputs)),
                data_samples,
            )
            for name, teacher in self._teachers.items()
            # Not a teacher that only gives inherited weights.
            if teacher.is_recorded
        }

    def feats_of(
        self, distiller: BaseDistiller, recorded: Recorded
    ) -> dict[str, Features]:
        """The recorded features for one distiller, not yet resampled.

        Args:
            distiller: One of the distillers.
            recorded: The student's features by source, and those of each
                teacher.
        """
        student_feats, teacher_feats = recorded
        return {
            'student_feats': {
                source: student_feats[source]
                for source in distiller.student_sources
            },
            'teacher_feats': {
                source: teacher_feats[distiller.teacher][source]
                for source in distiller.teacher_sources
            },
        }
