# Residual KD, RetinaNet of width 32 to RetinaNet of width 16 with an assistant
# of two convolutions per level on its pyramid, digit scenes, end-to-end.
# Plain twin: plain_retinanet_r18w16_digits.py, the student alone: the
# assistant is paid for beside it. Train the teacher,
# plain_retinanet_r18w32_digits.py, first.
#   python tools/train.py \
#       configs/residual_kd/residual_kd_retinanet_r18w32_r18w16_digits.py
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
    # Chosen on val, one seed (docs/model_zoo.md). The head works in the
    # teacher's features, so it begins as the teacher's.
    inherit=['bbox_head'],
    distiller=dict(
        type='era_mm.ResidualKDDistiller',
        assistant=dict(form='feature', mid_channels=32),
        student_weight=5.0,
        assistant_weight=20.0,
    ),
)
