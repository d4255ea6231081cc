# ERA, ResNet-50 (76.6 top-1) to MobileNetV1, ImageNet-1k, 100 epochs.
# Plain twin: plain_mobilenet_v1_imagenet.py.
#   mim train era_mm configs/era/era_resnet50_mobilenet_v1_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = [
    '../plain/plain_mobilenet_v1_imagenet.py',
    '../_base_/era_runtime.py',
]

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmpretrain::resnet/resnet50_8xb32_in1k.py',
        checkpoint='https://mmassets.onedl.ai/mmclassification/v0/resnet/'
        'resnet50_8xb32_in1k_20210831-ea4938fc.pth',
    ),
    # KL with weight 2 and temperature 1: the released script's.
    distiller=dict(type='era_mm.ERADistiller'),
)
