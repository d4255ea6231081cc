# CSWin-T alone, ImageNet-1k, 300 epochs with mixup and cutmix:
#   mim train era_mm configs/plain/plain_cswin_t_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['era_mm'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    # The published drop-path rate; data and schedule are mmpretrain's for
    # Swin. [ours]
    backbone=dict(
        type='era_mm.CSWinTransformer', arch='tiny', drop_path_rate=0.2
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=512,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
        loss=dict(
            type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'
        ),
    ),
    train_cfg=dict(
        augments=[
            dict(type='Mixup', alpha=0.8),
            dict(type='CutMix', alpha=1.0),
        ]
    ),
)
# 8 GPUs with 128 images each.
train_dataloader = dict(batch_size=128)
optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
default_hooks = dict(
    checkpoint=dict(save_best='accuracy/top1', max_keep_ckpts=3)
)
randomness = dict(seed=0)
