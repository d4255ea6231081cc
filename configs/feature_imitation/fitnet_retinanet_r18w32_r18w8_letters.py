# FitNet, RetinaNet of width 32 to RetinaNet of width 8, letter scenes.
# Plain twin: plain_retinanet_r18w8_letters.py; train the teacher first.
#   python tools/train.py \
#       configs/feature_imitation/fitnet_retinanet_r18w32_r18w8_letters.py
_base_ = ['../plain/plain_retinanet_r18w8_letters.py']
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/plain_retinanet_r18w32_letters.py',
        checkpoint='work_dirs/plain_retinanet_r18w32_letters/epoch_15.pth',
    ),
    # As on the digit scenes.
    distiller=dict(type='era_mm.FeatureImitationDistiller', loss_weight=3.0),
)
