# KD with mmrazor's weight, ResNet-34 (73.6 top-1) to ResNet-18, ImageNet-1k,
# 100 epochs.
# Plain twin: plain_resnet18_imagenet.py.
#   mim train era_mm logit_mmrazor_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = 'logit_resnet34_resnet18_imagenet.py'
model = dict(
    # 3, as its checkpoint is named, at temperature 1 beside 1 on the labels.
    # [mmrazor]
    distiller=dict(logit=dict(weight=3.0), label_weight=1.0)
)
