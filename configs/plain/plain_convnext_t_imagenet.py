# ConvNeXt-T alone, ImageNet-1k, 300 epochs with mixup and cutmix:
#   mim train era_mm configs/plain/plain_convnext_t_imagenet.py \
#       --launcher pytorch --gpus 32
_base_ = 'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py'
# The host's recipe of 32 GPUs x 128 images; on fewer add --auto-scale-lr.
default_hooks = dict(
    checkpoint=dict(save_best='accuracy/top1', max_keep_ckpts=3)
)
randomness = dict(seed=0)
