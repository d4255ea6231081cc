"""Makes features of two different models comparable; has no parameters.

Legend: N batch, C channels, L levels, T tokens, s a level's stride.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

TOKENS = ('map', 'mean', 'class')


def tokens_to_map(tokens: Tensor, num_extra: int) -> Tensor:
    """Patch tokens as a map, row by row from the top left.

    Args:
        tokens: Output of a transformer.
        num_extra: Number of tokens before the patches that have no position.

    Shape:
        - tokens: ``(N, num_extra + H * W, C)`` of a square image
        - out: ``(N, C, H, W)``

    Raises:
        ValueError: The patches do not fill a square.
    """
    number = tokens.shape[1] - num_extra
    side = math.isqrt(max(number, 0))
    if number < 1 or side * side != number:
        raise ValueError(
            f'Tokens {tuple(tokens.shape)} with {num_extra} extra ones leave '
            f'{number} patches, which do not fill a square. Use square '
            'images, and check `num_extra`.'
        )
    return tokens[:, num_extra:].mT.unflatten(2, (side, side))


def resize(feat: Tensor, scale: float) -> Tensor:
    """A map resized to another stride.

    Larger: bilinear. Smaller: each new cell is the mean of the cells that it
    covers.

    Args:
        feat: The map.
        scale: Its stride divided by the new one.

    Shape:
        - feat: ``(N, C, H, W)``
        - out: ``(N, C, ceil(H * scale), ceil(W * scale))``
    """
    # Configs hold rounded scales: 7 * 1.1429 is to be 8.
    height, width = (math.ceil(side * scale - 0.01) for side in feat.shape[2:])
    if scale < 1:
        return adaptive_avg_pool2d(feat, (height, width))
    return interpolate(
        feat, (height, width), mode='bilinear', align_corners=False
    )


def crop_to_common(
    *, student_feats: Sequence[Tensor], teacher_feats: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Crop maps of equal stride to their common size.

    Preprocessors pad at the right and bottom, to different multiples, so the
    image lies in the top left corner of both maps.

    Shape:
        - student_feats, teacher_feats: L of ``(N, C, *)``
    """
    students, teachers = [], []
    for student, teacher in zip(student_feats, teacher_feats, strict=True):
        if student.dim() == teacher.dim() == 4:
            height, width = (
                min(student.shape[dim], teacher.shape[dim]) for dim in (2, 3)
            )
            student = student[..., :height, :width]
            teacher = teacher[..., :height, :width]
        students.append(student)
        teachers.append(teacher)
    return tuple(students), tuple(teachers)


class Resampler(nn.Module):
    """Selects, reshapes and resizes the outputs of a source, in this order.

    Source: ours.

    Args:
        levels: Indices of the source's outputs, in the order wanted; an
            output may occur twice. None: all.
        tokens: How to convert tokens ``(N, T, C)``: 'map', the patches as a
            map; 'mean', the mean of the patches, and for maps
            ``(N, C, H, W)`` their mean; 'class', the first token. None: not
            at all.
        num_extra: Number of tokens before the patches, such as the class
            token.
        scales: For each of the levels the factor by which a map is resized,
            its stride divided by the wanted one. None: nothing is resized.

    Shape:
        - feats: outputs of the source, each ``(N, C, H, W)``, ``(N, T, C)``
          or ``(N, C)``
        - out: L of ``(N, C, H', W')`` or ``(N, C)``

    Raises:
        ValueError: Unknown ``tokens``, a scale that is not positive, not one
            scale for each level, or a level that does not exist.
    """

    def __init__(
        self,
        levels: Sequence[int] | None = None,
        tokens: str | None = None,
        num_extra: int = 1,
        scales: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if tokens is not None and tokens not in TOKENS:
            raise ValueError(
                f'`tokens` must be one of {TOKENS} or None, but got '
                f'{tokens!r}.'
            )
        if scales is not None and (
            min(scales, default=0) <= 0
            or (levels is not None and len(levels) != len(scales))
        ):
            raise ValueError(
                '`scales` must hold a positive factor for each of the '
                f'`levels` {levels}, but got {scales}.'
            )
        self.levels = None if levels is None else tuple(levels)
        self.tokens = tokens
        self.num_extra = num_extra
        self.scales = None if scales is None else tuple(scales)

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The source's outputs, resampled."""
        levels = range(len(feats)) if self.levels is None else self.levels
        scales = self.scales or (1,) * len(levels)
        if len(scales) != len(levels) or not all(
            0 <= level < len(feats) for level in levels
        ):
            raise ValueError(
                f'The resampler asks for levels {list(levels)} with scales '
                f'{list(scales)}, but its source outputs {len(feats)}. '
                'Correct `source.resample`.'
            )
        return tuple(
            self._resize(self._reshape(feats[level]), scale)
            for level, scale in zip(levels, scales, strict=True)
        )

    def _reshape(self, feat: Tensor) -> Tensor:
        if self.tokens == 'mean' and feat.dim() == 4:
            return feat.mean((2, 3))
        if self.tokens is None or feat.dim() != 3:
            return feat
        if self.tokens == 'map':
            return tokens_to_map(feat, self.num_extra)
        if self.tokens == 'mean':
            return feat[:, self.num_extra :].mean(1)
        return feat[:, 0]

    @staticmethod
    def _resize(feat: Tensor, scale: float) -> Tensor:
        return feat if scale == 1 else resize(feat, scale)

    def extra_repr(self) -> str:
        """What it does, in one line."""
        return ', '.join(self.steps()) or 'nothing'

    def steps(self) -> list[str]:
        """What it does, one phrase each, for the log."""
        steps = []
        if self.levels is not None:
            steps.append(f'outputs {list(self.levels)}')
        if self.tokens is not None:
            made = dict(
                map='arranged as a map',
                mean='averaged over all positions',
            ).get(self.tokens, 'reduced to the class token')
            steps.append(f'tokens {made}')
        for level, scale in enumerate(self.scales or ()):
            if scale != 1:
                how = 'bilinear' if scale > 1 else 'mean of the cells'
                steps.append(f'level {level} resized by {scale:g} ({how})')
        return steps
