# PKD, RetinaNet X101-64x4d (41.0 AP) to RetinaNet R50, COCO 2017, 2x.
# Plain twin: plain_retinanet_r50.py.
#   mim train era_mm pkd_retinanet_x101_r50.py
_base_ = '../plain/plain_retinanet_r50.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/retinanet/'
        'retinanet_x101_64x4d_fpn_1x_coco/'
        'retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth',
    ),
    # 10 on each of the first four levels. [mmrazor]
    distiller=dict(type='era_mm.PKDDistiller', loss_weight=10.0),
)
