# A classifier on CIFAR-100 and the schedule that the field trains it with: 240
# epochs on one GPU, batch 64, lr 0.05 times 0.1 at 150, 180 and 210 (0.01 for
# MobileNet and ShuffleNet students), weight decay on everything. What uses it
# adds backbone and in_channels.
_base_ = [
    'mmpretrain::_base_/datasets/cifar100_bs16.py',
    'mmpretrain::_base_/default_runtime.py',
]
model = dict(
    type='ImageClassifier',
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=100,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
train_dataloader = dict(batch_size=64)
val_dataloader = dict(batch_size=64)
test_dataloader = dict(batch_size=64)

train_cfg = dict(by_epoch=True, max_epochs=240, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=5e-4)
)
param_scheduler = dict(
    type='MultiStepLR', by_epoch=True, milestones=[150, 180, 210], gamma=0.1
)
default_hooks = dict(
    checkpoint=dict(save_best='accuracy/top1', max_keep_ckpts=3)
)
randomness = dict(seed=0)
