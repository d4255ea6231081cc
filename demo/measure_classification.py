"""Measure what the classification demo has trained.

Run by `demo.classification`. Times all classifiers image by image
and lists the keys that stock mmpretrain misses in the ERA student's checkpoint
or does not know. Reads job.json in the folder it is given and writes
result.json there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mmcv
import torch
from mmpretrain.apis import get_model
from mmpretrain.structures import DataSample
from torch import nn

from demo.models import build_era, measure_variants, stock_keys, teller


def read(file: str) -> dict:
    """A batch of one image."""
    image = mmcv.imread(file)
    tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
    sample = DataSample(metainfo={'img_shape': image.shape[:2]})
    return {'inputs': [tensor], 'data_samples': [sample]}


def measure(folder: Path) -> dict:
    """Do all of it; returns the result."""
    job = json.loads((folder / 'job.json').read_text())
    configs, checkpoints = job['configs'], job['checkpoints']
    files = [str(file) for file in Path(job['data'], 'test').glob('*/*')]
    tell = teller(folder)(0.1, 1.0, 'timing')

    def stock(config: str, weights: str) -> nn.Module:
        return get_model(
            configs[config], checkpoints[weights], device='cpu'
        ).eval()

    return {
        'stock': stock_keys(
            'mmpretrain', configs['plain'], checkpoints['era']
        ),
        'num_images': len(files),
        'image_size': read(files[0])['inputs'][0].shape[-1],
        **measure_variants(
            teacher=stock('teacher', 'teacher'),
            plain=stock('plain', 'plain'),
            era_student=stock('plain', 'era'),
            era=build_era(
                'mmpretrain',
                configs['era'],
                checkpoints['era'],
                checkpoints['teacher'],
            ),
            modes=('T', 'ST'),
            files=sorted(files),
            read=read,
            tell=tell,
        ),
    }


if __name__ == '__main__':
    target = Path(sys.argv[1])
    (target / 'result.json').write_text(json.dumps(measure(target), indent=2))
