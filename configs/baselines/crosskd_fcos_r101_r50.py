# CrossKD, FCOS R101 (40.8 AP) to FCOS R50, COCO 2017, 2x, multi-scale.
# Plain twin: plain_fcos_r50.py.
#   mim train era_mm crosskd_fcos_r101_r50.py
_base_ = '../plain/plain_fcos_r50.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmdet::fcos/fcos_r101-caffe_fpn_gn-head_ms-640-800-2x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/fcos/'
        'fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco/'
        'fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco-511424d6.pth',
    ),
    # Layer and weights are the released ones for FCOS; its box loss is IoU's,
    # here GIoU's. [ours]
    distiller=dict(
        type='era_mm.CrossKDDistiller',
        layer=2,
        score_weight=0.4,
        box_weight=0.75,
    ),
)
