# ImageNet-1k with the schedule of ERA's released script: 100 epochs, 8 GPUs x
# 32 images, lr 0.1 times 0.1 every 30 epochs, Nesterov, weight decay 1e-4 but
# not on biases, norms and other parameters of one dimension (slopes of PReLU).
# What uses it adds the model.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    'mmpretrain::_base_/schedules/imagenet_bs256.py',
    'mmpretrain::_base_/default_runtime.py',
]
optim_wrapper = dict(
    optimizer=dict(nesterov=True),
    paramwise_cfg=dict(
        norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0
    ),
)
default_hooks = dict(
    checkpoint=dict(save_best='accuracy/top1', max_keep_ckpts=3)
)
randomness = dict(seed=0)
