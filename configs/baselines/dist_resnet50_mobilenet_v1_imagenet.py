# DIST, ResNet-50 (76.6 top-1) to MobileNetV1, ImageNet-1k, 100 epochs.
# Plain twin: plain_mobilenet_v1_imagenet.py.
#   mim train era_mm dist_resnet50_mobilenet_v1_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = 'logit_resnet50_mobilenet_v1_imagenet.py'
model = dict(
    distiller=dict(
        # 2 at temperature 1 beside 1 on the labels. [official code]
        _delete_=True,
        type='era_mm.LogitDistiller',
        logit=dict(kind='dist', temperature=1.0),
    )
)
