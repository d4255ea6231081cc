# FitNet, RetinaNet of width 32 to GFL of width 16, digit scenes: what the pair
# with unlike heads has in common.
# Plain twin: plain_gfl_r18w16_digits.py; train the teacher,
# plain_retinanet_r18w32_digits.py, first.
#   python tools/train.py \
#       configs/feature_imitation/fitnet_retinanet_r18w32_gfl_r18w16_digits.py
_base_ = '../plain/plain_gfl_r18w16_digits.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/plain_retinanet_r18w32_digits.py',
        checkpoint='work_dirs/plain_retinanet_r18w32_digits/epoch_15.pth',
    ),
    # As with the RetinaNet student.
    distiller=dict(type='era_mm.FeatureImitationDistiller', loss_weight=3.0),
)
