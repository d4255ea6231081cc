# Residual KD at the end of every stage, ResNet-56 to a pair cut out of
# ResNet-20, CIFAR-100, 240 epochs, end-to-end.
# Plain twin: plain_resnet20_cifar100.py, the given model, which costs more
# than the pair: 0.880 of its FLOPs are the student's, 0.068 the assistant's,
# 0.954 all. The paper's pairs are not known; the schedule is the field's.
# The widths are what this prints:
#   python tools/split_model.py plain_resnet20_cifar100 --source backbone \
#       --input-size 32
# Train the teacher first; then the pair:
#   mim train era_mm configs/plain/plain_resnet56_cifar100.py
#   mim train era_mm \
#       configs/residual_kd/residual_kd_resnet56_resnet20_cifar100.py
_base_ = '../plain/plain_resnet20_cifar100.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/plain_resnet56_cifar100.py',
        checkpoint='work_dirs/plain_resnet56_cifar100/epoch_240.pth',
    ),
    distiller=dict(
        type='era_mm.ResidualKDDistiller',
        source='backbone',
        student=dict(backbone=dict(base_channels=15, stem_channels=15)),
        assistant=dict(
            form='image',
            backbone=dict(base_channels=4, stem_channels=4),
        ),
        cuts=['layer1', 'layer2'],
    ),
)
