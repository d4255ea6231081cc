"""Helpers of methods on maps: pairs of levels, equal channels.

Legend: N batch, C channels, L levels.
"""

from collections.abc import Sequence

from torch import Tensor, nn


def check_maps(
    *,
    student_feats: Sequence[Tensor],
    teacher_feats: Sequence[Tensor],
    method: str,
    same_size: bool = True,
) -> None:
    """Refuse features that are not maps, or that do not form pairs.

    Args:
        student_feats: The student's features, by level.
        teacher_feats: The teacher's features, by level.
        method: Name of the method, for the message.
        same_size: Whether height and width must agree.

    Raises:
        ValueError: Vectors or tokens, or different numbers of levels or
            sizes.
    """
    shapes = [
        [tuple(feat.shape) for feat in feats]
        for feats in (student_feats, teacher_feats)
    ]
    found = f'the student has {shapes[0]} and the teacher {shapes[1]}'
    if any(len(shape) != 4 for one in shapes for shape in one):
        raise ValueError(
            f'{method} needs feature maps (N, C, H, W), but {found}. Choose '
            "sources before pooling: in a classifier source='backbone', or "
            'its stages, such as backbone.layer3.'
        )
    if len(shapes[0]) != len(shapes[1]) or (
        same_size and any(s[2:] != t[2:] for s, t in zip(*shapes, strict=True))
    ):
        raise ValueError(
            f'{method} needs pairs of levels'
            f'{" of equal size" if same_size else ""}, but {found}. Choose '
            'sources of the same levels and strides, or let '
            'tools/make_config.py write a `source.resample`.'
        )


class Aligns(nn.ModuleList):
    """A 1x1 convolution at each level whose channels differ, none elsewhere.

    Args:
        student_feats: The student's features, by level.
        teacher_feats: The teacher's features, by level.

    Shape:
        - feats: L of ``(N, C_s, H, W)``
        - out: L of ``(N, C_t, H, W)``
    """

    def __init__(
        self,
        student_feats: Sequence[Tensor],
        teacher_feats: Sequence[Tensor],
    ) -> None:
        super().__init__(
            nn.Identity()
            if s.shape[1] == t.shape[1]
            else nn.Conv2d(s.shape[1], t.shape[1], kernel_size=1)
            for s, t in zip(student_feats, teacher_feats, strict=True)
        )

    def forward(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """Each level with the teacher's number of channels."""
        return [align(feat) for align, feat in zip(self, feats, strict=True)]
