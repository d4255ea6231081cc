# PKD, Faster R-CNN R101 (39.8 AP) to Faster R-CNN R50, COCO 2017, 2x.
# Plain twin: plain_faster_rcnn_r50.py.
#   mim train era_mm pkd_faster_rcnn_r101_r50.py
_base_ = '../plain/plain_faster_rcnn_r50.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/'
        'faster_rcnn_r101_fpn_2x_coco/'
        'faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth',
    ),
    # 6 on each of the first four levels. [mmrazor]
    distiller=dict(type='era_mm.PKDDistiller'),
)
