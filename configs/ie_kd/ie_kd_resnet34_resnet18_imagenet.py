# IE-KD, ResNet-34 (73.6 top-1) to ResNet-18, ImageNet-1k, 100 epochs.
# Plain twin: plain_resnet18_imagenet.py.
#   mim train era_mm configs/ie_kd/ie_kd_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = ['../plain/plain_resnet18_imagenet.py']
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
        type='era_mm.IEKDDistiller',
        source='backbone',  # the last stage, before pooling [official code]
        # Two epochs of 5005 iterations: about as many iterations as the 30
        # epochs on CIFAR of the official code. [ours]
        pretrain_iters=10010,
    ),
)

# The twin's schedule, later by those epochs; milestones count from `begin`.
train_cfg = dict(max_epochs=102)
param_scheduler = dict(begin=2)
