# ERA, ResNet-110 to ResNet-32, CIFAR-100, 240 epochs.
# Plain twin: plain_resnet32_cifar100.py; train the teacher first.
#   mim train era_mm configs/plain/plain_resnet110_cifar100.py
#   mim train era_mm configs/era/era_resnet110_resnet32_cifar100.py
_base_ = ['../plain/plain_resnet32_cifar100.py', '../_base_/era_runtime.py']

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
        config='{{ fileDirname }}/../plain/plain_resnet110_cifar100.py',
        checkpoint='work_dirs/plain_resnet110_cifar100/epoch_240.pth',
    ),
    distiller=dict(
        type='era_mm.ERADistiller',
        # The released CIFAR configs', too.
        logit=dict(weight=1.0, temperature=4.0),
    ),
)
