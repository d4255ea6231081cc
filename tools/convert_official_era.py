"""Convert a checkpoint of the released ERA code to one of era_mm.

python tools/convert_official_era.py checkpoint-94.pth.tar era_r18.pth
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from era_mm.core.checkpoint import (
    METADATA_KEY,
    Extras,
    extras_of,
    load_strictly,
)
from era_mm.methods.era import MBRNet

# What the released code saves, and what of it is used here. A stripped file
# may be missing the head of the teacher, who has it.
PARTS = ('model', 'gap_model')
HEAD = 'teacher_head'
DEPTHS = {
    # Bottleneck or not, blocks per layer.
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Convert a checkpoint of the released ERA code (ImageNet, '
        'a torchvision ResNet as student) to one of era_mm.Distillation: the '
        'plain student for mmpretrain, with MBRNet and, where the file has '
        'it, the head of the teacher among its extras. Prints the configs '
        'that it fits.'
    )
    parser.add_argument(
        'input', metavar='IN', type=Path, help='file of the released code'
    )
    parser.add_argument(
        'output', metavar='OUT', type=Path, help='file to write'
    )
    return parser.parse_args()


def read_official(file: Path) -> dict[str, OrderedDict[str, Tensor]]:
    """The parts that are converted, each a state dict.

    Raises:
        ValueError: Not a checkpoint of the released code.
    """
    try:
        checkpoint = torch.load(file, map_location='cpu', weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        raise ValueError(
            f'{file} cannot be read ({type(error).__name__}): it is '
            'truncated or holds more than tensors. Expected a file that the '
            'released ERA code has saved.'
        ) from error
    keys = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else []
    parts = (*PARTS, HEAD) if HEAD in keys else PARTS
    missing = [
        part
        for part in parts
        if part not in keys
        or not isinstance(checkpoint[part], Mapping)
        or not all(isinstance(v, Tensor) for v in checkpoint[part].values())
    ]
    if missing:
        raise ValueError(
            f'{file} is no checkpoint of the released ERA code: expected a '
            f'dict with the state dicts {", ".join(PARTS)}, but it lacks '
            f'{", ".join(missing)} (it has '
            f'{keys[:8] or type(checkpoint).__name__}).'
        )
    return {part: OrderedDict(checkpoint[part]) for part in parts}


def _count(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    """How many different indices a pattern captures."""
    found = (re.match(pattern, key) for key in state_dict)
    return len({match[1] for match in found if match})


def _shape(
    state_dict: Mapping[str, Tensor], part: str, key: str
) -> tuple[int, ...]:
    if key not in state_dict:
        raise ValueError(
            f'`{part}` has no {key!r}: expected a student that is a '
            'torchvision ResNet with `up_fc`, and residual branches of '
            "Linear and BatchNorm as in the released code's parallel and "
            f'accuX nets. It has {list(state_dict)[:3]}.'
        )
    return tuple(state_dict[key].shape)


def student_config(model: Mapping[str, Tensor]) -> dict[str, Any]:
    """The mmpretrain classifier that a torchvision ResNet is.

    Raises:
        ValueError: Not such a ResNet.
    """
    width = _shape(model, 'model', 'conv1.weight')[0]
    num_classes, in_channels = _shape(model, 'model', 'fc.weight')
    blocks = tuple(
        _count(model, rf'layer{layer}\.(\d+)\.') for layer in range(1, 5)
    )
    depth = DEPTHS.get(('layer1.0.conv3.weight' in model, blocks))
    if depth is None:
        raise ValueError(
            f'`model` has {blocks} blocks in its layers, which is none of '
            f'the ResNets {sorted(DEPTHS.values())}.'
        )
    return dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(
            type='mmpretrain.ResNet',
            depth=depth,
            stem_channels=width,
            base_channels=width,
        ),
        neck=dict(type='mmpretrain.GlobalAveragePooling'),
        head=dict(
            type='mmpretrain.LinearClsHead',
            num_classes=num_classes,
            in_channels=in_channels,
            loss=dict(type='mmpretrain.CrossEntropyLoss'),
        ),
    )


def mbrnet_config(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """The MBRNet that ``up_fc`` and ``gap_model`` make up.

    Raises:
        ValueError: Not the branches of the released code.
    """
    gap = parts['gap_model']
    branches = _count(gap, r'pred_res_list\.(\d+)\.')
    blocks = _count(gap, r'pred_res_list\.0\.(\d+)\.')
    projections = _count(gap, r'up_fc_list\.(\d+)\.')
    out_channels, in_channels = _shape(parts['model'], 'model', 'up_fc.weight')
    _shape(gap, 'gap_model', 'pred_res_list.0.0.block.0.weight')
    needed = (0,) if in_channels == out_channels else (1, branches)
    if projections not in needed:
        raise ValueError(
            f'`gap_model` has {projections} projections (`up_fc_list`) for '
            f'{branches} branches from {in_channels} to {out_channels} '
            f'channels: expected {" or ".join(map(str, needed))}.'
        )
    config: dict[str, Any] = dict(num_branches=branches, num_blocks=blocks)
    if projections == 1 < branches:
        config['share_projection'] = True
    if any('.block.2.' in key for key in gap):
        config['act_cfg'] = dict(type='PReLU')
    return config


def _renamed(
    parts: Mapping[str, Mapping[str, Tensor]], shared: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Student and MBRNet under the names that they have here."""
    student, mbrnet = {}, {}
    for key, value in parts['model'].items():
        if key.startswith('up_fc.'):
            mbrnet[key.replace('up_fc.', 'aligns.0.', 1)] = value
        elif key.startswith('fc.'):
            student[f'head.{key}'] = value
        else:
            student[f'backbone.{key}'] = value
    projection = 'projections.0' if shared else r'levels.0.\1.projection'
    for key, value in parts['gap_model'].items():
        for pattern, name in (
            (r'up_fc_list\.(\d+)', projection),
            (
                r'pred_res_list\.(\d+)\.(\d+)\.block\.0',
                r'levels.0.\1.layers.\2',
            ),
            (
                r'pred_res_list\.(\d+)\.(\d+)\.block\.1',
                r'levels.0.\1.norms.\2.0',
            ),
            (
                r'pred_res_list\.(\d+)\.(\d+)\.block\.2',
                r'levels.0.\1.activations.\2',
            ),
        ):
            key = re.sub(f'^{pattern}(?=\\.)', name, key)
        mbrnet[key] = value
    return student, mbrnet


def convert(file: Path) -> tuple[dict[str, Any], dict[str, Any], dict]:
    """Convert a file.

    Returns:
        The student's config, MBRNet's settings, and the checkpoint.

    Raises:
        ValueError: The file is none that the released code has saved, or
            holds what cannot be converted.
    """
    parts = read_official(file)
    config = student_config(parts['model'])
    settings = mbrnet_config(parts)
    head = parts.get(HEAD)
    out_channels, in_channels = _shape(parts['model'], 'model', 'up_fc.weight')
    if head is not None and (
        _shape(head, HEAD, 'weight')[1] != out_channels
        or set(head) != {'weight', 'bias'}
    ):
        raise ValueError(
            f'`teacher_head` must be the weight and bias of a linear layer '
            f'on the {out_channels} channels of `model.up_fc`, but has '
            f'{ {key: tuple(value.shape) for key, value in head.items()} }.'
        )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        student = MODELS.build(config)
    mbrnet = MBRNet(in_channels, out_channels, spatial_dims=0, **settings)
    # Into the very models that will load the result, so that it fits them.
    student_state, mbrnet_state = _renamed(
        parts, settings.get('share_projection', False)
    )
    load_strictly(student, student_state, name=f'{file}: model')
    load_strictly(mbrnet, mbrnet_state, name=f'{file}: gap_model')
    state_dict = student.state_dict()
    entry: dict[str, Any] = {
        'type': 'ERADistiller',
        'state_dict': {
            f'mbrnet.{key}': value
            for key, value in mbrnet.state_dict().items()
        },
    }
    if head is not None:
        entry['teacher'] = {f'head.fc.{k}': value for k, value in head.items()}
    state_dict._metadata[''][METADATA_KEY] = Extras(distiller=entry)
    return config, settings, {'meta': {}, 'state_dict': state_dict}


def main() -> None:
    """Convert, write in one piece, and print the configs that fit."""
    args = parse_args()
    try:
        if not args.input.is_file():
            raise ValueError(f'{args.input}: there is no such file.')
        if args.output.exists() and args.output.samefile(args.input):
            raise ValueError(
                f'{args.output} is the file to convert. Give another name.'
            )
        if not args.output.absolute().parent.is_dir():
            raise ValueError(
                f'{args.output.absolute().parent}: there is no such folder.'
            )
        config, settings, checkpoint = convert(args.input)
        part = args.output.with_name(f'{args.output.name}.part')
        try:
            torch.save(checkpoint, part)
            os.replace(part, args.output)
        finally:
            part.unlink(missing_ok=True)
    except (ValueError, OSError) as error:
        raise SystemExit(f'{Path(__file__).name}: {error}') from None
    extras = extras_of(checkpoint['state_dict']) or {}
    if 'teacher' not in extras['distiller']:
        print(
            f'{args.input} has no `{HEAD}`, so E0, T and ST take the '
            "teacher's own: give `teacher` the checkpoint that this student "
            "was trained with, not 'random'."
        )
    print(f'{args.output}: written. It fits')
    print(f'  student={config}')
    print(
        "  distiller=dict(type='era_mm.ERADistiller', logit=dict(), "
        f'mbrnet={settings})'
    )
    print(
        "The file does not say what only the training's options do: for "
        "isAccuX=1 add topology='accumulated', for another act_type than "
        'relu or prelu the act_cfg, for final_out_type=avg '
        "reduction='mean'. Its EMA weights and optimisers are left out."
    )


if __name__ == '__main__':
    main()
