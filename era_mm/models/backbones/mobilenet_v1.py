"""MobileNet, which mmpretrain and mmdet lack."""

import math
from typing import ClassVar

from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...registry import MODELS
from .initial_weights import he_init


@MODELS.register_module()
class MobileNetV1(BaseModule):
    """A 3x3 convolution and 13 depthwise separable ones.

    Every convolution is followed by a norm and a ReLU.

    Source: Howard et al., arXiv 1704.04861, table 1; plain ReLUs as in ERA's
    [official code].

    Args:
        init_cfg: As in mmengine. None: He's.
        widen_factor: The paper's width multiplier; widths are rounded down.

    Shape:
        - input: ``(N, 3, H, W)``
        - output: one of ``(N, 1024 * widen_factor, H / 32, W / 32)``
    """

    RANGES: ClassVar[dict] = {'widen_factor': (1 / 32, math.inf)}

    # Channels and stride of the separable convolutions.
    LAYERS = (
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    )

    def __init__(
        self, init_cfg: dict | None = None, widen_factor: float = 1.0
    ) -> None:
        super().__init__(init_cfg or he_init())
        norm_cfg = dict(type='BN')
        channels = int(32 * widen_factor)
        layers: list[nn.Module] = [
            ConvModule(3, channels, 3, stride=2, padding=1, norm_cfg=norm_cfg)
        ]
        for width, stride in self.LAYERS:
            out_channels = int(width * widen_factor)
            layers.append(
                DepthwiseSeparableConvModule(
                    channels,
                    out_channels,
                    3,
                    stride=stride,
                    padding=1,
                    norm_cfg=norm_cfg,
                )
            )
            channels = out_channels
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The last map."""
        return (self.layers(x),)
