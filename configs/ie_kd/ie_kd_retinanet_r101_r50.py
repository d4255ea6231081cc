# IE-KD, RetinaNet R101 (38.9 AP) to RetinaNet R50, COCO 2017, 2x.
# Plain twin: plain_retinanet_r50.py. Teacher before student in the name.
#   mim train era_mm configs/ie_kd/ie_kd_retinanet_r101_r50.py
_base_ = ['../plain/plain_retinanet_r50.py']
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
    # One epoch of 117266 images in batches of 16. [ours]
    distiller=dict(type='era_mm.IEKDDistiller', pretrain_iters=7330),
)

# The twin's schedule, later by that epoch; milestones count from `begin`.
train_cfg = dict(max_epochs=25)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.001,
        by_epoch=False,
        begin=7330,
        end=8330,
    ),
    dict(
        type='MultiStepLR',
        begin=1,
        end=25,
        by_epoch=True,
        milestones=[16, 22],
        gamma=0.1,
    ),
]
