"""ShuffleNets for 32 x 32 images.

Both begin with a 1x1 convolution of 24 channels without stride and have no
pooling before the first stage. Both keep PyTorch's initial weights, as in
CRD's code.
"""

import math
from typing import ClassVar

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmpretrain.models.backbones import ShuffleNetV2
from mmpretrain.models.utils import channel_shuffle
from torch import Tensor, nn
from torch.nn.functional import relu

from ...registry import MODELS


class ShuffleUnit(nn.Module):
    """1x1 (grouped), shuffle, 3x3 depthwise, 1x1 (grouped); a shortcut.

    With ``stride=2`` the averaged input is joined to the output's channels,
    else the input is added. Other than mmpretrain's unit it has a ReLU after
    the depthwise convolution, and its bottleneck is a quarter of the channels
    that the unit itself adds, rounded down to a multiple of the groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        groups: int,
        first_groups: int,
    ) -> None:
        super().__init__()
        own = out_channels - in_channels if stride == 2 else out_channels
        mid = own // 4 // groups * groups
        self.stride = stride
        self.first_groups = first_groups
        self.conv1 = nn.Conv2d(
            in_channels, mid, 1, groups=first_groups, bias=False
        )
        self.norm1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(
            mid, mid, 3, stride, padding=1, groups=mid, bias=False
        )
        self.norm2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, own, 1, groups=groups, bias=False)
        self.norm3 = nn.BatchNorm2d(own)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.norm1(self.conv1(x)))
        out = channel_shuffle(out, self.first_groups)
        out = relu(self.norm2(self.conv2(out)))
        out = self.norm3(self.conv3(out))
        if self.stride == 2:
            return relu(torch.cat([out, self.pool(x)], dim=1))
        return relu(out + x)


@MODELS.register_module()
class CIFARShuffleNetV1(BaseModule):
    """ShuffleNet with 3 groups and stages of 240, 480 and 960 channels.

    Source: Zhang et al., arXiv 1707.01083, in the form of CRD, arXiv
    1910.10699.

    Args:
        init_cfg: As in mmengine. None: PyTorch's initial weights.
        widen_factor: Factor of all widths, which are rounded down to
            multiples of the groups. [ours]

    Shape:
        - input: ``(N, 3, H, W)``
        - output: one of ``(N, 960 * widen_factor, H / 8, W / 8)``
    """

    RANGES: ClassVar[dict] = {'widen_factor': (1 / 8, math.inf)}
    GROUPS = 3

    def __init__(
        self, init_cfg: dict | None = None, widen_factor: float = 1.0
    ) -> None:
        super().__init__(init_cfg)
        channels, *widths = (
            int(width * widen_factor) // self.GROUPS * self.GROUPS
            for width in (24, 240, 480, 960)
        )
        self.conv1 = nn.Conv2d(3, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.stages = nn.ModuleList()
        first_groups = 1
        for out_channels, num_units in zip(widths, (4, 8, 4), strict=True):
            units = []
            for index in range(num_units):
                units.append(
                    ShuffleUnit(
                        channels,
                        out_channels,
                        stride=2 if index == 0 else 1,
                        groups=self.GROUPS,
                        first_groups=first_groups,
                    )
                )
                channels, first_groups = out_channels, self.GROUPS
            self.stages.append(nn.Sequential(*units))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The last map."""
        x = relu(self.norm1(self.conv1(x)))
        for stage in self.stages:
            x = stage(x)
        return (x,)


@MODELS.register_module()
class CIFARShuffleNetV2(ShuffleNetV2):
    """ShuffleNet V2 1x of mmpretrain behind the stem for small images.

    Source: Ma et al., arXiv 1807.11164, with the stem of CRD, arXiv
    1910.10699.

    Args:
        init_cfg: As in mmengine. None: PyTorch's initial weights.
        widen_factor: Factor of all widths, which are rounded down, to even
            numbers in the three stages. Other than mmpretrain's, it also
            applies to the first and the last convolution. [ours]

    Shape:
        - input: ``(N, 3, H, W)``
        - output: one of ``(N, 1024 * widen_factor, H / 8, W / 8)``
    """

    RANGES: ClassVar[dict] = {'widen_factor': (1 / 24, math.inf)}

    def __init__(
        self, init_cfg: dict | None = None, widen_factor: float = 1.0
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        norm_cfg = dict(type='BN')
        first = int(24 * widen_factor)
        # At 1 the host's layers stay: others would draw other weights.
        if widen_factor != 1:
            self.in_channels = first
            last = int(1024 * widen_factor)
            self.layers = nn.ModuleList(
                self._make_layer(int(width * widen_factor) // 2 * 2, number)
                for width, number in zip(
                    (116, 232, 464), self.stage_blocks, strict=True
                )
            )
            self.layers.append(
                ConvModule(self.in_channels, last, 1, norm_cfg=norm_cfg)
            )
        self.conv1 = ConvModule(3, first, 1, norm_cfg=norm_cfg)
        self.maxpool = nn.Identity()

    def init_weights(self) -> None:
        """As ``init_cfg`` says, else PyTorch's."""
        BaseModule.init_weights(self)
        if self.init_cfg is None:
            for module in self.modules():
                if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                    module.reset_parameters()
