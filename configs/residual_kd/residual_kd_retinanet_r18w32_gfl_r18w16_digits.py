# Residual KD, RetinaNet of width 32 to GFL of width 16, digit scenes.
# Plain twin: plain_gfl_r18w16_digits.py; train the teacher first.
#   python tools/train.py \
#       configs/residual_kd/residual_kd_retinanet_r18w32_gfl_r18w16_digits.py
_base_ = '../feature_imitation/fitnet_retinanet_r18w32_gfl_r18w16_digits.py'
model = dict(
    distiller=dict(
        # As with the RetinaNet student, but for the head, which is no
        # teacher's here: it begins as GFL's own.
        _delete_=True,
        type='era_mm.ResidualKDDistiller',
        assistant=dict(form='feature', mid_channels=32),
        student_weight=5.0,
        assistant_weight=20.0,
    )
)
