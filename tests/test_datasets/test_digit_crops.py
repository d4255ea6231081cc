import json
from itertools import combinations

import numpy as np
import pytest
from mmengine.registry import init_default_scope
from mmpretrain.datasets import CustomDataset
from PIL import Image
from sklearn.datasets import load_digits

from era_mm.datasets import digit_crops
from era_mm.datasets.digit_crops import (
    MANIFEST,
    SIZE,
    CropParams,
    compose_crop,
    make_digit_crops,
)
from era_mm.datasets.digit_drawing import (
    INK,
    MIN_VISIBLE,
    SPLITS,
    Layer,
    split_material,
)
from era_mm.testing import checksums

PARAMS = CropParams(seed=3, num_train=60, num_val=20, num_test=20)


@pytest.fixture(scope='module')
def material():
    return split_material(PARAMS.seed)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits') / 'crops'
    assert make_digit_crops(folder, PARAMS)
    return folder


@pytest.fixture(scope='module')
def sources(root):
    return {
        split: json.loads((root / 'sources' / f'{split}.json').read_text())
        for split in SPLITS
    }


def overlaps(one, other):
    """Whether two `photo, [x, y, width, height]` share a pixel."""
    (photo, region), (other_photo, other_region) = one, other
    return photo == other_photo and all(
        max(region[i], other_region[i])
        < min(region[i] + region[i + 2], other_region[i] + other_region[i + 2])
        for i in (0, 1)
    )


def test_make_digit_crops__same_seed_gives_the_same_bytes(root, tmp_path):
    make_digit_crops(tmp_path / 'again', PARAMS)
    assert checksums(tmp_path / 'again') == checksums(root)


def test_make_digit_crops__crop_does_not_depend_on_the_number(root, tmp_path):
    make_digit_crops(tmp_path / 'few', CropParams(3, 2, 1, 1))
    (file,) = (tmp_path / 'few/train').glob('*/000001.png')
    same = root / file.relative_to(tmp_path / 'few')
    assert file.read_bytes() == same.read_bytes()


def test_compose_crop__other_seed_gives_another_crop(material):
    one, other = (
        compose_crop(material['train'], 0, CropParams(seed)) for seed in (3, 4)
    )
    assert not np.array_equal(one.image, other.image)


def test_sources__share_no_digit_and_no_photo_pixel(sources):
    digits = {
        split: {entry['digit'] for entry in entries}.union(
            *(entry['clutter_digits'] for entry in entries)
        )
        for split, entries in sources.items()
    }
    assert all(len(found) > 15 for found in digits.values())
    for one, other in combinations(SPLITS, 2):
        assert not digits[one] & digits[other]
        assert not any(
            overlaps(
                (a['photo'], a['photo_region']),
                (b['photo'], b['photo_region']),
            )
            for a in sources[one]
            for b in sources[other]
        )


@pytest.mark.parametrize('split', SPLITS)
def test_sources__folder_is_the_label_of_the_digit(root, sources, split):
    labels = load_digits().target
    assert len(sources[split]) == PARAMS.num_images(split)
    for number, entry in enumerate(sources[split]):
        folder, name = entry['file_name'].split('/')
        assert int(folder) == labels[entry['digit']] == number % 10
        assert name == f'{number:06d}.png'
        with Image.open(root / split / entry['file_name']) as picture:
            assert picture.size == (SIZE, SIZE) == (32, 32)
            assert picture.mode == 'RGB'


@pytest.mark.parametrize('split', SPLITS)
def test_custom_dataset__reads_labels(root, sources, split):
    init_default_scope('mmpretrain')
    data = CustomDataset(data_root=str(root), data_prefix=split)
    assert data.metainfo['classes'] == tuple('0123456789')
    read = {
        info['img_path'].partition(f'/{split}/')[2]: info['gt_label']
        for info in map(data.get_data_info, range(len(data)))
    }
    labels = load_digits().target
    assert read == {
        entry['file_name']: labels[entry['digit']] for entry in sources[split]
    }


def test_compose_crop__digit_stays_visible_near_the_middle(material):
    sides, offsets, shares = [], [], []
    for index in range(60):
        digit = compose_crop(material['train'], index, PARAMS).digit
        x, y, width, height = digit.bbox
        sides.append(height)
        offsets.append((x + width / 2 - 16, y + height / 2 - 16))
        shares.append(digit.visible)
    assert min(shares) >= MIN_VISIBLE
    # 0.5 to 0.8 of 32 pixels for eight rows; a digit may fill fewer, a
    # rotated one more.
    assert 10 <= min(sides) <= 18
    assert 22 <= max(sides) <= 30
    assert 2 < np.abs(offsets).max() < 9
    assert np.abs(np.mean(offsets, axis=0)).max() < 1.5


def test_add_digit__changes_pixels_at_its_ink_alone(material):
    own = digit_crops.by_class(material['train'])[4]
    canvas = np.full((SIZE, SIZE, 3), 0.5)
    digit = digit_crops._add_digit(canvas, own, np.random.default_rng(0))
    assert digit.label == 4
    change = np.abs(canvas - 0.5).max(axis=2)
    # Contrast 0.2 x opacity 0.7 x coverage 0.5; one channel shows it.
    assert change[digit.ink].min() > 0.07
    assert change[0].max() == change[:, 0].max() == 0


def test_add_neighbour__is_cut_by_the_edge(material):
    """It never fills the middle, where the crop's own digit is."""
    touched = np.zeros((SIZE, SIZE))
    rng = np.random.default_rng(0)
    used = []
    for _ in range(40):
        canvas = np.full((SIZE, SIZE, 3), 0.5)
        digit_crops._add_neighbour(canvas, used, material['val'], rng)
        changed = np.abs(canvas - 0.5).max(axis=2) > 0.02
        if changed.any():
            edges = (changed[0], changed[-1], changed[:, 0], changed[:, -1])
            assert any(edge.any() for edge in edges)
        touched += changed
    assert touched[15:17, 15:17].max() < 8
    assert touched.max() > 10
    assert 20 < len(used) <= 40
    assert set(used) <= set(material['val'].digit_ids)


@pytest.mark.parametrize(
    ('top', 'left', 'rows', 'cols'),
    [
        (0, 0, range(4), range(3)),
        (-1, 8, range(1, 4), range(2)),
        (8, -2, range(2), range(2, 3)),
        (12, 0, range(0), range(3)),
        (-6, 0, range(0), range(3)),
    ],
)
def test_layer__inside_cuts_at_the_edges(top, left, rows, cols):
    coverage = np.arange(12.0).reshape(4, 3)
    layer = Layer.inside(coverage, top, left, 10)
    expected = coverage[list(rows)][:, list(cols)]
    assert np.array_equal(layer.coverage, expected)
    if layer.coverage.size:
        canvas = np.zeros((10, 10))
        assert canvas[layer.window].shape == layer.coverage.shape


def test_blend__refuses_to_hide_more_than_a_quarter(material):
    ink = np.zeros((8, 8), dtype=bool)
    ink[2:6, 2:6] = True
    digit = digit_crops.Digit(1, 0, ink, 16)
    canvas = np.zeros((8, 8, 3))
    white = np.ones(3)

    def rows(number):
        return Layer(np.full((number, 8), 2 * INK), 2, 0)

    assert not digit_crops.blend(canvas, [digit], rows(2), white, 1.0)
    assert canvas.sum() == 0
    assert digit_crops.blend(canvas, [digit], rows(1), white, 1.0)
    assert digit.visible == 0.75
    assert canvas[2].min() == 1


def test_make_digit_crops__second_run_changes_nothing(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    assert not make_digit_crops(root, PARAMS)
    assert before == {
        path: path.stat().st_mtime_ns for path in root.rglob('*')
    }


def test_make_digit_crops__other_parameters_are_told(root):
    with pytest.raises(FileExistsError, match=r'digit crops .*seed 3 .* 5 '):
        make_digit_crops(root, CropParams(5, 60, 20, 20))
    assert json.loads((root / MANIFEST).read_text())['seed'] == 3


@pytest.mark.parametrize(('name', 'value'), [('num_val', 0), ('seed', -1)])
def test_crop_params__bad_values_are_told(name, value):
    with pytest.raises(ValueError, match=f'`{name}` must be .* {value}'):
        CropParams(**{name: value})
