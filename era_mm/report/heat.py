"""Features as small pictures, for the page and for a run's visualizer."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

#: Even to the colour-blind, and in grey.
COLOUR_MAP = 'cividis'


def strength(feature: Tensor) -> np.ndarray:
    """Root mean square over the channels of one image's feature.

    Shape:
        - feature: ``(C, H, W)`` gives ``(H, W)``; a vector ``(C,)`` and
          tokens ``(C, L)`` give their values, folded into a near-square.
    """
    feature = feature.detach().float().cpu()
    if feature.dim() == 3:
        return feature.square().mean(dim=0).sqrt().numpy()
    values = feature.square()
    flat = (values.mean(dim=0) if values.dim() == 2 else values).sqrt()
    width = int(np.ceil(len(flat) ** 0.5))
    folded = np.zeros(width * -(-len(flat) // width), dtype=np.float32)
    folded[: len(flat)] = flat.numpy()
    return folded.reshape(-1, width)


def coloured(values: np.ndarray, most: float) -> np.ndarray:
    """RGB, uint8: dark is 0, bright is ``most`` and above."""
    from matplotlib import colormaps

    share = np.clip(values / most if most > 0 else values * 0, 0, 1)
    return (255 * colormaps[COLOUR_MAP](share)[..., :3]).astype(np.uint8)


@dataclass
class HeatRow:
    """Pictures on one scale.

    Args:
        title: What they show.
        names: Of each.
        maps: Their values; None leaves a place free.
        most: What is brightest.
    """

    title: str
    names: list[str]
    maps: list[np.ndarray | None]
    most: float


def heat_rows(
    teacher: Tensor,
    estimates: Sequence[Tensor],
    names: Sequence[str],
    of: str = 'teacher',
) -> list[HeatRow]:
    """Features, residuals to the teacher's, and what each step changes.

    Args:
        teacher: Its feature of one image and level, ``(C, *)``.
        estimates: e_0 ... e_n, of the same shape.
        names: Names of the estimates.
        of: Name of the teacher.

    Returns:
        Two rows on the teacher's scale, and a third on its own scale if there
        are several estimates.
    """
    target = strength(teacher)
    most = float(np.quantile(target, 0.99))
    rows = [
        HeatRow(
            'feature',
            [of, *names],
            [target, *(strength(e) for e in estimates)],
            most,
        ),
        HeatRow(
            'what is left',
            ['', *(f'{of} - {name}' for name in names)],
            [None, *(strength(teacher - e) for e in estimates)],
            most,
        ),
    ]
    if len(estimates) > 1:
        added = [
            strength(after - before) for before, after in pairwise(estimates)
        ]
        rows.append(
            HeatRow(
                'what each branch adds',
                ['', '', *(f'd{i}' for i in range(1, len(estimates)))],
                [None, None, *added],
                float(max(np.quantile(item, 0.99) for item in added)),
            )
        )
    return rows


def mosaic(rows: Sequence[HeatRow], cell: int = 96) -> np.ndarray:
    """All rows as one RGB picture, each map ``cell`` pixels wide."""
    from PIL import Image

    width = max(len(row.maps) for row in rows)
    lines = []
    for row in rows:
        shape = next(m.shape for m in row.maps if m is not None)
        height = max(1, round(cell * shape[0] / shape[1]))
        line = np.full((height + 4, width * (cell + 4), 3), 255, np.uint8)
        for i, values in enumerate(row.maps):
            if values is not None:
                picture = Image.fromarray(coloured(values, row.most))
                picture = picture.resize(
                    (cell, height), Image.Resampling.NEAREST
                )
                left = i * (cell + 4)
                line[:height, left : left + cell] = np.asarray(picture)
        lines.append(line)
    return np.concatenate(lines)


def data_uri(image: np.ndarray, kind: str = 'PNG') -> str:
    """A picture as the text that a page holds it by."""
    from PIL import Image

    buffer = io.BytesIO()
    options = {'quality': 85} if kind == 'JPEG' else {'optimize': True}
    Image.fromarray(image).save(buffer, kind, **options)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f'data:image/{kind.lower()};base64,{text}'
