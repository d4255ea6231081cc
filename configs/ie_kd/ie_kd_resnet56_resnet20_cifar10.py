# IE-KD (IE-FT), ResNet-56 to ResNet-20, CIFAR-10, 30 + 160 epochs.
# Plain twin: plain_resnet20_cifar10.py; train the teacher first. Schedule and
# lengths are those of the released config, weights the paper's 50.
#   mim train era_mm configs/plain/plain_resnet56_cifar10.py
#   mim train era_mm configs/ie_kd/ie_kd_resnet56_resnet20_cifar10.py
_base_ = '../plain/plain_resnet20_cifar10.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='{{ fileDirname }}/../plain/plain_resnet56_cifar10.py',
        checkpoint='work_dirs/plain_resnet56_cifar10/epoch_160.pth',
    ),
    distiller=dict(
        type='era_mm.IEKDDistiller',
        source='backbone',  # the last stage, before pooling [official code]
        # 30 epochs of 391 iterations for the auto-encoder. [official code]
        pretrain_iters=30 * 391,
    ),
)
# The twin's schedule, later by those epochs; milestones count from `begin`.
train_cfg = dict(max_epochs=190)
param_scheduler = dict(begin=30)
