import contextlib
import io
import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from era_mm.datasets.digit_drawing import ZOOM, split_material
from era_mm.datasets.digit_scenes import SPLITS
from era_mm.datasets.letter_scenes import (
    CLASSES,
    FONTS,
    LetterParams,
    draw_glyph,
    letter_material,
    make_letter_scenes,
)
from era_mm.testing import checksums
from era_mm.visualization import scene_sheet

PARAMS = LetterParams(seed=3, num_train=12, num_val=6, num_test=6)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('letters') / 'scenes'
    assert make_letter_scenes(folder, PARAMS)
    return folder


@pytest.fixture(scope='module')
def material():
    return letter_material(1)


def test_make_letter_scenes__same_seed_gives_the_same_bytes(root, tmp_path):
    assert not make_letter_scenes(root, PARAMS)
    make_letter_scenes(tmp_path / 'again', PARAMS)
    assert checksums(tmp_path / 'again') == checksums(root)


def test_letter_material__shares_no_font_and_no_part_of_a_photo(material):
    fonts = {
        split: {int(i) // 10 for i in material[split].digit_ids}
        for split in SPLITS
    }
    assert [len(fonts[split]) for split in SPLITS] == [13, 5, 4]
    for one, other in combinations(SPLITS, 2):
        assert not fonts[one] & fonts[other]
        assert not set(material[one].regions) & set(material[other].regions)
    assert set().union(*fonts.values()) == set(range(len(FONTS)))


def test_letter_material__backgrounds_are_not_split_as_the_digits_are(
    material,
):
    digits = split_material(0)
    assert set(material['train'].regions) & set(digits['test'].regions)


def test_letter_material__glyphs_are_letters_of_one_height_and_whole(material):
    # What is drawn of a glyph: 4.7 cells to each side. Ink begins at 0.4.
    reach = int(4.7 * ZOOM)
    for split in SPLITS:
        found = material[split]
        assert found.glyphs.shape == (len(found.labels), 72, 72)
        assert set(found.labels) == set(range(10))
        middle = slice(36 - reach, 36 + reach)
        rim = found.glyphs.copy()
        rim[:, middle, middle] = 0
        assert rim.max() < 0.4
        rows = (found.glyphs > 0.5).any(axis=2).sum(axis=1)
        assert rows.min() >= 34
        assert rows.max() <= 40


def test_letter_material__sample_is_its_letter_in_its_font(material):
    drawn = {}
    for split in SPLITS:
        found = material[split]
        for number, label, glyph in zip(
            found.digit_ids, found.labels, found.glyphs, strict=True
        ):
            font, letter = divmod(int(number), len(CLASSES))
            assert label == letter
            expected = draw_glyph(FONTS[font], CLASSES[letter])
            np.testing.assert_array_equal(glyph, expected)
            drawn[number] = glyph.tobytes()
    assert len(drawn) == len(set(drawn.values())) == 220


def test_letter_material__depends_on_the_seed(material):
    other = letter_material(2)
    assert set(other['test'].digit_ids) != set(material['test'].digit_ids)
    assert other['test'].regions != material['test'].regions


def test_config__has_the_classes(read_config):
    cfg = read_config(ROOT / 'configs/plain/plain_retinanet_r18w16_letters.py')
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.metainfo.classes == CLASSES
        assert dataset.data_root == 'data/letter_scenes/'
        assert dataset.ann_file == f'annotations/{split}.json'
    for split in ('val', 'test'):
        assert cfg[f'{split}_evaluator'].ann_file == (
            f'data/letter_scenes/annotations/{split}.json'
        )


@pytest.mark.parametrize('split', SPLITS)
def test_annotations__are_valid_coco(root, split):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(root / 'annotations' / f'{split}.json'))
    assert len(coco.getImgIds()) == PARAMS.num_images(split)
    names = [c['name'] for c in coco.loadCats(coco.getCatIds())]
    assert names == list(CLASSES)
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len(annotations) >= 2 * PARAMS.num_images(split)
    for item in annotations:
        assert item['letter'] % 10 == item['category_id']
    assert coco.dataset['info']['description'] == 'Letter scenes'
    fonts = {
        number // 10
        for number in [
            *(item['letter'] for item in annotations),
            *(
                number
                for image in coco.dataset['images']
                for number in image['clutter_letters']
            ),
        ]
    }
    allowed = letter_material(PARAMS.seed)[split].digit_ids // 10
    assert fonts <= set(allowed)


def test_sheet__has_the_first_scenes_of_each_split_with_their_boxes(
    root, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(
        scene_sheet, 'save_grid', lambda rows, path, scale: drawn.extend(rows)
    )
    scene_sheet.save_scene_sheet(root, tmp_path / 'x.png', 4, 2)
    # Eight of the twelve of train; all six of val and of test.
    assert [len(row) for row in drawn] == [4, 4, 4, 2, 4, 2]
    panels = iter(panel for row in drawn for panel in row)
    for split, count in (('train', 8), ('val', 6), ('test', 6)):
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(root / 'annotations' / f'{split}.json')
        for image in coco.loadImgs(coco.getImgIds()[:count]):
            panel = next(panels)
            with Image.open(root / split / image['file_name']) as opened:
                assert (panel.image == np.asarray(opened)).all()
            found = coco.loadAnns(coco.getAnnIds(image['id']))
            assert panel.labels == [CLASSES[a['category_id']] for a in found]
            corners = np.array(panel.boxes).reshape(-1, 4)
            sizes = np.array([a['bbox'] for a in found]).reshape(-1, 4)
            assert (corners[:, :2] == sizes[:, :2]).all()
            assert np.allclose(corners[:, 2:] - corners[:, :2], sizes[:, 2:])


def test_tool__makes_them_and_their_sheet_and_leaves_others_alone(tmp_path):
    def run(*more):
        return subprocess.run(
            [
                sys.executable,
                ROOT / 'tools/make_letter_scenes.py',
                '--out',
                'letters',
                *('--num-train', '2', '--num-val', '1', '--num-test', '1'),
                *more,
            ],
            cwd=tmp_path,
            env=os.environ | {'PYTHONPATH': str(ROOT)},
            capture_output=True,
            text=True,
        )

    done = run('--contact-sheet', 'sheet.png')
    assert done.stdout == 'letters: written\nsheet.png: written\n'
    assert (tmp_path / 'sheet.png').stat().st_size > 1000
    recipe = json.loads((tmp_path / 'letters/letter_scenes.json').read_text())
    assert recipe['seed'] == 1
    other = run('--seed', '5')
    assert other.returncode == 1
    assert 'seed 1 (there) and 5 (asked for)' in other.stderr
