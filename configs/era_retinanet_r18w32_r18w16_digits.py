# ERA, RetinaNet of width 32 to RetinaNet of width 16, digit scenes.
# Plain twin: plain_retinanet_r18w16_digits.py; train the teacher first.
#   python tools/train.py configs/era_retinanet_r18w32_r18w16_digits.py
_base_ = ['plain_retinanet_r18w16_digits.py', '_base_/era_runtime.py']

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/plain_retinanet_r18w32_digits.py',
        checkpoint='work_dirs/plain_retinanet_r18w32_digits/epoch_15.pth',
    ),
    # Chosen on val (results/digits_tuning.jsonl). TWI judges one estimate per
    # iteration, which takes less time than all five, and begins when the
    # aligned feature is near the teacher's: before that its gradient is many
    # times the student's own. `logit` is what reaches the student's own head.
    distiller=dict(
        type='era_mm.ERADistiller',
        loss=dict(align_weight=1.0),
        logit=dict(kind='binary', weight=1.0),
        twi_steps='sampled',
        schedules={'loss_era_twi_*': dict(start=300, ramp=450)},
    ),
)
