# DKD, ResNet-110 to ResNet-32, CIFAR-100, 240 epochs.
# Plain twin: plain_resnet32_cifar100.py; train the teacher first.
#   mim train era_mm plain_resnet110_cifar100.py
#   mim train era_mm dkd_resnet110_resnet32_cifar100.py
_base_ = 'logit_resnet110_resnet32_cifar100.py'
model = dict(
    distiller=dict(
        # beta goes by pair, and the loss ramps over 20 epochs of 782
        # iterations. [official code]
        _delete_=True,
        type='era_mm.LogitDistiller',
        logit=dict(kind='dkd', beta=2.0),
        schedules=dict(loss_logit_score=dict(ramp=20 * 782)),
    )
)
