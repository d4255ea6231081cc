# SoKD around FitNet, ResNet32x4 to ResNet8x4, CIFAR-100, 240 epochs.
# Plain twin: plain_resnet8x4_cifar100.py; train the teacher first.
#   mim train era_mm plain_resnet32x4_cifar100.py
#   mim train era_mm sokd_resnet32x4_resnet8x4_cifar100.py
_base_ = ['../plain/plain_resnet8x4_cifar100.py']
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='era_mm.PolicyHook', interval=500)]

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/plain_resnet32x4_cifar100.py',
        checkpoint='work_dirs/plain_resnet32x4_cifar100/epoch_240.pth',
    ),
    distiller=dict(
        type='era_mm.SoKDDistiller',
        # Before pooling: areas need maps.
        base=dict(type='era_mm.FeatureImitationDistiller', source='backbone'),
    ),
)
