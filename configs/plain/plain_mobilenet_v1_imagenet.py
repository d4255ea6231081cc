# MobileNetV1 alone, ImageNet-1k, 100 epochs:
#   mim train era_mm configs/plain/plain_mobilenet_v1_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = ['mmpretrain::_base_/models/resnet18.py', '../_base_/imagenet.py']
model = dict(
    backbone=dict(_delete_=True, type='era_mm.MobileNetV1'),
    head=dict(in_channels=1024),
)
