# KD, ResNet-110 to ResNet-32, CIFAR-100, 240 epochs.
# Plain twin: plain_resnet32_cifar100.py; train the teacher first.
#   mim train era_mm plain_resnet110_cifar100.py
#   mim train era_mm logit_resnet110_resnet32_cifar100.py
_base_ = '../plain/plain_resnet32_cifar100.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/plain_resnet110_cifar100.py',
        checkpoint='work_dirs/plain_resnet110_cifar100/epoch_240.pth',
    ),
    # 0.9 at temperature 4 beside 0.1 on the labels. [mdistiller]
    distiller=dict(type='era_mm.LogitDistiller', label_weight=0.1),
)
