# ERA, ResNet-34 (73.6 top-1) to ResNet-18, ImageNet-1k, 100 epochs.
# Plain twin: plain_resnet18_imagenet.py.
#   mim train era_mm configs/era/era_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = ['../plain/plain_resnet18_imagenet.py', '../_base_/era_runtime.py']

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmpretrain::resnet/resnet34_8xb32_in1k.py',
        checkpoint='https://mmassets.onedl.ai/mmclassification/v0/resnet/'
        'resnet34_8xb32_in1k_20210831-f257d4e6.pth',
    ),
    # KL with weight 2 and temperature 1: the released script's.
    distiller=dict(type='era_mm.ERADistiller'),
)
