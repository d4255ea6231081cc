# MGD, Cascade Mask R-CNN X101-32x4d-DCN (47.3 AP) to Faster R-CNN R50, COCO
# 2017, 2x.
# Plain twin: plain_faster_rcnn_r50.py.
#   mim train era_mm mgd_faster_rcnn_cascade_mask_x101_dcn_r50.py
_base_ = '../plain/plain_faster_rcnn_r50.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmdet::dcn/'
        'cascade-mask-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/dcn/'
        'cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco/'
        'cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco-e75f90c8.pth',
    ),
    distiller=dict(
        type='era_mm.MGDDistiller',
        # The paper's for two stages, without the pooled level. [official code]
        source=[
            'neck.fpn_convs.0',
            'neck.fpn_convs.1',
            'neck.fpn_convs.2',
            'neck.fpn_convs.3',
        ],
        mask_ratio=0.45,
        loss_weight=5e-7,
    ),
)
