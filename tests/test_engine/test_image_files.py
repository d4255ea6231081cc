"""Images that cannot be read are named, in the run and in data workers."""

import copy
import pickle
from pathlib import Path

import cv2
import pytest
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import ConcatDataset
from mmengine.registry import DATASETS, DefaultScope
from torch.utils.data import DataLoader

from era_mm import cli
from era_mm.engine.image_files import NamesItsFile, name_image_files
from era_mm.errors import UserError
from era_mm.testing import (
    classifier_config,
    classifier_loader,
    detector_config,
    distillation_config,
    run_config,
    write_class_folders,
    write_coco,
)


def cut(path):
    path = Path(path)
    path.write_bytes(path.read_bytes()[:200])


def empty(path):
    Path(path).write_bytes(b'')


def text(path):
    Path(path).write_text('<html>404</html>')


def folder(path):
    Path(path).unlink()
    Path(path).mkdir()


@pytest.fixture
def dataset(tmp_path):
    """A built data set of six images."""
    data = write_class_folders(tmp_path / 'data')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return DATASETS.build(classifier_loader(data)['dataset'])


@pytest.mark.parametrize('share', [0.3, 0.9, 1])
@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
def test_jpeg__that_is_cut_off_is_named(share, backend, dataset):
    """Else the decoder could fill the rest with grey."""
    name_image_files(dataset)
    dataset.pipeline.transforms[0].transform.imdecode_backend = backend
    path = dataset.get_data_info(3)['img_path']
    content = cv2.imencode('.jpg', cv2.imread(path))[1].tobytes()
    # What a file holds is told by its content, not by its name.
    Path(path).write_bytes(content)
    assert dataset[3]['inputs'].shape == (3, 32, 32)
    Path(path).write_bytes(content[: int(share * len(content)) - 1])
    with pytest.raises(
        UserError, match='cannot be read as an image'
    ) as caught:
        dataset[3]
    assert path in str(caught.value)


@pytest.mark.parametrize('spoil', [cut, empty, text, folder])
def test_image__that_cannot_be_read_is_named(spoil, dataset):
    name_image_files(dataset)
    path = dataset.get_data_info(3)['img_path']
    assert dataset[3]['inputs'].shape == (3, 32, 32)
    spoil(path)
    with pytest.raises(UserError) as caught:
        dataset[3]
    assert f'{path}: cannot be read as an image (' in str(caught.value)
    assert dataset[2]['inputs'].shape == (3, 32, 32)


def test_name_image_files__finds_wrapped_datasets_and_names_once(dataset):
    whole = ConcatDataset([dataset, copy.deepcopy(dataset)])
    name_image_files(whole)
    name_image_files(whole)
    for part in whole.datasets:
        first = part.pipeline.transforms[0]
        assert isinstance(first, NamesItsFile)
        assert isinstance(first.transform, LoadImageFromFile)
    # What asks the transform finds it as it was.
    assert first.color_type == 'color'
    assert repr(first) == repr(first.transform)
    assert pickle.loads(pickle.dumps(first)).color_type == 'color'


def test_image__that_an_allowing_pipeline_leaves_out_is_left_out(dataset):
    """``ignore_empty`` of the host's transform stays what it is."""
    dataset.pipeline.transforms[0].ignore_empty = True
    name_image_files(dataset)
    info = dataset.get_data_info(0)
    empty(info['img_path'])
    assert dataset.pipeline.transforms[0](info) is None


def test_image__is_named_by_a_data_worker(dataset):
    name_image_files(dataset)
    path = dataset.get_data_info(0)['img_path']
    empty(path)
    with pytest.raises(UserError) as caught:
        next(iter(DataLoader(dataset, num_workers=1)))
    printed = cli._explain(caught.value)
    assert printed.startswith(f'\nerror: {path}: cannot be read as an image (')
    assert 'Traceback' not in printed


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('host', ['mmdet', 'mmpretrain'])
def test_train__names_the_image(host, workers, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '0')
    # mmengine keeps the scope of a run by this name and the second.
    name = f'{host}_{workers}'
    distiller = dict(type='era_mm.FeatureImitationDistiller')
    if host == 'mmdet':
        data = write_coco(tmp_path / 'data')
        cfg = run_config(distillation_config(distiller), data, name)
        path = Path(data, 'images', '0003.png')
        models = detector_config(), detector_config(width=16, channels=24)
    else:
        data = write_class_folders(tmp_path / 'data')
        path = Path(data, 'b', '0.png')
        models = classifier_config(), classifier_config(width=16)
        cfg = run_config(
            {},
            '',
            name,
            default_scope='mmpretrain',
            train_dataloader=classifier_loader(data),
        )
    cfg.model = distillation_config(distiller, *models)
    cfg.train_dataloader.num_workers = workers
    cfg.preflight = False
    for part in ('val', 'test'):
        for key in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{part}_{key}'] = None
    file = tmp_path / 'toy.py'
    Config(cfg.to_dict()).dump(file)
    cut(path)
    arguments = [str(file), '--work-dir', str(tmp_path / 'w')]
    assert cli.run_train(arguments) == 1
    printed = capsys.readouterr().err.rpartition('\nerror: ')[2]
    assert printed.startswith(f'{path}: cannot be read as an image (')
    assert 'Traceback' not in printed
