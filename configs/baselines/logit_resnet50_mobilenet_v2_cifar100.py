# KD, ResNet-50 (79.9 top-1) to MobileNetV2, CIFAR-100, 240 epochs.
# Plain twin: plain_mobilenet_v2_cifar100.py.
#   mim train era_mm logit_resnet50_mobilenet_v2_cifar100.py
_base_ = '../plain/plain_mobilenet_v2_cifar100.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmpretrain::resnet/resnet50_8xb16_cifar100.py',
        checkpoint='https://mmassets.onedl.ai/mmclassification/v0/resnet/'
        'resnet50_b16x8_cifar100_20210528-67b58a1b.pth',
    ),
    # 0.9 at temperature 4 beside 0.1 on the labels. [mdistiller]
    distiller=dict(type='era_mm.LogitDistiller', label_weight=0.1),
)
