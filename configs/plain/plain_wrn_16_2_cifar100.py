# WRN-16-2 alone, CIFAR-100, 240 epochs:
#   mim train era_mm configs/plain/plain_wrn_16_2_cifar100.py
_base_ = '../_base_/cifar100.py'
model = dict(
    backbone=dict(type='era_mm.CIFARWideResNet', depth=16, width=2),
    head=dict(in_channels=128),
)
