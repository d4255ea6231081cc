"""Finds out how two host models fit together, by running both once.

A method's ``plan_for`` asks a :class:`Pair` for a :class:`Match`: which
outputs of student and teacher are paired, and how they are resampled. Nothing
is guessed from names or configs.

Legend: a *source* is a dotted module name; a *stride* is the side of the
image divided by that of the map.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from era_mm.core.dry_run import at_first_size, head_runs, trial_sizes
from era_mm.engine.measure import Feats, Member, observe
from era_mm.errors import UserError
from era_mm.layers import Resampler, crop_to_common

#: Strides that differ by less than this factor count as equal.
SAME_STRIDE = 1.25


class Side(NamedTuple):
    """One model's side of a match.

    Args:
        source: One module or several.
        feats: Outputs for the trial image, of several modules concatenated.
        resample: Arguments of ``Resampler``.
    """

    source: str | list[str]
    feats: Feats
    resample: dict[str, Any]


@dataclass(frozen=True)
class Match:
    """Pairs of outputs of two models.

    Args:
        student: The student's side.
        teacher: The teacher's side.
        input_size: Side of the trial image, in pixels.
    """

    student: Side
    teacher: Side
    input_size: int

    @property
    def resample(self) -> dict[str, dict]:
        """The ``resample`` of a ``source``; empty where none is needed."""
        sides = {'student': self.student, 'teacher': self.teacher}
        return {
            role: side.resample
            for role, side in sides.items()
            if side.resample
        }

    def config(self) -> dict[str, Any]:
        """``source`` as a distiller takes it; empty if it is 'neck'."""
        names = (self.student.source, self.teacher.source)
        if self.resample:
            return {
                'source': dict(
                    student=names[0],
                    teacher=names[1],
                    resample=self.resample,
                )
            }
        if names[0] != names[1]:
            return {'source': dict(student=names[0], teacher=names[1])}
        return {} if names[0] == 'neck' else {'source': names[0]}

    def feats(self) -> tuple[Feats, Feats]:
        """The trial image's features as the distiller would get them."""
        student, teacher = (
            Resampler(**side.resample)(side.feats)
            for side in (self.student, self.teacher)
        )
        return crop_to_common(student_feats=student, teacher_feats=teacher)

    def pairs(self) -> list[tuple[int, int, float]]:
        """Student's output, teacher's output and the resizing factor."""
        chosen = [
            side.resample.get('levels', range(len(side.feats)))
            for side in (self.student, self.teacher)
        ]
        scales = self.student.resample.get('scales', [1] * len(chosen[0]))
        return list(zip(*chosen, scales, strict=True))

    def stride(self, side: Side, level: int) -> float | None:
        """Stride of an output of one side; None if it has no positions."""
        feat = side.feats[level]
        if feat.dim() == 3 and side.resample.get('tokens') == 'map':
            extra = side.resample.get('num_extra', 1)
            return self.input_size / math.isqrt(feat.shape[1] - extra)
        return self.input_size / feat.shape[2] if feat.dim() == 4 else None

    def unused(self) -> list[str]:
        """Outputs of either model without a partner."""
        found = []
        for index, side in enumerate((self.student, self.teacher)):
            used = {pair[index] for pair in self.pairs()}
            for level in range(len(side.feats)):
                if level not in used:
                    stride = self.stride(side, level)
                    at = f' (stride {stride:g})' if stride else ''
                    role = ('student', 'teacher')[index]
                    found.append(f'{role} {side.source}[{level}]{at}')
        return found


@dataclass
class Pair:
    """Two models that were run on one image.

    Args:
        student: The one to be trained.
        teacher: The one to learn from.
        input_sizes: Sides of the trial image, tried in this order. The first
            that both models accept is used, the teacher's head included if
            there is one. None: the usual ones for their kind.

    Raises:
        UserError: One is a detector and the other a classifier, or there is
            no image that both accept.
    """

    student: Member
    teacher: Member
    input_sizes: Sequence[int] | None = None
    input_size: int = field(init=False)

    def __post_init__(self) -> None:
        kinds = [member.kind for member in (self.student, self.teacher)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f'teacher: the student ({self.student.name}) is a '
                f'{kinds[0]}, but the teacher ({self.teacher.name}) a '
                f'{kinds[1]}. Their features and labels are not comparable: '
                f'give a {kinds[0]} as teacher.'
            )
        own, theirs = self.student.channels, self.teacher.channels
        if own != theirs and (own, theirs) != (1, 3):
            raise UserError(
                f'teacher: {self.teacher.name} takes images of {theirs} '
                f'channels, and the student ({self.student.name}) of {own}. '
                'Both have to see the same images; only a grey student may '
                'have a teacher of RGB ones. Correct `in_channels` of a '
                'backbone, or give another teacher.'
            )
        self.is_detector = kinds[0] == 'detector'
        sizes = self.input_sizes or trial_sizes(self.student.model)
        members = (self.student, self.teacher)

        def run(size: int) -> tuple[int, list[dict[str, Feats]]]:
            for member in members:
                try:
                    member.measure(size)
                except Exception as cause:
                    raise UserError(
                        f'{member.role}: {member.name} cannot run on an image '
                        f'of {size}x{size} with {member.channels} channels '
                        f'(tried: {list(sizes)}): {type(cause).__name__}: '
                        f'{cause}. Both models must accept the images of the '
                        "student's pipeline."
                    ) from cause
            return size, [member.feats for member in members]

        self.input_size, feats = at_first_size(
            sizes,
            run,
            lambda found: head_runs(self.teacher.model, found[1][1]),
        )
        for member, seen in zip(members, feats, strict=True):
            member.feats = seen

    def check_training(self, match: Match) -> None:
        """Refuse a student whose outputs differ between training and test.

        The match was made with its outputs at inference. Sources after the
        neck are not checked: heads need labels in training.

        Raises:
            UserError: Its source outputs more images, levels or channels in
                training, or it cannot run.
        """
        source, member = match.student.source, self.student
        names = [source] if isinstance(source, str) else source
        if not {name.partition('.')[0] for name in names} <= {
            'backbone',
            'neck',
        }:
            return
        try:
            outputs = observe(
                member.model, names, self.input_size, training=True
            ).outputs
            found = [o for name in names for o in outputs.get(name, ())]
        # Whatever a host raises.
        except Exception as error:
            raise UserError(
                f'student: {member.name} cannot run in training mode '
                f'on two images of {self.input_size}x{self.input_size}: '
                f'{type(error).__name__}: {error}. Correct its config.'
            ) from error
        expected = [(2, *feat.shape[1:]) for feat in match.student.feats]
        shapes = [tuple(feat.shape) for feat in found]
        if shapes != expected:
            raise UserError(
                f'student: expected {source!r} of {member.name} to output '
                f'the same in training as at inference, {expected} for two '
                f'images, but got {shapes}. The teacher has no counterpart '
                'to that; choose another student. (It can be used as a '
                'teacher: teachers run as at inference.)'
            )

    def match(
        self,
        *,
        maps: bool = False,
        encoder: bool = False,
        cover: bool = False,
    ) -> Match:
        """Find what to distil.

        Detectors: the maps of the necks (of the backbones if there are no
        necks). Levels of equal stride are paired; if the models share no
        stride, every level of the teacher is paired with the student's
        nearest, resized. Classifiers: the pooled features, or any other input
        of the teacher's head.

        Args:
            maps: Use maps for classifiers as well; a transformer's tokens are
                arranged as a map.
            encoder: Use the encoders' tokens of two DETR-like detectors.
            cover: Pair every level of the teacher with one of the student, as
                the teacher's head needs.

        Raises:
            UserError: Nothing fits.
        """
        if encoder and self._encoders_agree():
            return self._matched('encoder', 'encoder')
        if self.is_detector:
            return self._match_maps(cover=cover)
        teacher = self.teacher.feats.get(self.teacher.feeds_head) or ()
        reads_maps = bool(teacher) and teacher[-1].dim() == 4
        if maps or (reads_maps and self.student.outputs(4) is not None):
            return self._match_maps(cover=False)
        return Match(
            self._vector(self.student),
            self._vector(self.teacher),
            self.input_size,
        )

    def match_stages(self, *, pooled: bool = False) -> Match:
        """Pair the stages of two classifiers' backbones, beginning at the end.

        Maps of a pair may differ in size, because the strides of the models
        may differ.

        Args:
            pooled: Add the pooled features if both models have them.

        Raises:
            UserError: A backbone has no sequences of blocks.
        """
        members = (self.student, self.teacher)
        names = [member.stages() for member in members]
        for member, found in zip(members, names, strict=True):
            if not found:
                raise UserError(
                    f'{member.role}: expected stages (sequences of blocks '
                    'that output maps) in the backbone of '
                    f'{member.name}, but found none. Write the `source` by '
                    'hand (tools/print_sources.py lists the modules).'
                )
        number = min(map(len, names))
        chosen = [found[-number:] for found in names]
        if pooled and all(
            [feat.dim() for feat in member.feats.get('neck', ())] == [2]
            for member in members
        ):
            chosen = [[*found, 'neck'] for found in chosen]
        student, teacher = (
            Side(
                found,
                tuple(feat for name in found for feat in member.feats[name]),
                {},
            )
            for member, found in zip(members, chosen, strict=True)
        )
        return Match(student, teacher, self.input_size)

    def _matched(self, student: str, teacher: str, **resample: Any) -> Match:
        return Match(
            Side(
                student,
                self.student.feats[student],
                resample.get('student', {}),
            ),
            Side(
                teacher,
                self.teacher.feats[teacher],
                resample.get('teacher', {}),
            ),
            self.input_size,
        )

    def _encoders_agree(self) -> bool:
        shapes = [
            [feat.shape[:2] for feat in member.feats.get('encoder', ())]
            for member in (self.student, self.teacher)
        ]
        pads = [
            member.model.data_preprocessor.pad_size_divisor
            for member in (self.student, self.teacher)
        ]
        return (
            bool(shapes[0])
            and shapes[0] == shapes[1]
            and len(shapes[0][0]) == 2
            and pads[0] == pads[1]
        )

    def _vector(self, member: Member) -> Side:
        """A classifier's features as ``(N, C)``, from its last output."""
        source = member.outputs(2)
        resample: dict[str, Any] = {}
        if source is None:
            source = (
                member.outputs(4)
                or member.outputs(3, inner=True)
                or member.outputs(4, inner=True)
            )
            if source is None:
                raise self._nothing(member, 'vectors, maps or tokens')
            resample['tokens'] = 'mean'
        feats = member.feats[source]
        if feats[-1].dim() == 3:
            resample['num_extra'] = member.extra_tokens(feats[-1])
        if len(feats) > 1:
            resample = {'levels': [len(feats) - 1], **resample}
        return Side(source, feats, resample)

    def _maps(self, member: Member) -> Side:
        """The maps that a model outputs; for a classifier the last one."""
        source = member.outputs(4)
        resample: dict[str, Any] = {}
        if source is None and not self.is_detector:
            source = member.outputs(3, inner=True)
            if source is not None:
                extra = member.extra_tokens(member.feats[source][-1])
                resample = dict(tokens='map', num_extra=extra)
        if source is None:
            raise self._nothing(member, 'maps (N, C, H, W)')
        feats = member.feats[source]
        if not self.is_detector and len(feats) > 1:
            resample = {'levels': [len(feats) - 1], **resample}
        return Side(source, feats, resample)

    def _nothing(self, member: Member, wanted: str) -> UserError:
        found = {
            name: [tuple(feat.shape) for feat in member.feats[name]]
            for name in ('backbone', 'neck')
            if name in member.feats
        }
        return UserError(
            f'{member.role}: expected {wanted} from neck or backbone of '
            f'{member.name} ({type(member.model).__name__}), but on an image '
            f'of {self.input_size}x{self.input_size} got {found}. Such a '
            'model cannot be paired automatically; write the `source` by hand '
            '(tools/print_sources.py lists the modules).'
        )

    def _match_maps(self, *, cover: bool) -> Match:
        student, teacher = self._maps(self.student), self._maps(self.teacher)
        sides: list[list[tuple[int, int, int]]] = []
        for side in (student, teacher):
            levels = side.resample.get('levels', range(len(side.feats)))
            resample = {
                k: v for k, v in side.resample.items() if k != 'levels'
            }
            maps = Resampler(**resample)(side.feats)
            sides.append([(level, *maps[level].shape[2:]) for level in levels])
        chosen = self._levels(*sides, cover=cover)
        return Match(
            self._choose(student, [c[0] for c in chosen], chosen),
            self._choose(teacher, [c[1] for c in chosen], None),
            self.input_size,
        )

    @staticmethod
    def _levels(
        students: list[tuple[int, int, int]],
        teachers: list[tuple[int, int, int]],
        *,
        cover: bool,
    ) -> list[tuple[int, int, float]]:
        """Pair ``(level, height, width)`` of both by size."""
        nearest = []
        for place, (level, height, width) in enumerate(teachers):

            def distance(
                item: tuple[int, tuple[int, int, int]],
                height: int = height,
                place: int = place,
            ) -> tuple[float, int]:
                # Of two levels of equal size the one with the same index.
                index, (_, own, _) = item
                return abs(math.log(own / height)), abs(index - place)

            _, (own_level, own_height, own_width) = min(
                enumerate(students), key=distance
            )
            is_same = max(own_height, height) < SAME_STRIDE * min(
                own_height, height
            )
            scale = (
                1
                if (own_height, own_width) == (height, width)
                else round(height / own_height, 4)
            )
            nearest.append((own_level, level, scale, is_same))
        same = [choice for choice in nearest if choice[3]]
        return [
            (own, theirs, scale)
            for own, theirs, scale, _ in (
                nearest if cover or not same else same
            )
        ]

    @staticmethod
    def _choose(
        side: Side,
        levels: list[int],
        chosen: list[tuple[int, int, float]] | None,
    ) -> Side:
        resample = {k: v for k, v in side.resample.items() if k != 'levels'}
        scales = [scale for _, _, scale in chosen or ()]
        if levels != list(range(len(side.feats))):
            resample = {'levels': levels, **resample}
        if any(scale != 1 for scale in scales):
            resample['scales'] = scales
        return Side(side.source, side.feats, resample)
