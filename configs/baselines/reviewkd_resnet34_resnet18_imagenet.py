# ReviewKD, ResNet-34 (73.6 top-1) to ResNet-18, ImageNet-1k, 100 epochs.
# Plain twin: plain_resnet18_imagenet.py.
#   mim train era_mm reviewkd_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = 'logit_resnet34_resnet18_imagenet.py'
model = dict(
    distiller=dict(
        # Weight 1, which ramps over one epoch of 5005 iterations. [mdistiller]
        _delete_=True,
        type='era_mm.ReviewKDDistiller',
        source=[
            'backbone.layer1',
            'backbone.layer2',
            'backbone.layer3',
            'backbone.layer4',
            'neck',
        ],
        schedules=dict(loss_reviewkd=dict(ramp=5005)),
    )
)
