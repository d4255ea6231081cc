"""Measure what the demo has trained; called by tools/demo.py.

Loads the ERA student's checkpoint with stock mmdet and the plain student's
config, evaluates it, times all detectors image by image and draws detections
side by side. Reads job.json in the folder it is given and writes result.json
and detections.png there.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from era_mm.visualization.panels import Panel, save_grid

WARM_UP = 20
TIMED = 200
SHOWN = 6
SHOWN_SCORE = 0.3


def num_parameters(*modules: nn.Module) -> int:
    """Parameters of some modules together."""
    return sum(p.numel() for module in modules for p in module.parameters())


def stock_keys(config: str, checkpoint: str) -> dict[str, list[str]]:
    """What stock mmdet misses in a checkpoint and does not know."""
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(config).model)
    saved = torch.load(checkpoint, map_location='cpu', weights_only=False)
    keys = model.load_state_dict(saved['state_dict'], strict=False)
    return {
        'missing': list(keys.missing_keys),
        'unexpected': list(keys.unexpected_keys),
    }


def detect_all(
    model: nn.Module, files: Sequence[str], tell: Callable[[float], None]
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


def build_era(config: str, checkpoint: str, teacher: str) -> nn.Module:
    """The ERA student with all that T and ST need."""
    cfg = Config.fromfile(config)
    cfg.model.teacher.checkpoint = teacher
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    load_checkpoint(model, checkpoint, map_location='cpu')
    model.load_teachers()
    return model.eval()


def time_all(
    variants: dict[str, Callable[[dict], object]],
    files: Sequence[str],
    tell: Callable[[float], None],
) -> dict[str, float]:
    """Median milliseconds per image of each variant.

    The variants take turns, so that a busy machine slows all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(WARM_UP + TIMED):
        image = mmcv.imread(files[number % len(files)])
        height, width = image.shape[:2]
        tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
        for name, predict in variants.items():
            sample = DetDataSample(
                metainfo={
                    'img_id': 0,
                    'img_shape': (height, width),
                    'ori_shape': (height, width),
                    'scale_factor': (1.0, 1.0),
                }
            )
            start = time.perf_counter()
            predict({'inputs': [tensor], 'data_samples': [sample]})
            times[name].append(time.perf_counter() - start)
        if number % 20 == 0:
            tell(number / (WARM_UP + TIMED))
    return {
        name: 1000 * statistics.median(values[WARM_UP:])
        for name, values in times.items()
    }


def in_mode(model: nn.Module, mode: str | None) -> Callable[[dict], object]:
    """The ERA student's prediction in one inference mode."""

    def predict(data: dict) -> object:
        model.inference_mode = mode
        return model.test_step(data)

    return predict


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
    state = folder / 'state.json'

    def teller(start: float, stop: float, text: str) -> Callable:
        def tell(share: float) -> None:
            part = state.with_suffix('.part')
            part.write_text(
                json.dumps(
                    {'share': start + share * (stop - start), 'text': text}
                )
            )
            part.replace(state)

        tell(0.0)
        return tell

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(data / 'annotations' / 'test.json'))
    image_ids = coco.getImgIds()
    files = [
        str(data / 'test' / image['file_name'])
        for image in coco.loadImgs(image_ids)
    ]
    keys = stock_keys(configs['plain'], checkpoints['era'])
    stock = init_detector(configs['plain'], checkpoints['era'], device='cpu')
    tell = teller(0.05, 0.5, 'testing with stock mmdet')
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
    era = build_era(configs['era'], checkpoints['era'], checkpoints['teacher'])
    (distiller,) = era.distillers.values()
    neck = num_parameters(stock.backbone, stock.neck)
    to_teacher = num_parameters(distiller, distiller.twi_head.head)
    parameters = {
        'teacher': num_parameters(teacher),
        'plain': num_parameters(plain),
        'era_S': num_parameters(stock),
        'era_T': neck + to_teacher,
        'era_ST': neck + to_teacher + num_parameters(stock.bbox_head),
    }
    torch.set_num_threads(1)
    with torch.no_grad():
        times = time_all(
            {
                'teacher': teacher.test_step,
                'plain': plain.test_step,
                'era_S': stock.test_step,
                'era_T': in_mode(era, 'T'),
                'era_ST': in_mode(era, 'ST'),
            },
            files,
            teller(0.5, 1.0, 'timing'),
        )
    return {
        'stock': {**keys, 'AP': evaluate(coco, image_ids, era_found)},
        'num_images': len(files),
        'image_size': coco.loadImgs(image_ids[:1])[0]['width'],
        'timed_images': TIMED,
        'variants': {
            name: {
                'parameters': parameters[name],
                'ms_per_image': times[name],
            }
            for name in parameters
        },
    }


if __name__ == '__main__':
    target = Path(sys.argv[1])
    (target / 'result.json').write_text(json.dumps(measure(target), indent=2))
