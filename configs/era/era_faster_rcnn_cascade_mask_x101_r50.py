# ERA, Cascade Mask R-CNN X101-64x4d (45.6 AP) to Faster R-CNN R50, COCO 2017,
# 2x.
# Plain twin: plain_faster_rcnn_r50.py. Teacher before student in the name.
#   mim train era_mm configs/era/era_faster_rcnn_cascade_mask_x101_r50.py
_base_ = ['../plain/plain_faster_rcnn_r50.py', '../_base_/era_runtime.py']

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmdet::cascade_rcnn/'
        'cascade-mask-rcnn_x101-64x4d_fpn_20e_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/cascade_rcnn/'
        'cascade_mask_rcnn_x101_64x4d_fpn_20e_coco/'
        'cascade_mask_rcnn_x101_64x4d_fpn_20e_coco_20200512_161033-bdb5126a.pth',
    ),
    distiller=dict(type='era_mm.ERADistiller'),
)
