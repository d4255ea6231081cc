# DKD, ResNet32x4 to ResNet8x4, CIFAR-100, 240 epochs.
# Plain twin: plain_resnet8x4_cifar100.py; train the teacher first.
#   mim train era_mm plain_resnet32x4_cifar100.py
#   mim train era_mm dkd_resnet32x4_resnet8x4_cifar100.py
_base_ = 'logit_resnet32x4_resnet8x4_cifar100.py'
model = dict(
    distiller=dict(
        # beta goes by pair, and the loss ramps over 20 epochs of 782
        # iterations. [official code]
        _delete_=True,
        type='era_mm.LogitDistiller',
        logit=dict(kind='dkd', beta=8.0),
        schedules=dict(loss_logit_score=dict(ramp=20 * 782)),
    )
)
