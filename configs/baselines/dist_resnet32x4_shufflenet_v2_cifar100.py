# DIST, ResNet32x4 to ShuffleNetV2, CIFAR-100, 240 epochs.
# Plain twin: plain_shufflenet_v2_cifar100.py; train the teacher first.
#   mim train era_mm plain_resnet32x4_cifar100.py
#   mim train era_mm dist_resnet32x4_shufflenet_v2_cifar100.py
_base_ = 'logit_resnet32x4_shufflenet_v2_cifar100.py'
model = dict(
    distiller=dict(
        # 2 at temperature 4 beside 1 on the labels. [official code]
        _delete_=True,
        type='era_mm.LogitDistiller',
        logit=dict(kind='dist'),
    )
)
