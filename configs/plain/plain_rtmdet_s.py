# RTMDet-s alone, COCO 2017, 300 epochs, 8 GPUs x 32 images:
#   mim train era_mm configs/plain/plain_rtmdet_s.py \
#       --launcher pytorch --gpus 8
_base_ = 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'
default_hooks = dict(checkpoint=dict(save_best='coco/bbox_mAP'))
randomness = dict(seed=0)
