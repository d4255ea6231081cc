# IE-KD, RetinaNet of width 32 to GFL of width 16, digit scenes.
# Plain twin: plain_gfl_r18w16_digits.py; train the teacher first.
#   python tools/train.py \
#       configs/ie_kd/ie_kd_retinanet_r18w32_gfl_r18w16_digits.py
_base_ = '../feature_imitation/fitnet_retinanet_r18w32_gfl_r18w16_digits.py'
model = dict(
    distiller=dict(
        _delete_=True, type='era_mm.IEKDDistiller', pretrain_iters=300
    )
)
# As with the RetinaNet student: two epochs come before the twin's schedule.
train_cfg = dict(max_epochs=17, val_interval=17)
param_scheduler = [
    dict(_base_.param_scheduler[0], begin=300, end=750),
    dict(_base_.param_scheduler[1], begin=2, end=17),
]
