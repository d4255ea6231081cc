# Residual KD at equal FLOPs, ResNet-18 of width 16 to a pair cut out of
# ResNet-18 of width 8, digit crops, 40 epochs, end-to-end.
# Plain twin: plain_resnet18w8_digit_crops.py, the given model, which costs
# more than the pair: 0.778 of its FLOPs are the student's, 0.168 the
# assistant's, 0.947 all. The widths are what this prints:
#   python tools/split_model.py plain_resnet18w8_digit_crops --share 0.2 \
#       --divisor 1 --input-size 32
# Train the teacher, plain_resnet18w16_digit_crops.py, first; then
#   python tools/train.py \
#       configs/residual_kd/residual_kd_resnet18w16_resnet18w8_digit_crops.py
_base_ = ['../plain/plain_resnet18w8_digit_crops.py']
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/plain_resnet18w16_digit_crops.py',
        checkpoint='work_dirs/plain_resnet18w16_digit_crops/epoch_40.pth',
    ),
    distiller=dict(
        type='era_mm.ResidualKDDistiller',
        # Pooled: the teacher's maps have twice the resolution. [ours]
        source='neck',
        student=dict(backbone=dict(base_channels=7, stem_channels=7)),
        assistant=dict(
            form='image',
            backbone=dict(base_channels=3, stem_channels=3),
        ),
    ),
)
