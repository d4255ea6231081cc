# DIST, VGG13 to VGG8, CIFAR-100, 240 epochs.
# Plain twin: plain_vgg8_cifar100.py; train the teacher first.
#   mim train era_mm plain_vgg13_cifar100.py
#   mim train era_mm dist_vgg13_vgg8_cifar100.py
_base_ = 'logit_vgg13_vgg8_cifar100.py'
model = dict(
    distiller=dict(
        # 2 at temperature 4 beside 1 on the labels. [official code]
        _delete_=True,
        type='era_mm.LogitDistiller',
        logit=dict(kind='dist'),
    )
)
