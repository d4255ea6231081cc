"""SoKD's pictures: the policy over time, and areas drawn over images.

python tools/sokd_pictures.py policy work_dirs/RUN/sokd_policy.jsonl OUT.png
python tools/sokd_pictures.py areas CONFIG CHECKPOINT OUT.png --images 6
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_checkpoint

import era_mm  # noqa: F401
from era_mm.core import Recorder, extras_of
from era_mm.core.host_models import forward_until
from era_mm.core.places import guard_reading
from era_mm.methods.sokd import SoKDDistiller
from era_mm.visualization.panels import Panel, save_grid
from era_mm.visualization.sokd import area_panels, draw_policy, read_policy


def find_distiller(model: torch.nn.Module) -> SoKDDistiller:
    """The one SoKDDistiller of a model."""
    found = [
        distiller
        for distiller in model.distillers.values()
        if isinstance(distiller, SoKDDistiller)
    ]
    if len(found) != 1:
        raise SystemExit(
            f'The config must have one SoKDDistiller, but has {len(found)}.'
        )
    return found[0]


@torch.no_grad()
def areas_of_batch(model: torch.nn.Module, batch: dict) -> list[list[Panel]]:
    """A row of panels per image: its levels, each with its areas.

    Args:
        model: A Distillation in eval mode, its weights loaded.
        batch: What a dataloader gives.
    """
    distiller = find_distiller(model)
    # As in training: with the teachers' own inputs beside.
    data = model.data_preprocessor(batch, True)
    inputs, samples = data['inputs'], data['data_samples']
    recorder = Recorder(
        model.student, distiller.student_sources, owner='student'
    )
    with recorder:
        forward_until(model.student, inputs, recorder.sources, samples)
    student_feats = recorder.pop()
    teacher_inputs = data.get('teacher_inputs', {})
    feats = model.teachers[distiller.teacher].extract(
        teacher_inputs.get(distiller.teacher, inputs), samples
    )
    areas = distiller.areas_of(
        **distiller.connections.connect(
            student_feats=student_feats,
            teacher_feats={
                key: feats[key] for key in distiller.teacher_sources
            },
        )
    )
    rows = []
    for index, image in enumerate(inputs):
        # Any normalisation: each image from its darkest to its brightest.
        low, high = image.min(), image.max()
        pixels = ((image - low) / (high - low) * 255).byte()
        levels = [
            (
                level.boxes[index],
                level.scores[index],
                inputs.shape[-1] // level.masks.shape[-1],
            )
            for level in areas
        ]
        rows.append(area_panels(_rgb(pixels), levels))
    return rows


def _rgb(pixels: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())


def draw_areas(args: argparse.Namespace) -> None:
    """Draw the areas of the first validation images."""
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    guard_reading()
    state = load_checkpoint(model, args.checkpoint, map_location='cpu')
    if not extras_of(state.get('state_dict', {})):
        # Areas of heads that have learnt nothing would look like areas.
        raise SystemExit(
            f'{args.checkpoint!r} has a plain student and no heads that find '
            "areas. Give one that training has written, such as the run's "
            'epoch_*.pth.'
        )
    model.load_teachers()
    model.eval()
    loader = cfg.val_dataloader
    loader.update(batch_size=args.images, num_workers=0)
    loader.pop('persistent_workers', None)
    batch = next(iter(Runner.build_dataloader(loader, seed=0)))
    rows = areas_of_batch(model, batch)
    titles = [f'level {level}' for level in range(len(rows[0]))]
    save_grid(rows, args.out, titles=titles, scale=args.scale)


def main() -> None:
    """Draw one of the two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    policy = commands.add_parser('policy', help='use of each operation')
    policy.add_argument('file', help="a run's sokd_policy.jsonl")
    policy.add_argument('out', type=Path)
    areas = commands.add_parser('areas', help='areas over validation images')
    areas.add_argument('config')
    areas.add_argument('checkpoint', help='what training has written')
    areas.add_argument('out', type=Path)
    areas.add_argument('--images', type=int, default=6)
    areas.add_argument('--scale', type=int, default=2)
    areas.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()
    if args.command == 'policy':
        draw_policy(read_policy(args.file), args.out)
    else:
        draw_areas(args)
    print(args.out)


if __name__ == '__main__':
    main()
