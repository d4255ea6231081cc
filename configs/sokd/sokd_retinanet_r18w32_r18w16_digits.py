# SoKD around FitNet, RetinaNet of width 32 to RetinaNet of width 16, digit
# scenes.
# Plain twin: plain_retinanet_r18w16_digits.py; train the teacher first.
#   python tools/train.py configs/sokd/sokd_retinanet_r18w32_r18w16_digits.py
_base_ = ['../feature_imitation/fitnet_retinanet_r18w32_r18w16_digits.py']
custom_hooks = [dict(type='era_mm.PolicyHook', interval=25)]

model = dict(
    distiller=dict(
        _delete_=True,
        type='era_mm.SoKDDistiller',
        base=_base_.model.distiller,
        dam=dict(anchor='boxes'),  # CenterNet's supervision [inference]
        # A fifth of this run is 450 iterations: at DADA's 3e-4 nothing would
        # have moved by more than 0.14. [ours]
        optimizer=dict(type='Adam', lr=0.01, betas=(0.5, 0.999)),
    ),
)
