# DIST, ResNet-50 (79.9 top-1) to MobileNetV2, CIFAR-100, 240 epochs.
# Plain twin: plain_mobilenet_v2_cifar100.py.
#   mim train era_mm dist_resnet50_mobilenet_v2_cifar100.py
_base_ = 'logit_resnet50_mobilenet_v2_cifar100.py'
model = dict(
    distiller=dict(
        # 2 at temperature 4 beside 1 on the labels. [official code]
        _delete_=True,
        type='era_mm.LogitDistiller',
        logit=dict(kind='dist'),
    )
)
