# MobileNetV2 of half the width alone, CIFAR-100, 240 epochs:
#   mim train era_mm configs/plain/plain_mobilenet_v2_cifar100.py
_base_ = '../_base_/cifar100.py'
model = dict(
    backbone=dict(type='era_mm.CIFARMobileNetV2'),
    head=dict(in_channels=1280),
)
optim_wrapper = dict(optimizer=dict(lr=0.01))
