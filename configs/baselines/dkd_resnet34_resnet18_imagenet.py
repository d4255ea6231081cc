# DKD, ResNet-34 (73.6 top-1) to ResNet-18, ImageNet-1k, 100 epochs.
# Plain twin: plain_resnet18_imagenet.py.
#   mim train era_mm dkd_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = 'logit_resnet34_resnet18_imagenet.py'
model = dict(
    distiller=dict(
        # beta goes by pair, and the loss ramps over one epoch of 5005
        # iterations. [official code]
        _delete_=True,
        type='era_mm.LogitDistiller',
        logit=dict(kind='dkd', temperature=1.0, beta=0.5),
        schedules=dict(loss_logit_score=dict(ramp=5005)),
    )
)
