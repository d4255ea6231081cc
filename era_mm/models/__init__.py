"""Models that the hosts lack and that fair comparisons need."""

from .backbones import (
    CIFARVGG,
    CIFARMobileNetV2,
    CIFARResNet,
    CIFARShuffleNetV1,
    CIFARShuffleNetV2,
    CIFARWideResNet,
    CSWinTransformer,
    MobileNetV1,
)

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
