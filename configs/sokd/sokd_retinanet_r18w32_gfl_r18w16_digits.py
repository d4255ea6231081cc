# SoKD around FitNet, RetinaNet of width 32 to GFL of width 16, digit scenes.
# Plain twin: plain_gfl_r18w16_digits.py; train the teacher first.
#   python tools/train.py \
#       configs/sokd/sokd_retinanet_r18w32_gfl_r18w16_digits.py
_base_ = '../feature_imitation/fitnet_retinanet_r18w32_gfl_r18w16_digits.py'
custom_hooks = [dict(type='era_mm.PolicyHook', interval=25)]
model = dict(
    distiller=dict(
        # As with the RetinaNet student.
        _delete_=True,
        type='era_mm.SoKDDistiller',
        base=_base_.model.distiller,
        dam=dict(anchor='boxes'),
        optimizer=dict(type='Adam', lr=0.01, betas=(0.5, 0.999)),
    )
)
