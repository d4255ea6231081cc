# WRN-40-1 alone, CIFAR-100, 240 epochs:
#   mim train era_mm configs/plain/plain_wrn_40_1_cifar100.py
_base_ = '../_base_/cifar100.py'
model = dict(
    backbone=dict(type='era_mm.CIFARWideResNet', depth=40, width=1),
    head=dict(in_channels=64),
)
