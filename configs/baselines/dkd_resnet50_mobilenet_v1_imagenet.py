# DKD, ResNet-50 (76.6 top-1) to MobileNetV1, ImageNet-1k, 100 epochs.
# Plain twin: plain_mobilenet_v1_imagenet.py.
#   mim train era_mm dkd_resnet50_mobilenet_v1_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = 'logit_resnet50_mobilenet_v1_imagenet.py'
model = dict(
    distiller=dict(
        # beta goes by pair, and the loss ramps over one epoch of 5005
        # iterations. [official code]
        _delete_=True,
        type='era_mm.LogitDistiller',
        logit=dict(kind='dkd', temperature=1.0, beta=2.0),
        schedules=dict(loss_logit_score=dict(ramp=5005)),
    )
)
