"""Whether features of two models are comparable, and what makes them so."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from torch import Tensor

from ..layers import Resampler, check_alike, crop_to_common
from ..registry import MODELS

Features = Mapping[str, tuple[Tensor, ...]]

# Layers import nothing of ours; as a neck they are looked up by name.
MODELS.register_module(module=Resampler)


@MODELS.register_module()
class Connector(Resampler):
    """The former name of ``Resampler``, in exported configs. Deprecated.

    Args:
        kwargs: As in ``Resampler``.
    """

    def __init__(self, **kwargs: Any) -> None:
        print_log(
            "`era_mm.Connector` is now `era_mm.Resampler`. 'Connector' will "
            'be removed in version 0.3.',
            logger='current',
            level=logging.WARNING,
        )
        super().__init__(**kwargs)


def split_source(
    source: str | Sequence[str] | Mapping[str, Any], *, has_teacher: bool
) -> tuple[tuple[str, ...], tuple[str, ...], Mapping | None]:
    """Sources of student and teacher, and how to resample them.

    Args:
        source: See ``BaseDistiller``.
        has_teacher: Whether there is a teacher; else it has no sources.

    Returns:
        The student's sources, the teacher's, and ``resample`` or None.

    Raises:
        ValueError: A dict with other keys.
    """
    pair: Mapping[str, Any] = (
        source
        if isinstance(source, Mapping)
        else {'student': source, 'teacher': source}
    )
    if 'connector' in pair and 'resample' not in pair:
        print_log(
            '`source.connector` is now `source.resample`, with the same '
            "arguments. 'connector' will be removed in version 0.3.",
            logger='current',
            level=logging.WARNING,
        )
        pair = {
            'resample' if key == 'connector' else key: value
            for key, value in pair.items()
        }
    roles = ('student', 'teacher') if has_teacher else ('student',)
    if not set(roles) <= set(pair) <= {'student', 'teacher', 'resample'}:
        raise ValueError(
            '`source` must be a module name, a list of them, or '
            f'dict(student=..., teacher=...), but got {source!r}.'
        )
    named = {
        role: (pair[role],)
        if isinstance(pair[role], str)
        else tuple(pair[role])
        for role in roles
    }
    return named['student'], named.get('teacher', ()), pair.get('resample')


def _grids(feats: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(feat.shape[2:]) for feat in feats]


def _differ_by_padding(
    *, student_feats: Sequence[Tensor], teacher_feats: Sequence[Tensor]
) -> bool:
    """Whether padding can explain how the sizes of two models' maps differ.

    Padding adds no more cells to a coarse map than to the finest. If a
    coarse map differs by more, its strides differ, which the small image of
    the dry run did not show.
    """
    grids = zip(_grids(student_feats), _grids(teacher_feats), strict=True)
    pairs = sorted((g for g in grids if all(g)), reverse=True)
    gaps = [
        max(abs(own - theirs) for own, theirs in zip(*pair, strict=True))
        for pair in pairs
    ]
    return all(gap <= gaps[0] + 1 for gap in gaps)


class Connections:
    """Makes recorded features comparable before a distiller gets them.

    Resamples the outputs of a ``source``, and crops maps of equal stride to
    their common size where padding made it differ. It has no parameters, and
    nothing of it is saved.

    Source: ours.

    Args:
        config: ``resample`` of the distiller's ``source``: a dict with the
            arguments of ``Resampler`` for 'student', 'teacher' or both. None:
            nothing is resampled.
        student: The student's sources.
        teacher: The teacher's sources.
        owner: What messages call the distiller.

    Raises:
        ValueError: Unknown keys, or resampling of several sources.
    """

    def __init__(
        self,
        config: Mapping | None,
        *,
        student: Sequence[str],
        teacher: Sequence[str],
        owner: str,
    ) -> None:
        self._sources = {'student': tuple(student), 'teacher': tuple(teacher)}
        self._owner = owner
        #: By role, 'student' and 'teacher'; empty if nothing is resampled.
        self.resamplers: dict[str, Resampler] = {}
        #: Sources of student and teacher whose maps have the same strides.
        self._of_one_grid: list[tuple[str, str]] = []
        if config is None:
            return
        if not set(config) <= set(self._sources) or any(
            len(names) != 1 for names in self._sources.values()
        ):
            raise ValueError(
                '`source.resample` must be dict(student=..., teacher=...) '
                'with the arguments of Resampler, and student and teacher '
                f'one module name each, but got {config!r} for '
                f'{self._sources}.'
            )
        self.resamplers = {
            role: Resampler(**(config.get(role) or {}))
            for role in self._sources
        }

    def connected(self, feats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Outputs of the student's source, resampled."""
        resampler = self.resamplers.get('student')
        return tuple(feats) if resampler is None else resampler(feats)

    def connect_student(self, feats: Features) -> Features:
        """The student's features, resampled."""
        return self._apply('student', feats)

    def connect(
        self, *, student_feats: Features, teacher_feats: Features
    ) -> dict[str, Features]:
        """The features of both, resampled and cropped to a common size.

        Maps of all pairs of sources with equal strides are cropped, where
        padding made their sizes differ.

        Args:
            student_feats: The student's features by source.
            teacher_feats: The teacher's features by source.
        """
        return self._cut(
            student_feats=self._apply('student', student_feats),
            teacher_feats=self._apply('teacher', teacher_feats),
        )

    def connect_like(
        self, teacher_feats: Features, student_feats: Features
    ) -> Features:
        """Other features of the student, cropped like those of the step."""
        feats = self.connect(
            student_feats=student_feats, teacher_feats=teacher_feats
        )
        return feats['student_feats']

    def meet(
        self, *, student_feats: Features, teacher_feats: Features
    ) -> dict[str, Features]:
        """As :meth:`connect`, for the features of the dry run.

        Both models get one image of the same size, which shows the strides.
        Logs how features are resampled.

        Raises:
            ValueError: Once resampled, maps differ by more than rounding.
        """
        feats = dict(
            student_feats=self._apply('student', student_feats),
            teacher_feats=self._apply('teacher', teacher_feats),
        )
        self._note_grids(**feats)
        return self._cut(**feats)

    def _apply(self, role: str, feats: Features) -> Features:
        if role not in self.resamplers:
            return feats
        (source,) = self._sources[role]
        if source not in feats:
            raise ValueError(
                f'{self._owner} reads {list(feats)} of the {role}, not '
                f'{source!r}, so `source.resample` has nothing to resample. '
                'Remove it.'
            )
        return {**feats, source: self.resamplers[role](feats[source])}

    def _cut(
        self, *, student_feats: Features, teacher_feats: Features
    ) -> dict[str, Features]:
        own_feats, their_feats = dict(student_feats), dict(teacher_feats)
        for own, theirs in self._of_one_grid:
            if own not in own_feats:
                # A distiller left it out after the dry run.
                continue
            maps = dict(
                student_feats=own_feats[own], teacher_feats=their_feats[theirs]
            )
            if self.resamplers or _differ_by_padding(**maps):
                own_feats[own], their_feats[theirs] = crop_to_common(**maps)
        return dict(student_feats=own_feats, teacher_feats=their_feats)

    def _note_grids(
        self, *, student_feats: Features, teacher_feats: Features
    ) -> None:
        """Note which sources have the same strides, from one image."""
        if self.resamplers:
            (own,), (theirs,) = self._sources.values()
            self._check_connected(
                student_feats=student_feats[own],
                teacher_feats=teacher_feats[theirs],
            )
            self._of_one_grid = [(own, theirs)]
            return
        self._of_one_grid = [
            (own, theirs)
            for own, theirs in itertools.product(student_feats, teacher_feats)
            if _grids(student_feats[own]) == _grids(teacher_feats[theirs])
        ]

    def _check_connected(self, **feats: tuple[Tensor, ...]) -> None:
        own, theirs = (
            [tuple(feat.shape) for feat in maps] for maps in feats.values()
        )
        check_alike(
            own,
            theirs,
            names=(
                'Once resampled, on one image, the student',
                'the teacher',
            ),
            advice='Correct `source.resample`; tools/print_sources.py shows '
            'the strides.',
            # Rounding of resized maps.
            slack=1,
        )
        for role, resampler in self.resamplers.items():
            for step in resampler.steps():
                print_log(
                    f'Resampling of the {role}: {step}.', logger='current'
                )
