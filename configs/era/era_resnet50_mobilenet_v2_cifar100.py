# ERA, ResNet-50 (79.9 top-1) to MobileNetV2, CIFAR-100, 240 epochs.
# Plain twin: plain_mobilenet_v2_cifar100.py.
#   mim train era_mm configs/era/era_resnet50_mobilenet_v2_cifar100.py
_base_ = [
    '../plain/plain_mobilenet_v2_cifar100.py',
    '../_base_/era_runtime.py',
]

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=dict(
        _base_.model,
        # The released CIFAR configs': labels have 0.9, of TWI too.
        head=dict(
            _base_.model.head,
            loss=dict(type='CrossEntropyLoss', loss_weight=0.9),
        ),
    ),
    teacher=dict(
        config='mmpretrain::resnet/resnet50_8xb16_cifar100.py',
        checkpoint='https://mmassets.onedl.ai/mmclassification/v0/resnet/'
        'resnet50_b16x8_cifar100_20210528-67b58a1b.pth',
    ),
    distiller=dict(
        type='era_mm.ERADistiller',
        # The released CIFAR configs', too.
        logit=dict(weight=1.0, temperature=4.0),
    ),
)
