# SoKD around ReviewKD, ResNet-34 (73.6 top-1) to ResNet-18, ImageNet-1k.
# Plain twin: plain_resnet18_imagenet.py. The paper's pair; its own weights are
# not known. [ours]
#   mim train era_mm sokd_reviewkd_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = 'sokd_resnet34_resnet18_imagenet.py'
model = dict(
    distiller=dict(
        base=dict(
            # Weight 1 is ReviewKD's released one. Without its pooled level,
            # on which there are no areas. [ours]
            _delete_=True,
            type='era_mm.ReviewKDDistiller',
            source=[
                'backbone.layer1',
                'backbone.layer2',
                'backbone.layer3',
                'backbone.layer4',
            ],
        )
    )
)
