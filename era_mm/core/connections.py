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
            "`era_mm.Connector` is now `era_mm.Resampler`. 'Connector' goes "
            'with version 0.3.',
            logger='current',
            level=logging.WARNING,
        )
        super().__init__(**kwargs)


def _grids(feats: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(feat.shape[2:]) for feat in feats]


def _differ_by_padding(
    *, student_feats: Sequence[Tensor], teacher_feats: Sequence[Tensor]
) -> bool:
    """Whether padding explains the sizes of maps that shared a small image.

    It adds to the coarser maps no more cells than to the finest. Where it
    does, strides differ that the small image did not tell apart.
    """
    grids = zip(_grids(student_feats), _grids(teacher_feats), strict=True)
    pairs = sorted((g for g in grids if all(g)), reverse=True)
    gaps = [
        max(abs(own - theirs) for own, theirs in zip(*pair, strict=True))
        for pair in pairs
    ]
    return all(gap <= gaps[0] + 1 for gap in gaps)


class Connections:
    """Stands between the recorders and a distiller.

    Resamples the outputs of a ``source`` and cuts maps of equal stride,
    which padding made unequal, to what both have. Nothing in it learns or is
    saved.

    Source: ours.

    Args:
        config: ``resample`` of the distiller's ``source``: a dict with the
            arguments of ``Resampler`` for 'student', 'teacher' or both. None:
            no resamplers.
        student: The student's sources.
        teacher: The teacher's.
        owner: How messages call the distiller.

    Raises:
        ValueError: Other keys, or resamplers for several sources.
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
        #: Those of student and teacher; empty where there are none.
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
        """Outputs of the student's source as the distiller gets them."""
        resampler = self.resamplers.get('student')
        return tuple(feats) if resampler is None else resampler(feats)

    def connect_student(self, feats: Features) -> Features:
        """The student's features, resampled."""
        return self._apply('student', feats)

    def connect(
        self, *, student_feats: Features, teacher_feats: Features
    ) -> dict[str, Features]:
        """The features of both, resampled.

        Maps of equal stride that padding made unequal are cut to what both
        have, of whatever sources they are.

        Args:
            student_feats: The student's by source.
            teacher_feats: The teacher's.
        """
        return self._cut(
            student_feats=self._apply('student', student_feats),
            teacher_feats=self._apply('teacher', teacher_feats),
        )

    def connect_like(
        self, teacher_feats: Features, student_feats: Features
    ) -> Features:
        """Further features of the student, as beside the same teacher's."""
        feats = self.connect(
            student_feats=student_feats, teacher_feats=teacher_feats
        )
        return feats['student_feats']

    def meet(
        self, *, student_feats: Features, teacher_feats: Features
    ) -> dict[str, Features]:
        """As :meth:`connect`, for the features of the dry run.

        Both come from one image of one size, which shows the strides. What
        is resampled is logged.

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
            # What resizing rounds.
            slack=1,
        )
        for role, resampler in self.resamplers.items():
            for step in resampler.steps():
                print_log(
                    f'Resampler of the {role}: {step}.', logger='current'
                )
