# KD of standardised logits, ResNet32x4 to ShuffleNetV2, CIFAR-100, 240
# epochs.
# Plain twin: plain_shufflenet_v2_cifar100.py; train the teacher first.
#   mim train era_mm plain_resnet32x4_cifar100.py
#   mim train era_mm lskd_resnet32x4_shufflenet_v2_cifar100.py
_base_ = 'logit_resnet32x4_shufflenet_v2_cifar100.py'
model = dict(
    # 9 at temperature 2 beside 0.1 on the labels. [official code]
    distiller=dict(logit=dict(standardise=True)),
)
