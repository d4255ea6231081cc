# SimKD, ResNet32x4 to ResNet8x4, CIFAR-100, 240 epochs.
# Plain twin: plain_resnet8x4_cifar100.py; train the teacher first.
#   mim train era_mm plain_resnet32x4_cifar100.py
#   mim train era_mm simkd_resnet32x4_resnet8x4_cifar100.py
_base_ = '../plain/plain_resnet8x4_cifar100.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/plain_resnet32x4_cifar100.py',
        checkpoint='work_dirs/plain_resnet32x4_cifar100/epoch_240.pth',
    ),
    # The projector's middle layers have half the teacher's channels: f = 2.
    distiller=dict(type='era_mm.SimKDDistiller', channels=[256, 256]),
    inherit=['head'],
)
