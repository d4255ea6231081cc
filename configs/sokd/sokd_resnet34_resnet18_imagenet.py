# SoKD around FitNet, ResNet-34 (73.6 top-1) to ResNet-18, ImageNet-1k.
# Plain twin: plain_resnet18_imagenet.py.
#   mim train era_mm sokd_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = ['../plain/plain_resnet18_imagenet.py']
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='era_mm.PolicyHook', interval=500)]

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmpretrain::resnet/resnet34_8xb32_in1k.py',
        checkpoint='https://mmassets.onedl.ai/mmclassification/v0/resnet/'
        'resnet34_8xb32_in1k_20210831-f257d4e6.pth',
    ),
    distiller=dict(
        type='era_mm.SoKDDistiller',
        # Before pooling: areas need maps.
        base=dict(type='era_mm.FeatureImitationDistiller', source='backbone'),
    ),
)
