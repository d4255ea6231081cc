# PKD, RetinaNet of width 32 to width 16, digit scenes.
# Plain twin: plain_retinanet_r18w16_digits.py; train the teacher first.
#   python tools/train.py \
#       configs/baselines/pkd_retinanet_r18w32_r18w16_digits.py
_base_ = ['../plain/plain_retinanet_r18w16_digits.py']
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/plain_retinanet_r18w32_digits.py',
        checkpoint='work_dirs/plain_retinanet_r18w32_digits/epoch_15.pth',
    ),
    # Published for RetinaNet.
    distiller=dict(type='era_mm.PKDDistiller', loss_weight=10.0),
)
