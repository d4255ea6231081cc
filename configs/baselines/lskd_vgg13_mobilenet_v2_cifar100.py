# KD of standardised logits, VGG13 to MobileNetV2, CIFAR-100, 240 epochs.
# Plain twin: plain_mobilenet_v2_cifar100.py; train the teacher first.
#   mim train era_mm plain_vgg13_cifar100.py
#   mim train era_mm lskd_vgg13_mobilenet_v2_cifar100.py
_base_ = 'logit_vgg13_mobilenet_v2_cifar100.py'
model = dict(
    # 9 at temperature 3 for this pair, beside 0.1 on the labels. [official
    # code]
    distiller=dict(logit=dict(standardise=True, temperature=3.0))
)
