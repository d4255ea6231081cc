# CrossKD, ATSS R101 (41.5 AP) to ATSS R50, COCO 2017, 1x.
# Plain twin: plain_atss_r50.py.
#   mim train era_mm crosskd_atss_r101_r50.py
_base_ = '../plain/plain_atss_r50.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmdet::atss/atss_r101_fpn_1x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/atss/'
        'atss_r101_fpn_1x_coco/'
        'atss_r101_fpn_1x_20200825-dfcadd6f.pth',
    ),
    # Of scores and boxes; the released config has centreness as well, with
    # weight 1.
    distiller=dict(type='era_mm.CrossKDDistiller'),
)
