# KD of standardised logits, ResNet-50 (79.9 top-1) to MobileNetV2, CIFAR-100,
# 240 epochs.
# Plain twin: plain_mobilenet_v2_cifar100.py.
#   mim train era_mm lskd_resnet50_mobilenet_v2_cifar100.py
_base_ = 'logit_resnet50_mobilenet_v2_cifar100.py'
model = dict(
    # 1 at temperature 3 for this pair, beside 0.1 on the labels. [official
    # code]
    distiller=dict(logit=dict(standardise=True, weight=1.0, temperature=3.0))
)
