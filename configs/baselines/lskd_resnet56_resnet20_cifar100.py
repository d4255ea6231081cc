# KD of standardised logits, ResNet-56 to ResNet-20, CIFAR-100, 240 epochs.
# Plain twin: plain_resnet20_cifar100.py; train the teacher first.
#   mim train era_mm plain_resnet56_cifar100.py
#   mim train era_mm lskd_resnet56_resnet20_cifar100.py
_base_ = 'logit_resnet56_resnet20_cifar100.py'
model = dict(
    # 9 at temperature 2 beside 0.1 on the labels. [official code]
    distiller=dict(logit=dict(standardise=True)),
)
