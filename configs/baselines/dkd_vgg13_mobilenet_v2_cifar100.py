# DKD, VGG13 to MobileNetV2, CIFAR-100, 240 epochs.
# Plain twin: plain_mobilenet_v2_cifar100.py; train the teacher first.
#   mim train era_mm plain_vgg13_cifar100.py
#   mim train era_mm dkd_vgg13_mobilenet_v2_cifar100.py
_base_ = 'logit_vgg13_mobilenet_v2_cifar100.py'
model = dict(
    distiller=dict(
        # beta goes by pair, and the loss ramps over 20 epochs of 782
        # iterations. [official code]
        _delete_=True,
        type='era_mm.LogitDistiller',
        logit=dict(kind='dkd', beta=6.0),
        schedules=dict(loss_logit_score=dict(ramp=20 * 782)),
    )
)
