# KD, VGG13 to MobileNetV2, CIFAR-100, 240 epochs.
# Plain twin: plain_mobilenet_v2_cifar100.py; train the teacher first.
#   mim train era_mm plain_vgg13_cifar100.py
#   mim train era_mm logit_vgg13_mobilenet_v2_cifar100.py
_base_ = '../plain/plain_mobilenet_v2_cifar100.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/plain_vgg13_cifar100.py',
        checkpoint='work_dirs/plain_vgg13_cifar100/epoch_240.pth',
    ),
    # 0.9 at temperature 4 beside 0.1 on the labels. [mdistiller]
    distiller=dict(type='era_mm.LogitDistiller', label_weight=0.1),
)
