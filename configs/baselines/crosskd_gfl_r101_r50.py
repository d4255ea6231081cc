# CrossKD, GFL R101 (44.7 AP, 2x multi-scale) to GFL R50, COCO 2017, 1x.
# Plain twin: plain_gfl_r50.py.
#   mim train era_mm crosskd_gfl_r101_r50.py
_base_ = '../plain/plain_gfl_r50.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/gfl/'
        'gfl_r101_fpn_mstrain_2x_coco/'
        'gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth',
    ),
    # 4 on the KL of the distributions. [official code]
    distiller=dict(type='era_mm.CrossKDDistiller', box_weight=4.0),
)
