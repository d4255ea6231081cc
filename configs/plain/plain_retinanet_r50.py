# RetinaNet R50 alone, COCO 2017, 2x: the plain twin of
# era_retinanet_r101_r50.py with the same schedule and seed.
#   mim train era_mm configs/plain/plain_retinanet_r50.py
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'

# lr 0.01 at batch 16 and 24 epochs are mmdet's; clipping at 35 and 1000
# iterations of warm-up are what distillation configs of this pair use.
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000
    ),
    dict(
        type='MultiStepLR',
        begin=0,
        end=24,
        by_epoch=True,
        milestones=[16, 22],
        gamma=0.1,
    ),
]
default_hooks = dict(
    checkpoint=dict(save_best='coco/bbox_mAP', max_keep_ckpts=3)
)
randomness = dict(seed=0)
