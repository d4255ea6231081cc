# IE-DML, ResNet-56 and ResNet-20 teach each other, CIFAR-100, 240 epochs.
# Plain twin: plain_resnet20_cifar100.py, of the first student. The data is
# the paper's; its schedule is not known, so this is the field's. [ours]
#   mim train era_mm configs/ie_kd/ie_dml_resnet56_resnet20_cifar100.py
_base_ = '../plain/plain_resnet20_cifar100.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
custom_hooks = [
    dict(type='era_mm.ModesHook', modes=['resnet56']),
    dict(type='era_mm.StudentFilesHook'),
]
model = dict(
    _delete_=True,
    type='era_mm.MutualDistillation',
    students=dict(
        resnet20=_base_.model,
        resnet56='{{ fileDirname }}/../plain/plain_resnet56_cifar100.py',
    ),
    distiller=dict(type='era_mm.IEKDDistiller', source='backbone'),
)
optim_wrapper = dict(constructor='era_mm.MutualOptimWrapperConstructor')
