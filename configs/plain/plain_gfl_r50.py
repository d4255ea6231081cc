# GFL R50 alone, COCO 2017, 1x:
#   mim train era_mm configs/plain/plain_gfl_r50.py
_base_ = 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'

# mmdet's schedule, with the clipping at 35 and the 1000 iterations of warm-up
# of the field's distillation configs.
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
param_scheduler = [
    dict(_base_.param_scheduler[0], end=1000),
    *_base_.param_scheduler[1:],
]
default_hooks = dict(
    checkpoint=dict(save_best='coco/bbox_mAP', max_keep_ckpts=3)
)
randomness = dict(seed=0)
