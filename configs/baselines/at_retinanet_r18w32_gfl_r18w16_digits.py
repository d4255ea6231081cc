# AT, RetinaNet of width 32 to GFL of width 16, digit scenes.
# Plain twin: plain_gfl_r18w16_digits.py; train the teacher first.
#   python tools/train.py \
#       configs/baselines/at_retinanet_r18w32_gfl_r18w16_digits.py
_base_ = '../feature_imitation/fitnet_retinanet_r18w32_gfl_r18w16_digits.py'
model = dict(
    # The same weight on each level, whatever its size. [ours]
    distiller=dict(
        _delete_=True,
        type='era_mm.ATDistiller',
        num_positions=256,
        loss_weight=30.0,
    )
)
