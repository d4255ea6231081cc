# IE-DML, ResNet-34 and ResNet-18 teach each other, ImageNet-1k, 100 epochs.
# Plain twin: plain_resnet18_imagenet.py, of the first student.
#   mim train era_mm configs/ie_kd/ie_dml_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = ['../plain/plain_resnet18_imagenet.py']
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
custom_hooks = [
    dict(type='era_mm.ModesHook', modes=['resnet34']),
    dict(type='era_mm.StudentFilesHook'),
]

model = dict(
    _delete_=True,
    type='era_mm.MutualDistillation',
    students=dict(
        resnet18=_base_.model,
        resnet34='mmpretrain::resnet/resnet34_8xb32_in1k.py',
    ),
    distiller=dict(type='era_mm.IEKDDistiller', source='backbone'),
)
optim_wrapper = dict(constructor='era_mm.MutualOptimWrapperConstructor')
