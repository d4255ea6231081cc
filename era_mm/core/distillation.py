"""The model that mmengine trains, from configs."""

from collections.abc import Mapping, Sequence

from ..registry import MODELS
from .build import (
    Inheritance,
    build_distillers,
    build_student,
    build_teachers,
)
from .step import DistilledStudent
from .teacher import Teacher


@MODELS.register_module()
class Distillation(DistilledStudent):
    """Trains a student with distillers; in all else it *is* the student.

        loss = student's own losses + the distillers' losses
        predict, tensor = the student's, unchanged

    With all distillation weights 0, losses and weights equal those of the
    plain student, bit for bit: building and initialising teacher and
    distillers does not change the random state of the student's run.

    Its attributes, parameter names and ``state_dict`` are the student's own;
    see ``StudentModel``.

    Source: ours.

    Args:
        student: A host model config, as in the user's own config, or a
            reference ('mmdet::...' or a path).
        distiller: One distiller config, or a dict of named ones. None only
            with ``inherit``: the student is then trained without distillation
            from inherited weights.
        teacher: Arguments of :class:`~era_mm.core.teacher.Teacher`
            (``config``, ``checkpoint``, ``dtype``), or a dict of named ones;
            None for methods that need none.
        data_preprocessor: The student's, where the host keeps it outside the
            model (mmpretrain).
        input_size: Height and width of the image of the dry run, in pixels.
            None: the first of the usual sizes (detectors: 256, 512, 1024;
            classifiers: 224, 256, 384, 32) that student and teachers accept.
        inference_mode: The predictions that :meth:`predict` returns: None or
            'S' for the student's own, or one of the distillers' modes.
        inherit: Modules of the student that start from the teacher's weights
            where names and shapes match, such as ``['neck', 'bbox_head']``;
            a list or, with several teachers, a dict from module to teacher.
            They stay trainable. None: all start as in a plain run. [ours];
            MGD and others in the lineage start detectors so.

    Raises:
        ValueError: Pairs that do not fit, sources that do not exist, a
            distiller without its teacher, or an inherited module of which no
            tensor matches the teacher's.
    """

    teachers: Mapping[str, Teacher]

    def __init__(
        self,
        student: dict | str,
        distiller: dict | None = None,
        teacher: dict | None = None,
        data_preprocessor: dict | None = None,
        input_size: int | tuple[int, int] | None = None,
        inference_mode: str | None = None,
        inherit: str | Sequence[str] | dict[str, str] | None = None,
    ) -> None:
        distillers = build_distillers(distiller)
        # The student comes first: it must see the random state of a plain
        # run. Teachers and dry run do not change it.
        built = build_student(student, data_preprocessor, distillers)
        teachers = build_teachers(teacher)
        super().__init__(
            built,
            teachers=teachers,
            distillers=distillers,
            inheritance=Inheritance(
                inherit, student=built.module, teachers=teachers
            ),
            input_size=input_size,
        )
        if inference_mode not in (None, 'S'):
            self.check_modes([inference_mode])
            self.inference_mode = inference_mode
