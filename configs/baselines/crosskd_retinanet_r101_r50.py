# CrossKD, RetinaNet R101 (38.9 AP) to RetinaNet R50, COCO 2017, 2x.
# Plain twin: plain_retinanet_r50.py.
#   mim train era_mm crosskd_retinanet_r101_r50.py
_base_ = '../plain/plain_retinanet_r50.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/retinanet/'
        'retinanet_r101_fpn_2x_coco/'
        'retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth',
    ),
    distiller=dict(type='era_mm.CrossKDDistiller'),
)
