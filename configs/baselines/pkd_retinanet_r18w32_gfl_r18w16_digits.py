# PKD, RetinaNet of width 32 to GFL of width 16, digit scenes.
# Plain twin: plain_gfl_r18w16_digits.py; train the teacher first.
#   python tools/train.py \
#       configs/baselines/pkd_retinanet_r18w32_gfl_r18w16_digits.py
_base_ = '../feature_imitation/fitnet_retinanet_r18w32_gfl_r18w16_digits.py'
model = dict(
    distiller=dict(
        _delete_=True,
        type='era_mm.PKDDistiller',
        # Published for RetinaNet; GFL is one-stage too.
        loss_weight=10.0,
    )
)
