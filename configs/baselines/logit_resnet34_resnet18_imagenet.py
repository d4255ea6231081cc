# KD, ResNet-34 (73.6 top-1) to ResNet-18, ImageNet-1k, 100 epochs.
# Plain twin: plain_resnet18_imagenet.py.
#   mim train era_mm logit_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = '../plain/plain_resnet18_imagenet.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmpretrain::resnet/resnet34_8xb32_in1k.py',
        checkpoint='https://mmassets.onedl.ai/mmclassification/v0/resnet/'
        'resnet34_8xb32_in1k_20210831-f257d4e6.pth',
    ),
    # 0.5 at temperature 1 beside 0.5 on the labels. [mdistiller]
    distiller=dict(
        type='era_mm.LogitDistiller',
        logit=dict(weight=0.5, temperature=1.0),
        label_weight=0.5,
    ),
)
