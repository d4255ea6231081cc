"""Backbones of the standard distillation benchmarks.

Those on 32 x 32 images are the definitions that CRD (arXiv 1910.10699, code
HobbitLong/RepDistiller) made the field's standard on CIFAR-100. Its ResNet-50
is mmpretrain's own ``ResNet_CIFAR``. Each outputs its last map, which
``GlobalAveragePooling`` pools to the input of the classifier. There are also
MobileNet and CSWin, which the hosts lack.
"""

from .cifar_mobilenet_v2 import CIFARMobileNetV2
from .cifar_resnet import CIFARResNet
from .cifar_shufflenet import CIFARShuffleNetV1, CIFARShuffleNetV2
from .cifar_vgg import CIFARVGG
from .cifar_wide_resnet import CIFARWideResNet
from .cswin import CSWinTransformer
from .mobilenet_v1 import MobileNetV1

__all__ = [
    'CIFARVGG',
    'CIFARMobileNetV2',
    'CIFARResNet',
    'CIFARShuffleNetV1',
    'CIFARShuffleNetV2',
    'CIFARWideResNet',
    'CSWinTransformer',
    'MobileNetV1',
]
