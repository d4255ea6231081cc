# Residual KD, ResNet-34 (73.6 top-1) to a pair cut out of ResNet-18,
# ImageNet-1k, 100 epochs, end-to-end.
# Plain twin: plain_resnet18_imagenet.py, the given model, which costs more
# than the pair: 0.883 of its FLOPs are the student's, 0.077 the assistant's,
# 0.967 all. The widths are what this prints:
#   python tools/split_model.py mmpretrain::resnet/resnet18_8xb32_in1k.py \
#       --source backbone --share 0.1 --divisor 4
# Train with
#   mim train era_mm \
#       configs/residual_kd/residual_kd_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = '../plain/plain_resnet18_imagenet.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmpretrain::resnet/resnet34_8xb32_in1k.py',
        checkpoint='https://mmassets.onedl.ai/mmclassification/v0/resnet/'
        'resnet34_8xb32_in1k_20210831-f257d4e6.pth',
    ),
    distiller=dict(
        type='era_mm.ResidualKDDistiller',
        source='backbone',
        student=dict(backbone=dict(base_channels=60, stem_channels=60)),
        assistant=dict(
            form='image',
            backbone=dict(base_channels=16, stem_channels=16),
        ),
    ),
)
