# AT, ResNet-34 (73.6 top-1) to ResNet-18, ImageNet-1k, 100 epochs.
# Plain twin: plain_resnet18_imagenet.py.
#   mim train era_mm at_resnet34_resnet18_imagenet.py \
#       --launcher pytorch --gpus 8
_base_ = 'logit_resnet34_resnet18_imagenet.py'
model = dict(
    distiller=dict(
        # 1000 on each of the four stages. [official code]
        _delete_=True,
        type='era_mm.ATDistiller',
        source=[
            'backbone.layer1',
            'backbone.layer2',
            'backbone.layer3',
            'backbone.layer4',
        ],
    )
)
