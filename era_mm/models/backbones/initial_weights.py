"""Initial weights that most of the backbones share."""

from typing import Any


def he_init() -> list[dict[str, Any]]:
    """Convolutions N(0, 2 / fan-out), biases 0, norms 1 and 0.

    Source: He et al., arXiv 1502.01852; what CRD's code gives ResNet, WRN,
    VGG and MobileNetV2, and ERA's [official code] MobileNetV1.
    """
    return [
        dict(type='Kaiming', layer='Conv2d'),
        dict(type='Constant', val=1, layer='_BatchNorm'),
    ]
