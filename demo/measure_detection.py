"""Measure what the demo has trained; run by `demo.detection`.

Loads the ERA student's checkpoint with stock mmdet and the plain student's
config, evaluates it, times all detectors image by image and draws detections
side by side. Reads job.json in the folder it is given and writes result.json
and detections.png there.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.structures import DetDataSample
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from demo.models import (
    Tell,
    build_era,
    measure_variants,
    stock_keys,
    teller,
)
from era_mm.visualization.panels import Panel, save_grid

SHOWN = 6
SHOWN_SCORE = 0.3


def detect_all(
    model: nn.Module, files: Sequence[str], tell: Tell
) -> list[DetDataSample]:
    """Detections of every file, one by one."""
    found = []
    for number, file in enumerate(files):
        found.append(inference_detector(model, file))
        if number % 50 == 0:
            tell(number / len(files))
    return found


def evaluate(
    coco: COCO, image_ids: Sequence[int], found: Sequence[DetDataSample]
) -> float:
    """COCO AP of detections, by pycocotools."""
    results = []
    for image_id, sample in zip(image_ids, found, strict=True):
        instances = sample.pred_instances
        for (x1, y1, x2, y2), score, label in zip(
            instances.bboxes.tolist(),
            instances.scores.tolist(),
            instances.labels.tolist(),
            strict=True,
        ):
            results.append(
                {
                    'image_id': image_id,
                    'category_id': label,
                    'bbox': [x1, y1, x2 - x1, y2 - y1],
                    'score': score,
                }
            )
    if not results:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(results), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def read(file: str) -> dict:
    """A batch of one image."""
    image = mmcv.imread(file)
    shape = image.shape[:2]
    sample = DetDataSample(
        metainfo={
            'img_id': 0,
            'img_shape': shape,
            'ori_shape': shape,
            'scale_factor': (1.0, 1.0),
        }
    )
    tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
    return {'inputs': [tensor], 'data_samples': [sample]}


def draw(
    coco: COCO,
    image_ids: Sequence[int],
    files: Sequence[str],
    columns: dict[str, Sequence[DetDataSample]],
    path: Path,
) -> None:
    """Ground truth and detections side by side for the first scenes."""
    rows = []
    for number in range(min(SHOWN, len(files))):
        image = mmcv.imread(files[number], channel_order='rgb')
        annotations = coco.loadAnns(coco.getAnnIds(image_ids[number]))
        boxes = np.array([item['bbox'] for item in annotations])
        boxes = boxes.reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        row = [
            Panel(
                image,
                boxes.tolist(),
                [str(item['category_id']) for item in annotations],
            )
        ]
        for found in columns.values():
            instances = found[number].pred_instances
            instances = instances[instances.scores >= SHOWN_SCORE]
            row.append(
                Panel(
                    image,
                    instances.bboxes.tolist(),
                    [
                        f'{label} {score:.2f}'
                        for label, score in zip(
                            instances.labels.tolist(),
                            instances.scores.tolist(),
                            strict=True,
                        )
                    ],
                )
            )
        rows.append(row)
    save_grid(rows, path, ['ground truth', *columns], scale=4)


def measure(folder: Path) -> dict:
    """Do all of it; returns the result."""
    job = json.loads((folder / 'job.json').read_text())
    configs, checkpoints = job['configs'], job['checkpoints']
    data = Path(job['data'])
    part_of = teller(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(data / 'annotations' / 'test.json'))
    image_ids = coco.getImgIds()
    files = [
        str(data / 'test' / image['file_name'])
        for image in coco.loadImgs(image_ids)
    ]
    keys = stock_keys('mmdet', configs['plain'], checkpoints['era'])
    stock = init_detector(configs['plain'], checkpoints['era'], device='cpu')
    tell = part_of(0.05, 0.5, 'testing with stock mmdet')
    era_found = detect_all(stock, files, tell)
    plain = init_detector(configs['plain'], checkpoints['plain'], device='cpu')
    plain_found = detect_all(plain, files[:SHOWN], lambda share: None)
    draw(
        coco,
        image_ids,
        files,
        {'plain student': plain_found, 'ERA student, S': era_found},
        folder / 'detections.png',
    )
    teacher = init_detector(
        configs['teacher'], checkpoints['teacher'], device='cpu'
    )
    era = build_era(
        'mmdet', configs['era'], checkpoints['era'], checkpoints['teacher']
    )
    return {
        'stock': {**keys, 'AP': evaluate(coco, image_ids, era_found)},
        'num_images': len(files),
        'image_size': coco.loadImgs(image_ids[:1])[0]['width'],
        **measure_variants(
            teacher=teacher,
            plain=plain,
            era_student=stock,
            era=era,
            modes=('T', 'ST'),
            files=files,
            read=read,
            tell=part_of(0.5, 1.0, 'timing'),
        ),
    }


if __name__ == '__main__':
    target = Path(sys.argv[1])
    (target / 'result.json').write_text(json.dumps(measure(target), indent=2))
