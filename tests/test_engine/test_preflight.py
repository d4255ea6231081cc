import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from era_mm.engine.preflight import (
    check_checkpoints,
    check_data,
    find_config,
    find_fault_among,
)
from era_mm.errors import UserError


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def coco(root: str = 'data/coco/') -> dict:
    return dict(
        type='CocoDataset',
        data_root=root,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        pipeline=[],
    )


def config(train: dict, **kwargs) -> Config:
    return Config(
        dict(
            default_scope='mmdet',
            train_dataloader=dict(dataset=train),
            **kwargs,
        )
    )


def make_data(root: Path) -> None:
    (root / 'annotations').mkdir(parents=True)
    (root / 'annotations' / 'train.json').write_text(json.dumps({}))
    (root / 'train').mkdir()


def test_check_data__passes_what_is_there(tmp_path: Path) -> None:
    make_data(tmp_path / 'data' / 'coco')
    check_data(config(coco()), ('train', 'val'))


def test_check_data__names_all_that_is_missing_and_the_way_to_get_it() -> None:
    cfg = config(
        coco(), val_evaluator=dict(type='CocoMetric', ann_file='no/val.json')
    )
    with pytest.raises(UserError) as caught:
        check_data(cfg, ('train', 'val'))
    message = str(caught.value)
    assert (
        'train_dataloader.dataset.ann_file: data/coco/annotations/train.json'
    ) in message
    assert (
        'train_dataloader.dataset.data_prefix.img: data/coco/train/' in message
    )
    assert 'val_evaluator.ann_file: no/val.json' in message
    assert f'looked from {Path.cwd()}' in message
    assert '--dataset-name coco2017' in message


@pytest.mark.parametrize(
    ('wrap', 'key'),
    [
        (
            lambda inner: dict(type='RepeatDataset', times=2, dataset=inner),
            'dataset.dataset.ann_file',
        ),
        (
            lambda inner: dict(type='ConcatDataset', datasets=[inner]),
            'dataset.datasets[0].ann_file',
        ),
        (
            lambda inner: dict(
                type='ClassBalancedDataset',
                oversample_thr=0.1,
                dataset=dict(type='ConcatDataset', datasets=[inner, inner]),
            ),
            'dataset.dataset.datasets[1].ann_file',
        ),
    ],
)
def test_check_data__sees_through_wrappers(wrap, key: str) -> None:
    with pytest.raises(UserError, match='ann_file') as caught:
        check_data(config(wrap(coco())), ('train',))
    assert key in str(caught.value)


@pytest.mark.parametrize(
    'name', ['digit_scenes', 'digit_crops', 'letter_scenes']
)
def test_check_data__tells_how_to_make_what_needs_no_download(
    name: str,
) -> None:
    with pytest.raises(UserError) as caught:
        check_data(config(coco(f'data/{name}/')), ('train',))
    assert f'python tools/make_{name}.py' in str(caught.value)
    # Scenes are COCO in form, and nothing else.
    assert 'COCO 2017' not in str(caught.value)


def test_check_data__leaves_remote_data_alone() -> None:
    remote = coco() | dict(backend_args=dict(backend='petrel'))
    check_data(config(remote), ('train',))


def test_check_data__leaves_data_that_downloads_itself_alone() -> None:
    cfg = config(dict(type='CIFAR10', data_prefix='data/cifar10'))
    cfg.default_scope = 'mmpretrain'
    check_data(cfg, ('train',))


def test_check_data__looks_at_the_splits_of_the_run_only() -> None:
    check_data(config(coco()), ('test',))


def test_check_checkpoints__names_a_missing_teacher() -> None:
    cfg = Config(
        dict(
            model=dict(
                teacher=dict(checkpoint='teacher.pth'),
                student=dict(
                    backbone=dict(
                        init_cfg=dict(checkpoint='torchvision://resnet50')
                    )
                ),
            )
        )
    )
    with pytest.raises(UserError, match=r"teacher\.pth': there is no file"):
        check_checkpoints(cfg)
    torch.save({}, 'teacher.pth')
    check_checkpoints(cfg)


def test_check_checkpoints__asks_for_no_file_that_a_teacher_never_reads():
    config = dict(backbone=dict(init_cfg=dict(checkpoint='no.pth')))
    torch.save({}, 'teacher.pth')
    teacher = dict(config=config, checkpoint='teacher.pth')
    check_checkpoints(Config(dict(model=dict(teacher=teacher))))
    check_checkpoints(Config(dict(model=dict(teacher=dict(big=teacher)))))
    with pytest.raises(UserError, match=r'no\.pth'):
        check_checkpoints(Config(dict(model=dict(student=config))))


def test_check_checkpoints__tells_a_cut_off_file_from_another() -> None:
    cfg = Config(dict(load_from='epoch_1.pth'))
    file = Path('epoch_1.pth')
    torch.save(dict(weight=torch.ones(1000)), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match='cut off'):
        check_checkpoints(cfg)
    file.write_text('<html>404</html>')
    with pytest.raises(UserError, match='not a checkpoint'):
        check_checkpoints(cfg)
    torch.save({}, file, _use_new_zipfile_serialization=False)
    check_checkpoints(cfg)


@pytest.mark.parametrize(
    ('extra', 'needed'),
    [
        (dict(), False),
        (dict(custom_hooks=[dict(type='EMAHook')]), False),
        (dict(custom_hooks=[dict(type='era_mm.TWIHook', modes=['S'])]), False),
        (dict(custom_hooks=[dict(type='era_mm.TWIHook')]), True),
        (dict(custom_hooks=[dict(type='era_mm.TWIHook', modes=['T'])]), True),
        (
            dict(custom_hooks=[dict(type='era_mm.ModesHook', modes=['S'])]),
            False,
        ),
        (
            dict(custom_hooks=[dict(type='era_mm.ModesHook', modes=['T'])]),
            True,
        ),
        (dict(inference_mode='T'), True),
    ],
)
def test_check_checkpoints__of_a_test_wants_a_teacher_for_modes_alone(
    extra: dict, needed: bool
) -> None:
    torch.save({}, 'student.pth')
    model = dict(
        teacher=dict(checkpoint='teacher.pth'),
        # Read when a training begins, and never by a test.
        student=dict(backbone=dict(init_cfg=dict(checkpoint='no.pth'))),
    )
    if 'inference_mode' in extra:
        model |= extra
    cfg = Config(dict(model=model, load_from='student.pth', **extra))
    if needed:
        with pytest.raises(UserError, match=r'teacher\.pth') as caught:
            check_checkpoints(cfg, training=False)
        assert 'no.pth' not in str(caught.value)
    else:
        check_checkpoints(cfg, training=False)
    with pytest.raises(UserError, match=r'no\.pth'):
        check_checkpoints(cfg)


def test_check_checkpoints__names_a_missing_resume_file() -> None:
    with pytest.raises(UserError, match=r"load_from = 'epoch_9\.pth'"):
        check_checkpoints(Config(dict(load_from='epoch_9.pth')))


def test_find_config__takes_a_path_as_it_is() -> None:
    Path('mine.py').touch()
    assert find_config('mine.py') == 'mine.py'


def test_find_config__finds_a_base_name(tmp_path: Path) -> None:
    folder = tmp_path / 'configs' / 'deep'
    folder.mkdir(parents=True)
    (folder / 'era_toy.py').touch()
    assert Path(find_config('era_toy')) == folder / 'era_toy.py'
    assert Path(find_config('era_toy.py')) == folder / 'era_toy.py'


def test_find_config__shows_the_nearest_names(tmp_path: Path) -> None:
    folder = tmp_path / 'configs'
    (folder / '_base_').mkdir(parents=True)
    (folder / 'era_toy_net.py').touch()
    (folder / '_base_' / 'era_toy_nets.py').touch()
    with pytest.raises(UserError) as caught:
        find_config('configs/era_toy_ner.py')
    message = str(caught.value)
    assert f'{folder / "era_toy_net.py"}' in message
    assert '_base_' not in message


def test_check_checkpoints__lets_a_random_teacher_pass() -> None:
    check_checkpoints(
        Config(dict(model=dict(teacher=dict(checkpoint='random'))))
    )


def test_preflight__one_place_that_is_there_is_enough(tmp_path):
    file = tmp_path / 't.pth'
    torch.save({'w': torch.ones(2)}, file)

    def check(places):
        check_checkpoints(
            Config(dict(model=dict(teacher=dict(checkpoint=places))))
        )

    check(['none.pth', str(file)])
    check(['none.pth', 'https://example.org/t.pth'])
    with pytest.raises(UserError, match=r'none\.pth.*; .*other\.pth'):
        check(['none.pth', 'other.pth'])


def test_find_fault__of_a_broken_index_of_the_archive(tmp_path):
    """Of 64 bits, with a number of disks that Python's reader refuses."""
    file = tmp_path / 'f.pth'
    torch.save({'a': torch.ones(3)}, file)
    data = bytearray(file.read_bytes())
    at = data.rindex(b'PK\x06\x07')
    data[at + 16] = 9
    file.write_bytes(data)
    assert 'cut off' in find_fault_among(str(file))
