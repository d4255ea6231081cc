# MGD, ResNet-34 (73.6 top-1) to ResNet-18, ImageNet-1k, 100 epochs.
# Plain twin: plain_resnet18_imagenet.py.
#   mim train era_mm mgd_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = 'logit_resnet34_resnet18_imagenet.py'
model = dict(
    distiller=dict(
        # The paper's for classifiers, on the last map.
        _delete_=True,
        type='era_mm.MGDDistiller',
        source='backbone',
        mask='channels',
        mask_ratio=0.15,
        loss_weight=7e-5,
    )
)
