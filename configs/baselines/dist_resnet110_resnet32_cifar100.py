# DIST, ResNet-110 to ResNet-32, CIFAR-100, 240 epochs.
# Plain twin: plain_resnet32_cifar100.py; train the teacher first.
#   mim train era_mm plain_resnet110_cifar100.py
#   mim train era_mm dist_resnet110_resnet32_cifar100.py
_base_ = 'logit_resnet110_resnet32_cifar100.py'
model = dict(
    distiller=dict(
        # 2 at temperature 4 beside 1 on the labels. [official code]
        _delete_=True,
        type='era_mm.LogitDistiller',
        logit=dict(kind='dist'),
    )
)
