# PKD, RepPoints X101-DCN (44.2 AP) to RepPoints R50, COCO 2017, 2x.
# Plain twin: plain_reppoints_r50.py.
#   mim train era_mm pkd_reppoints_x101_r50.py
_base_ = '../plain/plain_reppoints_r50.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmdet::reppoints/'
        'reppoints-moment_x101-dconv-c3-c5_fpn-gn_head-gn_2x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/reppoints/'
        'reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck%2Bhead_2x_coco/'
        'reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck%2Bhead_2x_coco_20200329-f87da1ea.pth',
    ),
    # 10 on each of the first four levels. [mmrazor]
    distiller=dict(type='era_mm.PKDDistiller', loss_weight=10.0),
)
