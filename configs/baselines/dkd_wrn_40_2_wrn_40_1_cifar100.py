# DKD, WRN-40-2 to WRN-40-1, CIFAR-100, 240 epochs.
# Plain twin: plain_wrn_40_1_cifar100.py; train the teacher first.
#   mim train era_mm plain_wrn_40_2_cifar100.py
#   mim train era_mm dkd_wrn_40_2_wrn_40_1_cifar100.py
_base_ = 'logit_wrn_40_2_wrn_40_1_cifar100.py'
model = dict(
    distiller=dict(
        # beta goes by pair, and the loss ramps over 20 epochs of 782
        # iterations. [official code]
        _delete_=True,
        type='era_mm.LogitDistiller',
        logit=dict(kind='dkd', beta=6.0),
        schedules=dict(loss_logit_score=dict(ramp=20 * 782)),
    )
)
