# ShuffleNetV1 alone, CIFAR-100, 240 epochs:
#   mim train era_mm configs/plain/plain_shufflenet_v1_cifar100.py
_base_ = '../_base_/cifar100.py'
model = dict(
    backbone=dict(type='era_mm.CIFARShuffleNetV1'),
    head=dict(in_channels=960),
)
optim_wrapper = dict(optimizer=dict(lr=0.01))
