"""Areas: decoding from predictions, and targets of the predictions.

Legend: N batch, P areas, H and W of a map in cells. A point (x, y) of a map
lies in cell (floor(y), floor(x)), whose centre is half a cell further.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from ...registry import explain_unknown_keys


class Prediction(NamedTuple):
    """Outputs of the heads for a feature.

    Args:
        heatmap: Logits for centres, ``(N, 1, H, W)``.
        size: Width and height in cells, ``(N, 2, H, W)``.
        offset: Offset of the centre from the cell's corner, x and y in cells,
            ``(N, 2, H, W)``.
    """

    heatmap: Tensor
    size: Tensor
    offset: Tensor


class Areas(NamedTuple):
    """Areas of the samples.

    Args:
        boxes: x1, y1, x2, y2 in cells, may exceed the map, ``(N, P, 4)``.
        scores: Scores at the peaks, ``(N, P)``; 0: no such area.
        masks: 1 for cells in the area, ``(N, P, H, W)``.
    """

    boxes: Tensor
    scores: Tensor
    masks: Tensor


def find_peaks(
    heatmap: Tensor, topk: int, kernel_size: int = 3
) -> tuple[Tensor, Tensor]:
    """The highest local maxima.

    Source: CenterNet, arXiv 1904.07850.

    Args:
        heatmap: Scores, 0 or more.
        topk: Maximum P.
        kernel_size: Size of the neighbourhood.

    Shape:
        - heatmap: ``(N, 1, H, W)``
        - scores, flat indices: ``(N, P)``; the score of a missing peak is 0
    """
    highest = max_pool2d(heatmap, kernel_size, 1, kernel_size // 2)
    peaks = heatmap * (highest == heatmap)
    flat = peaks.flatten(1)
    scores, index = flat.topk(min(topk, flat.shape[1]), dim=1)
    return scores, index


@explain_unknown_keys
class AreaDecoder(nn.Module):
    """From two predictions to areas.

        score  = sigmoid(heat_t) * sigmoid(heat_s)            'product'
        peaks  = the topk highest local maxima
        centre = (x, y) of the peak's cell + offset
        box    = centre -+ max(size, 1) / 2
        mask   = 1 for cells whose centre is in the half-open box
                 [x1, x2) x [y1, y2)

    Size and offset are the means of both predictions. With ``combine``
    'teacher' or 'student' only that side gives score, size and offset.

    A soft mask is a product of four sigmoids of the distance to the box's
    sides, and has a gradient; a hard one has none.

    Source: SoKD decodes areas from heat map, size and offset [paper, by
    readers' notes]; how, is CenterNet's, the rest [inference]. Areas are one
    cell at least [ours].

    Args:
        topk: P. 3 is [inference].
        kernel_size: Neighbourhood of a peak.
        combine: 'product', 'teacher' or 'student'. [inference]
        soft: Whether masks are soft.
        sharpness: Slope of a soft mask's sides, per cell. [ours]

    Shape:
        - student, teacher: a ``Prediction`` each
        - out: ``Areas``

    Raises:
        ValueError: An unknown ``combine``, or ``topk`` below 1.
    """

    COMBINES = ('product', 'teacher', 'student')

    def __init__(
        self,
        topk: int = 3,
        kernel_size: int = 3,
        combine: str = 'product',
        soft: bool = False,
        sharpness: float = 4.0,
    ) -> None:
        super().__init__()
        if combine not in self.COMBINES:
            raise ValueError(
                f'`decoder.combine` must be one of {self.COMBINES}, but got '
                f'{combine!r}.'
            )
        if topk < 1:
            raise ValueError(
                f'`decoder.topk` must be 1 or more, but got {topk}. To turn '
                'areas off, set area_weight=0.'
            )
        self.topk, self.kernel_size = topk, kernel_size
        self.combine, self.soft = combine, soft
        self.sharpness = sharpness

    def _combined(
        self, student: Prediction, teacher: Prediction
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.combine != 'product':
            side = teacher if self.combine == 'teacher' else student
            return side.heatmap.sigmoid(), side.size, side.offset
        return (
            teacher.heatmap.sigmoid() * student.heatmap.sigmoid(),
            (teacher.size + student.size) / 2,
            (teacher.offset + student.offset) / 2,
        )

    def forward(self, *, student: Prediction, teacher: Prediction) -> Areas:
        """The areas."""
        score, size, offset = self._combined(student, teacher)
        height, width = score.shape[2:]
        scores, index = find_peaks(score.detach(), self.topk, self.kernel_size)

        def at_peaks(values: Tensor) -> Tensor:
            picked = index[:, None].expand(-1, values.shape[1], -1)
            return values.flatten(2).gather(2, picked).mT  # (N, P, 2)

        corner = torch.stack([index % width, index // width], dim=2)
        centre = corner + at_peaks(offset)
        half = at_peaks(size).clamp(min=1) / 2
        boxes = torch.cat([centre - half, centre + half], dim=2)
        if not self.soft:
            boxes = boxes.detach()
        x, y = (
            torch.arange(n, device=boxes.device, dtype=boxes.dtype) + 0.5
            for n in (width, height)
        )
        x1, y1, x2, y2 = (side[..., None] for side in boxes.unbind(2))
        across = self._inside(x, x1, x2)[:, :, None, :]
        down = self._inside(y, y1, y2)[:, :, :, None]
        there = (scores > 0)[..., None, None]
        return Areas(boxes, scores, across * down * there)

    def _inside(self, position: Tensor, low: Tensor, high: Tensor) -> Tensor:
        if self.soft:
            return torch.sigmoid(
                (position - low) * self.sharpness
            ) * torch.sigmoid((high - position) * self.sharpness)
        return ((position >= low) & (position < high)).to(low.dtype)


class Targets(NamedTuple):
    """Targets of a prediction.

    Args:
        heatmap: In [0, 1], 1 at centres, ``(N, 1, H, W)``.
        size: ``(N, 2, H, W)``.
        offset: ``(N, 2, H, W)``.
        weight: 1 where size and offset are used, ``(N, 1, H, W)``.
    """

    heatmap: Tensor
    size: Tensor
    offset: Tensor
    weight: Tensor


def spatial_attention(feat: Tensor) -> Tensor:
    """Attention map of a feature, from 0 to 1 in each sample.

        A = mean_c F_c^2,   out = (A - min A) / (max A - min A)

    0 everywhere for a sample with a constant A.

    Source: attention transfer, arXiv 1612.03928, p = 2; min and max are
    [inference].

    Shape:
        - feat: ``(N, C, H, W)``
        - out: ``(N, 1, H, W)``
    """
    energy = feat.float().square().mean(1, keepdim=True)
    low = energy.amin((2, 3), keepdim=True)
    span = energy.amax((2, 3), keepdim=True) - low
    return torch.where(span > 0, (energy - low) / span, 0)


@torch.no_grad()
def attention_targets(feat: Tensor, topk: int = 3) -> Targets:
    """Targets from the teacher's own attention, for data without boxes.

    The heat map is :func:`spatial_attention`. Size and offset have targets at
    its ``topk`` peaks: the offset is the cell's centre, width and height are
    the numbers of consecutive cells around the peak, in its row and column,
    with at least half of its height.

    Source: the heat map is [inference], size and offset [ours]: without them
    every area would keep its initial size of one cell.

    Shape:
        - feat: F_t, ``(N, C, H, W)``
        - out: ``Targets``
    """
    attention = spatial_attention(feat)
    height, width = attention.shape[2:]
    scores, index = find_peaks(attention, topk)
    sample = torch.arange(len(feat), device=feat.device)[:, None]
    x, y = index % width, index // width
    rows = attention[:, 0][sample, y]  # (N, P, W)
    columns = attention[:, 0].mT[sample, x]  # (N, P, H)
    extent = torch.stack(
        [
            _extent(line, place, scores / 2)
            for line, place in ((rows, x), (columns, y))
        ],
        dim=1,
    )  # (N, 2, P)
    there = (scores > 0).to(attention.dtype)
    size = attention.new_zeros(len(feat), 2, height * width)
    size.scatter_(2, index[:, None].expand(-1, 2, -1), extent * there[:, None])
    weight = attention.new_zeros(len(feat), 1, height * width)
    weight.scatter_(2, index[:, None], there[:, None])
    return Targets(
        attention,
        size.unflatten(2, (height, width)),
        torch.full_like(attention, 0.5).repeat(1, 2, 1, 1),
        weight.unflatten(2, (height, width)),
    )


def _extent(line: Tensor, place: Tensor, level: Tensor) -> Tensor:
    """Length of the interval around a position that is not below a level."""
    cells = torch.arange(line.shape[-1], device=line.device)
    below = line < level[..., None]
    place = place[..., None]
    before = torch.where(below & (cells < place), cells, -1).amax(-1)
    after = torch.where(below & (cells > place), cells, line.shape[-1])
    return (after.amin(-1) - before - 1).to(line.dtype)


@torch.no_grad()
def box_targets(
    boxes: Sequence[Tensor],
    image_size: tuple[int, int],
    map_sizes: Sequence[tuple[int, int]],
    device: torch.device | str = 'cpu',
) -> list[Targets]:
    """CenterNet's targets of one class, on the levels of a pyramid.

    A box is assigned to the last level on which its side ``sqrt(w * h)`` is
    at least four cells, or else to the first. If centres share a cell, the
    later box is used. Boxes without extent are ignored.

    Source: CenterNet, arXiv 1904.07850, with mmdet's Gaussians (overlap 0.3);
    the levels are [ours].

    Args:
        boxes: x1, y1, x2, y2 in pixels by sample, ``(G, 4)`` each.
        image_size: Height and width of the padded batch, in pixels.
        map_sizes: Height and width of each level, in cells.
        device: Device of the targets.

    Returns:
        One ``Targets`` per level.
    """
    from mmdet.models.utils import gaussian_radius, gen_gaussian_target

    targets = []
    for height, width in map_sizes:
        zeros = torch.zeros(len(boxes), 6, height, width)
        targets.append(Targets(*zeros.split([1, 2, 2, 1], dim=1)))
    ratios = [
        (width / image_size[1], height / image_size[0])
        for height, width in map_sizes
    ]
    for sample, corners in enumerate(boxes):
        # On the CPU: boxes are handled one by one.
        for x1, y1, x2, y2 in corners.tolist():
            if x2 <= x1 or y2 <= y1:
                continue
            sides = [
                ((x2 - x1) * rx * (y2 - y1) * ry) ** 0.5 for rx, ry in ratios
            ]
            level = max(sum(side >= 4 for side in sides) - 1, 0)
            rx, ry = ratios[level]
            height, width = map_sizes[level]
            x, y = (x1 + x2) / 2 * rx, (y1 + y2) / 2 * ry
            column, row = int(x), int(y)
            if not (0 <= column < width and 0 <= row < height):
                continue
            w, h = (x2 - x1) * rx, (y2 - y1) * ry
            target = targets[level]
            radius = max(int(gaussian_radius([h, w], min_overlap=0.3)), 0)
            gen_gaussian_target(
                target.heatmap[sample, 0], [column, row], radius
            )
            cell = (sample, slice(None), row, column)
            target.size[cell] = torch.tensor([w, h])
            target.offset[cell] = torch.tensor([x - column, y - row])
            target.weight[cell] = 1
    return [
        Targets(*(value.to(device) for value in target)) for target in targets
    ]
