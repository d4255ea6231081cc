# ResNet-18 alone, ImageNet-1k, 100 epochs:
#   mim train era_mm configs/plain/plain_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = ['mmpretrain::_base_/models/resnet18.py', '../_base_/imagenet.py']
