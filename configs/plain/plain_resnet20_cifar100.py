# ResNet-20 alone, CIFAR-100, 240 epochs:
#   mim train era_mm configs/plain/plain_resnet20_cifar100.py
_base_ = '../_base_/cifar100.py'
model = dict(
    backbone=dict(type='era_mm.CIFARResNet', depth=20),
    head=dict(in_channels=64),
)
