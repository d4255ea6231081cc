import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from era_mm.datasets import digit_scenes
from era_mm.datasets.digit_scenes import (
    CLASSES,
    SPLITS,
    SceneParams,
    compose_scene,
    make_digit_scenes,
    split_material,
)
from era_mm.testing import checksums

PARAMS = SceneParams(seed=3, num_train=30, num_val=12, num_test=12)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits') / 'scenes'
    assert make_digit_scenes(folder, PARAMS)
    return folder


@pytest.fixture(scope='module')
def annotations(root):
    return {
        split: json.loads((root / 'annotations' / f'{split}.json').read_text())
        for split in SPLITS
    }


def overlaps(one, other):
    """Whether two `photo, x, y, width, height` share a pixel."""
    if one[0] != other[0]:
        return False
    return all(
        max(one[i], other[i])
        < min(one[i] + one[i + 2], other[i] + other[i + 2])
        for i in (1, 2)
    )


def test_make_digit_scenes__same_seed_gives_the_same_bytes(root, tmp_path):
    make_digit_scenes(tmp_path / 'again', PARAMS)
    assert checksums(tmp_path / 'again') == checksums(root)


def test_make_digit_scenes__other_seed_gives_other_scenes(root, tmp_path):
    make_digit_scenes(tmp_path / 'other', SceneParams(4, 1, 1, 1))
    first = Path('train', '000000.jpg')
    assert (tmp_path / 'other' / first).read_bytes() != (
        root / first
    ).read_bytes()


def test_make_digit_scenes__scene_does_not_depend_on_the_number(
    root, tmp_path
):
    make_digit_scenes(tmp_path / 'few', SceneParams(3, 2, 1, 1))
    first = Path('train', '000001.jpg')
    assert (tmp_path / 'few' / first).read_bytes() == (
        root / first
    ).read_bytes()


def test_split_material__shares_no_digit_and_no_photo_pixel():
    material = split_material(0)
    ids = {split: set(material[split].digit_ids) for split in SPLITS}
    # 1797 samples in all: nothing is lost either.
    assert sum(map(len, ids.values())) == len(set().union(*ids.values()))
    assert sum(map(len, ids.values())) == 1797
    for one, other in combinations(SPLITS, 2):
        assert not any(
            overlaps(a, b)
            for a in material[one].regions
            for b in material[other].regions
        )
    for split in SPLITS:
        assert set(material[split].labels) == set(range(10))


def test_annotations__share_no_digit_and_no_photo_pixel(annotations):
    digits, regions = {}, {}
    for split, coco in annotations.items():
        digits[split] = {item['digit'] for item in coco['annotations']}
        digits[split].update(
            *(image['clutter_digits'] for image in coco['images'])
        )
        regions[split] = [
            (image['photo'], *image['photo_region'])
            for image in coco['images']
        ]
    for one, other in combinations(SPLITS, 2):
        assert not digits[one] & digits[other]
        assert not any(
            overlaps(a, b) for a in regions[one] for b in regions[other]
        )


@pytest.mark.parametrize('split', SPLITS)
def test_annotations__are_valid_coco(root, split):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(root / 'annotations' / f'{split}.json'))
    assert len(coco.getImgIds()) == PARAMS.num_images(split)
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(
        CLASSES
    )
    assert len(coco.getAnnIds()) > PARAMS.num_images(split)
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(root / split / image['file_name']) as picture:
            assert picture.size == (image['width'], image['height'])
            assert picture.mode == 'RGB'
    for item in coco.loadAnns(coco.getAnnIds()):
        x, y, width, height = item['bbox']
        assert min(x, y) >= 0
        assert min(width, height) >= 3
        assert x + width <= PARAMS.image_size
        assert y + height <= PARAMS.image_size


def test_compose_scene__boxes_are_tight_around_the_visible_ink():
    material = split_material(PARAMS.seed)['train']
    for index in range(20):
        for digit in compose_scene(material, index, PARAMS).digits:
            x, y, width, height = digit.bbox
            inside = digit.ink[y : y + height, x : x + width]
            assert inside.sum() == digit.ink.sum()
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()
            assert digit.visible >= digit_scenes.MIN_VISIBLE


def test_compose_scene__ink_differs_from_what_it_covers():
    """Without clutter, blur and noise a scene changes just at its ink."""
    material = split_material(0)['train']
    canvas = np.full((96, 96, 3), 0.5)
    digits: list = []
    rng = np.random.default_rng(0)
    while not digits:
        digit_scenes._add_digit(canvas, digits, material, rng)
    change = np.abs(canvas - 0.5).max(axis=2)
    # Mean contrast 0.3 x opacity 0.75 x coverage 0.5; one channel shows it.
    assert change[digits[0].ink].min() > 0.11
    rows, cols = np.nonzero(change > 0.01)
    x, y, width, height = digits[0].bbox
    # Antialiasing reaches a little beyond half coverage.
    reach = 0.1 * height + 2
    assert rows.min() >= y - reach
    assert rows.max() < y + height + reach
    assert cols.min() >= x - reach
    assert cols.max() < x + width + reach


def test_make_digit_scenes__second_run_changes_nothing(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    assert not make_digit_scenes(root, PARAMS)
    assert before == {
        path: path.stat().st_mtime_ns for path in root.rglob('*')
    }


def test_make_digit_scenes__other_parameters_are_told(root):
    before = checksums(root)
    with pytest.raises(
        FileExistsError, match=r'seed 3 .* and 5 .*another folder'
    ):
        make_digit_scenes(root, SceneParams(5, 30, 12, 12))
    assert checksums(root) == before


def test_make_digit_scenes__foreign_folder_is_left_alone(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'notes.txt').write_text('keep')
    with pytest.raises(FileExistsError, match=r'exists without'):
        make_digit_scenes(tmp_path / 'mine', PARAMS)
    assert [p.name for p in (tmp_path / 'mine').iterdir()] == ['notes.txt']


def test_make_digit_scenes__broken_manifest_is_told(tmp_path):
    (tmp_path / 'scenes').mkdir()
    (tmp_path / 'scenes' / digit_scenes.MANIFEST).write_text('{"par')
    with pytest.raises(FileExistsError, match=r'cannot be read'):
        make_digit_scenes(tmp_path / 'scenes', PARAMS)


def test_make_digit_scenes__failure_leaves_nothing(tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_digit_scenes(tmp_path / 'scenes', PARAMS, stop)
    assert list(tmp_path.iterdir()) == []


def test_make_digit_scenes__killed_run_is_cleared_by_the_next(tmp_path):
    code = (
        'import sys\n'
        'from era_mm.datasets.digit_scenes import make_digit_scenes\n'
        'make_digit_scenes(sys.argv[1], progress=lambda i, n: '
        'print(i, flush=True))'
    )
    out = tmp_path / 'scenes'
    process = subprocess.Popen(
        [sys.executable, '-c', code, str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    with process.stdout as lines:
        while '3' not in next(lines):
            pass
        process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1
    make_digit_scenes(out, PARAMS)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ('name', 'value'), [('num_val', 0), ('seed', -1), ('image_size', 32)]
)
def test_scene_params__bad_values_are_told(name, value):
    with pytest.raises(ValueError, match=f'`{name}` must be .* {value}'):
        SceneParams(**{name: value})
