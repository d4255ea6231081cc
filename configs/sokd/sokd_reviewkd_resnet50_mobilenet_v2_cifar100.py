# SoKD around ReviewKD, ResNet-50 (79.9 top-1) to MobileNetV2, CIFAR-100, 240
# epochs.
# Plain twin: plain_mobilenet_v2_cifar100.py. The paper's pair; its own weights
# and teacher are not known. [ours]
#   mim train era_mm sokd_reviewkd_resnet50_mobilenet_v2_cifar100.py
_base_ = '../plain/plain_mobilenet_v2_cifar100.py'
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='era_mm.PolicyHook', interval=500)]
model = dict(
    _delete_=True,
    type='era_mm.Distillation',
    student=_base_.model,
    teacher=dict(
        config='mmpretrain::resnet/resnet50_8xb16_cifar100.py',
        checkpoint='https://mmassets.onedl.ai/mmclassification/v0/resnet/'
        'resnet50_b16x8_cifar100_20210528-67b58a1b.pth',
    ),
    distiller=dict(
        type='era_mm.SoKDDistiller',
        base=dict(
            type='era_mm.ReviewKDDistiller',
            # Stages of one resolution, 16, 8 and 4 cells: phi and areas need
            # that. ReviewKD pairs first with first, and resizes. [ours]
            source=dict(
                student=[
                    'backbone.stages.1',
                    'backbone.stages.2',
                    'backbone.stages.4',
                ],
                teacher=[
                    'backbone.layer2',
                    'backbone.layer3',
                    'backbone.layer4',
                ],
            ),
            # CIFAR recipes of ReviewKD ramp over 20 epochs of 782 iterations.
            schedules={'loss_reviewkd': dict(ramp=20 * 782)},
        ),
    ),
)
