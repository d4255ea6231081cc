"""SoKD's pictures: a policy over time, and areas over images.

Read in this order: `read_policy`, `draw_policy`, `area_panels`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from era_mm.visualization.panels import Panel


def read_policy(path: str | Path) -> list[dict]:
    """The lines of a `sokd_policy.jsonl`, in order of their steps.

    Of a step that is there twice, as after a resumption, the last counts.

    Raises:
        ValueError: There is no line.
    """
    records = {
        record['step']: record
        for record in map(json.loads, Path(path).read_text().splitlines())
    }
    if not records:
        raise ValueError(
            f'{str(path)!r} has no line. era_mm.PolicyHook writes such a file '
            "in a run's work folder."
        )
    return [records[step] for step in sorted(records)]


def draw_policy(records: Sequence[dict], path: str | Path) -> None:
    """Draw how much each operation is used, and how strongly, over the run.

    Args:
        records: What `read_policy` gives.
        path: The PNG to write; its folder is made.
    """
    steps = [record['step'] for record in records]
    figure = Figure(figsize=(9, 6), layout='constrained')
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for number, name in enumerate(records[-1]['usage']):
        pairs = [record['usage'][name] for record in records]
        colour = f'C{number}'
        above.plot(steps, [use for use, _ in pairs], colour, label=name)
        below.plot(steps, [magnitude for _, magnitude in pairs], colour)
    above.set_ylabel('use: probability of being applied')
    below.set_ylabel('mean magnitude where applied')
    below.set_xlabel('iteration')
    for axes in (above, below):
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
    figure.legend(loc='outside right upper', fontsize='small')
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def area_panels(
    image: np.ndarray, levels: Sequence[tuple[torch.Tensor, torch.Tensor, int]]
) -> list[Panel]:
    """One panel per level with its areas, numbered by their score.

    Args:
        image: RGB, uint8, `(H, W, 3)`.
        levels: Boxes in cells `(P, 4)`, scores `(P,)` and stride in pixels of
            each level. Areas of score 0 are none and left out.
    """
    height, width = image.shape[:2]
    limit = torch.tensor([width, height, width, height])
    panels = []
    for boxes, scores, stride in levels:
        inside = (boxes.cpu() * stride).clamp(min=0).minimum(limit)
        # Those that the border cuts off altogether have no extent left.
        kept = [
            (box.tolist(), f'{rank} {score:.2f}')
            for rank, (box, score) in enumerate(
                zip(inside, scores.tolist(), strict=True), start=1
            )
            if score > 0 and (box[2:] - box[:2]).min() >= 1
        ]
        panels.append(
            Panel(
                image,
                [box for box, _ in kept],
                [label for _, label in kept],
            )
        )
    return panels
