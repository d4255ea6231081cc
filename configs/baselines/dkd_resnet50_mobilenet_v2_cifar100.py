# DKD, ResNet-50 (79.9 top-1) to MobileNetV2, CIFAR-100, 240 epochs.
# Plain twin: plain_mobilenet_v2_cifar100.py.
#   mim train era_mm dkd_resnet50_mobilenet_v2_cifar100.py
_base_ = 'logit_resnet50_mobilenet_v2_cifar100.py'
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
