# ReviewKD, ResNet-50 (76.6 top-1) to MobileNetV1, ImageNet-1k, 100 epochs.
# Plain twin: plain_mobilenet_v1_imagenet.py.
#   mim train era_mm reviewkd_resnet50_mobilenet_v1_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = 'logit_resnet50_mobilenet_v1_imagenet.py'
model = dict(
    distiller=dict(
        # Weight 8 for this pair, which ramps over one epoch of 5005
        # iterations. [mdistiller]
        _delete_=True,
        type='era_mm.ReviewKDDistiller',
        # The last layers before each stride, of the student's 13.
        source=dict(
            student=[
                'backbone.layers.3',
                'backbone.layers.5',
                'backbone.layers.11',
                'backbone.layers.13',
                'neck',
            ],
            teacher=[
                'backbone.layer1',
                'backbone.layer2',
                'backbone.layer3',
                'backbone.layer4',
                'neck',
            ],
        ),
        loss_weight=8.0,
        schedules=dict(loss_reviewkd=dict(ramp=5005)),
    )
)
