# IE-KD, RetinaNet of width 32 to RetinaNet of width 16, digit scenes.
# Plain twin: plain_retinanet_r18w16_digits.py; train the teacher,
# plain_retinanet_r18w32_digits.py, first.
#   python tools/train.py configs/ie_kd/ie_kd_retinanet_r18w32_r18w16_digits.py
_base_ = '../plain/plain_retinanet_r18w16_digits.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/plain_retinanet_r18w32_digits.py',
        checkpoint='work_dirs/plain_retinanet_r18w32_digits/epoch_15.pth',
    ),
    # Two epochs of 1200 images in batches of 8.
    distiller=dict(type='era_mm.IEKDDistiller', pretrain_iters=300),
)

# The twin's schedule, later by those epochs.
train_cfg = dict(max_epochs=17, val_interval=17)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.01,
        by_epoch=False,
        begin=300,
        end=750,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=15,
        eta_min=0,
        by_epoch=True,
        begin=2,
        end=17,
        convert_to_iter_based=True,
    ),
]
