"""SoKD's pictures: the history that is drawn, and areas where they belong."""

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image

from era_mm.testing import (
    detection_batch,
    detector_config,
    distillation_config,
    run_config,
)
from era_mm.visualization.sokd import area_panels, draw_policy, read_policy

ROOT = Path(__file__).resolve().parents[2]


def tool():
    path = ROOT / 'tools/sokd_pictures.py'
    spec = importlib.util.spec_from_file_location('sokd_pictures', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_policy__last_line_of_a_step_counts_and_is_drawn(tmp_path):
    lines = [
        dict(step=step, usage={'SampleMix': [use, 0.5], 'ToZero': [0.1, use]})
        for step, use in ((0, 0.1), (5, 0.2), (10, 0.9), (5, 0.3), (10, 0.4))
    ]
    file = tmp_path / 'sokd_policy.jsonl'
    file.write_text('\n'.join(map(json.dumps, lines)))
    records = read_policy(file)
    assert [
        (record['step'], record['usage']['SampleMix'][0]) for record in records
    ] == [(0, 0.1), (5, 0.3), (10, 0.4)]
    draw_policy(records, tmp_path / 'new' / 'policy.png')
    picture = np.asarray(Image.open(tmp_path / 'new' / 'policy.png'))
    assert picture.shape[0] > 400
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10
    file.write_text('')
    with pytest.raises(ValueError, match='PolicyHook'):
        read_policy(file)


def test_areas__in_pixels_inside_the_image():
    # Stride 8: cells [1, 2) x [0, 2) are pixels 8..16 x 0..16. The second
    # sticks out, the third is none, the fourth is outside.
    boxes = torch.tensor(
        [[1.0, 0, 2, 2], [-1, 2.5, 1, 9], [0, 0, 1, 1], [-3, 0, -1, 1]]
    )
    scores = torch.tensor([0.9, 0.5, 0.0, 0.3])
    image = np.zeros((32, 24, 3), dtype=np.uint8)
    (panel,) = area_panels(image, [(boxes, scores, 8)])
    assert panel.boxes == [[8, 0, 16, 16], [0, 20, 8, 32]]
    assert panel.labels == ['1 0.90', '2 0.50']


def test_areas__of_a_batch_are_those_of_training(teacher_file):
    model = MODELS.build(
        distillation_config(
            dict(type='era_mm.SoKDDistiller', dafa=False),
            checkpoint=teacher_file,
        )
    )
    model.load_teachers()
    model.eval()
    rows = tool().areas_of_batch(model, detection_batch(2))
    # Two images, two levels, three areas at most.
    assert [len(row) for row in rows] == [2, 2]
    for row in rows:
        assert row[0].image.shape == (64, 64, 3)
        assert all(1 <= len(panel.boxes) <= 3 for panel in row)


def test_areas__see_the_features_that_the_base_connects(teacher_file):
    # The student's first level is left out, so is the teacher's.
    leave = dict(levels=[1])
    base = dict(
        type='era_mm.FeatureImitationDistiller',
        source=dict(
            student='neck',
            teacher='neck',
            resample=dict(student=leave, teacher=leave),
        ),
    )
    model = MODELS.build(
        distillation_config(
            dict(type='era_mm.SoKDDistiller', base=base, dafa=False),
            checkpoint=teacher_file,
        )
    )
    model.load_teachers()
    model.eval()
    rows = tool().areas_of_batch(model, detection_batch(2))
    assert [len(row) for row in rows] == [1, 1]


def test_areas__need_the_heads_that_training_has_written(
    coco, teacher_file, tmp_path
):
    sokd = distillation_config(
        dict(type='era_mm.SoKDDistiller', dafa=False), checkpoint=teacher_file
    )
    Config(run_config(sokd, coco, tmp_path)).dump(tmp_path / 'config.py')
    files = {}
    for name, config in (('trained', sokd), ('plain', detector_config())):
        files[name] = str(tmp_path / f'{name}.pth')
        state = MODELS.build(config).state_dict()
        torch.save({'meta': {}, 'state_dict': state}, files[name])

    def draw(name):
        tool().draw_areas(
            argparse.Namespace(
                config=str(tmp_path / 'config.py'),
                checkpoint=files[name],
                out=tmp_path / f'{name}.png',
                images=2,
                scale=1,
                cfg_options=None,
            )
        )

    draw('trained')
    picture = np.asarray(Image.open(tmp_path / 'trained.png'))
    assert picture.shape[0] > 2 * 64
    with pytest.raises(SystemExit, match='has a plain student'):
        draw('plain')
    assert not (tmp_path / 'plain.png').exists()
