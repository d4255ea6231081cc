# ResNet-20 alone, CIFAR-10, 160 epochs:
#   mim train era_mm configs/plain/plain_resnet20_cifar10.py
_base_ = '../_base_/cifar10.py'
model = dict(
    backbone=dict(type='era_mm.CIFARResNet', depth=20),
    head=dict(in_channels=64),
)
