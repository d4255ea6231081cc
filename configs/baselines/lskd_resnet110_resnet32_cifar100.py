# KD of standardised logits, ResNet-110 to ResNet-32, CIFAR-100, 240 epochs.
# Plain twin: plain_resnet32_cifar100.py; train the teacher first.
#   mim train era_mm plain_resnet110_cifar100.py
#   mim train era_mm lskd_resnet110_resnet32_cifar100.py
_base_ = 'logit_resnet110_resnet32_cifar100.py'
model = dict(
    # 9 at temperature 2 beside 0.1 on the labels. [official code]
    distiller=dict(logit=dict(standardise=True)),
)
