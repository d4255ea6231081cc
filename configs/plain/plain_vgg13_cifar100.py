# VGG13 alone, CIFAR-100, 240 epochs:
#   mim train era_mm configs/plain/plain_vgg13_cifar100.py
_base_ = '../_base_/cifar100.py'
model = dict(
    backbone=dict(type='era_mm.CIFARVGG', depth=13),
    head=dict(in_channels=512),
)
