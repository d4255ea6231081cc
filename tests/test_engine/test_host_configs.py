"""Configs of the hosts, and what they say."""

import textwrap

import pytest
from mmengine.config import Config

from era_mm.engine.host_configs import (
    class_names,
    image_size,
    published_checkpoint,
    read_host_config,
)


def test_published_checkpoint__is_the_metafiles():
    config = read_host_config('mmdet::retinanet/retinanet_r101_fpn_2x_coco')
    assert published_checkpoint(config).endswith(
        'retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth'
    )


def test_class_names__of_config_data_set_and_wrappers(host, tmp_path):
    coco = class_names(read_host_config(host('retinanet')))
    assert len(coco) == 80
    assert coco[0] == 'person'
    own = tmp_path / 'classes.py'
    own.write_text(
        textwrap.dedent("""
        default_scope = 'mmdet'
        model = dict(type='RetinaNet')
        inner = dict(type='CocoDataset', metainfo=dict(classes=('a', 'b')))
        train_dataloader = dict(
            dataset=dict(type='RepeatDataset', times=2, dataset=inner)
        )
        """)
    )
    assert class_names(read_host_config(str(own))) == ('a', 'b')
    own.write_text("model = dict(type='RetinaNet')\n")
    assert class_names(read_host_config(str(own))) is None


@pytest.mark.parametrize(
    ('train', 'test', 'expected'),
    [
        # mmdet's sizes are width and height.
        (dict(type='Resize', scale=(1333, 800)), None, (800, 1333, 'train')),
        (
            dict(type='mmdet.RandomChoiceResize', scales=[(1333, 640)]),
            dict(type='mmdet.Resize', scale=(1333, 800)),
            (800, 1333, 'test'),
        ),
        (dict(type='RandomResizedCrop', scale=224), None, (224, 224, 'train')),
        (dict(type='RandomCrop', crop_size=32), None, (32, 32, 'train')),
        (dict(type='Resize', scale_factor=0.5), None, None),
        (None, None, None),
    ],
)
def test_image_size__is_what_the_pipeline_ends_with(train, test, expected):
    steps = {'train': train, 'test': test}
    cfg = Config(
        {
            f'{name}_dataloader': dict(
                dataset=dict(
                    type='RepeatDataset',
                    dataset=dict(
                        pipeline=[
                            dict(type='Load'),
                            step,
                            dict(type='PackDetInputs'),
                        ]
                    ),
                )
            )
            for name, step in steps.items()
            if step is not None
        }
    )
    if expected is not None:
        expected = (*expected[:2], f'{expected[2]}_dataloader')
    assert image_size(cfg) == expected
