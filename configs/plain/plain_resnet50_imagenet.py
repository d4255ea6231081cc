# ResNet-50 alone, ImageNet-1k, 100 epochs:
#   mim train era_mm configs/plain/plain_resnet50_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = ['mmpretrain::_base_/models/resnet50.py', '../_base_/imagenet.py']
