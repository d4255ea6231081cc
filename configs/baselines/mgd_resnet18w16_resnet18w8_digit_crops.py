# MGD, ResNet-18 of width 16 to width 8, digit crops, 40 epochs.
# Plain twin: plain_resnet18w8_digit_crops.py; train the teacher first.
#   python tools/train.py configs/plain/plain_resnet18w16_digit_crops.py
#   python tools/train.py \
#       configs/baselines/mgd_resnet18w16_resnet18w8_digit_crops.py
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
        type='era_mm.MGDDistiller',
        source=dict(
            student='backbone',
            teacher='backbone',
            resample=dict(student=dict(scales=[2.0])),
        ),
        # As released for classifiers.
        mask='channels',
        mask_ratio=0.15,
        loss_weight=7e-5,
    ),
)
