"""Configs and data that the tests of several parts of the engine share."""

import pytest
import torch
from mmengine.config import Config

from era_mm import cli
from era_mm.core import BaseDistiller
from era_mm.engine.host_configs import read_host_config
from era_mm.registry import MODELS as ERA_MODELS
from era_mm.testing import write_coco

RESNET = (
    'backbone=dict(depth=18, base_channels=8, stem_channels=8, '
    'frozen_stages=-1, norm_eval=False, init_cfg=None, '
    "norm_cfg=dict(type='BN', requires_grad=True), style='pytorch'), "
    'neck=dict(in_channels=[8, 16, 32, 64], out_channels=16{neck})'
)


DENSE = (
    'bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1, '
    'num_classes={classes}{head})'
)


ROI = (
    'rpn_head=dict(in_channels=16, feat_channels=16), roi_head=dict('
    'bbox_roi_extractor=dict(out_channels=16), bbox_head=dict('
    'in_channels=16, fc_out_channels=16, num_classes=3){masks})'
)


MASKS = (
    ', mask_roi_extractor=dict(out_channels=16), mask_head=dict('
    'in_channels=16, conv_out_channels=16, num_convs=1, num_classes=3)'
)


SWIN_DETECTOR = (
    'backbone=dict(embed_dims=8, depths=[1, 1, 1, 1], '
    'num_heads=[1, 1, 2, 2], init_cfg=None), '
    'neck=dict(in_channels=[8, 16, 32, 64], out_channels=16)'
)


def dense(neck='', head='', classes=3):
    return f'{RESNET.format(neck=neck)}, ' + DENSE.format(
        classes=classes, head=head
    )


def retina(strides, neck, classes=3):
    return dense(
        f', num_outs={len(strides)}{neck}',
        f', anchor_generator=dict(strides={strides})',
        classes,
    )


MODELS_OF = {
    'retinanet': ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', dense()),
    'retinanet_3_levels': (
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        retina([8, 16, 32], ''),
    ),
    'retinanet_from_4': (
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        retina([4, 8, 16, 32], ', start_level=0'),
    ),
    'retinanet_coarse': (
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        retina([32, 64, 128], ', start_level=3'),
    ),
    'retinanet_5_classes': (
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        dense(classes=5),
    ),
    'retinanet_unpadded': (
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        f'data_preprocessor=dict(pad_size_divisor=1), {dense()}',
    ),
    'fcos': (
        'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
        dense(head=", norm_cfg=dict(type='BN')"),
    ),
    'faster_rcnn': (
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        f'{RESNET.format(neck="")}, {ROI.format(masks="")}',
    ),
    'mask_rcnn_swin': (
        'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        f'{SWIN_DETECTOR}, {ROI.format(masks=MASKS)}',
    ),
    'resnet': (
        'mmpretrain::resnet/resnet18_8xb32_in1k.py',
        'backbone=dict(base_channels=8, stem_channels=8), '
        'head=dict(in_channels=64, num_classes=3, topk=(1,))',
    ),
    'resnet_wide': (
        'mmpretrain::resnet/resnet18_8xb32_in1k.py',
        'backbone=dict(base_channels=16, stem_channels=16), '
        'head=dict(in_channels=128, num_classes=3, topk=(1,))',
    ),
    'vit': (
        'mmpretrain::vision_transformer/vit-base-p16_32xb128-mae_in1k.py',
        'backbone=dict(arch=dict(_delete_=True, embed_dims=24, num_layers=2, '
        'num_heads=2, feedforward_channels=32), init_cfg=None), '
        'head=dict(in_channels=24, num_classes=3, loss=dict(num_classes=3)), '
        'data_preprocessor=dict(num_classes=3)',
    ),
    'swin': (
        'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
        'backbone=dict(arch=dict(_delete_=True, embed_dims=8, '
        'depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])), '
        'head=dict(in_channels=64, num_classes=3), '
        'data_preprocessor=dict(num_classes=3)',
    ),
}


@pytest.fixture
def host(tmp_path):
    """Writes a user's own config that inherits a host's."""

    def write(name):
        base, model = MODELS_OF[name]
        # By its path: 'mmdet::...' reads all metafiles of the host.
        base = str(read_host_config(base).path)
        path = tmp_path / 'own' / f'{name}.py'
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'_base_ = {base!r}\nmodel = dict({model})\n')
        return str(path)

    return write


@pytest.fixture
def make(host, tmp_path, capsys):
    """Runs the command; gives the written config and what was printed."""

    def run(student, teacher, *args):
        out = tmp_path / 'made' / f'{student}_{teacher}.py'
        status = cli.run_make_config(
            [
                *('--student', host(student), '--teacher', host(teacher)),
                *('--teacher-checkpoint', 'random', '--out', str(out), *args),
            ]
        )
        printed = capsys.readouterr()
        assert status == 0, printed.err
        assert len(out.read_text().splitlines()) <= 30
        return Config.fromfile(out), printed.out

    return run


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """Images with one object each, too few to judge a teacher by."""
    return write_coco(tmp_path_factory.mktemp('many'), num_images=24)


class Dropping(BaseDistiller):
    """Draws a random number of torch's in every step."""

    def loss(self, *, student_feats, teacher_feats, data_samples):
        feat = torch.dropout(student_feats['neck'][0], 0.5, True)
        return {'loss_dropping': feat.square().mean()}


ERA_MODELS.register_module(name='_Dropping', module=Dropping, force=True)
