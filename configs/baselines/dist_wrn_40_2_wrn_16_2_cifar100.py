# DIST, WRN-40-2 to WRN-16-2, CIFAR-100, 240 epochs.
# Plain twin: plain_wrn_16_2_cifar100.py; train the teacher first.
#   mim train era_mm plain_wrn_40_2_cifar100.py
#   mim train era_mm dist_wrn_40_2_wrn_16_2_cifar100.py
_base_ = 'logit_wrn_40_2_wrn_16_2_cifar100.py'
model = dict(
    distiller=dict(
        # 2 at temperature 4 beside 1 on the labels. [official code]
        _delete_=True,
        type='era_mm.LogitDistiller',
        logit=dict(kind='dist'),
    )
)
