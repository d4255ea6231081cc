"""Wide ResNets for 32 x 32 images."""

import math
from typing import ClassVar

from mmengine.model import BaseModule
from torch import Tensor, nn

from ...registry import MODELS
from .initial_weights import he_init


class PreActBlock(nn.Module):
    """Norm, ReLU, convolution, twice; added to the input.

    Where the width changes, the shortcut is a 1x1 convolution of the
    normalised and activated input.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(
            in_channels, out_channels, 3, stride, padding=1, bias=False
        )
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(
            out_channels, out_channels, 3, padding=1, bias=False
        )
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            if in_channels != out_channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(x))
        identity = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.norm2(out)))
        return identity + out


@MODELS.register_module()
class CIFARWideResNet(BaseModule):
    """WRN-depth-width: three stages of n pre-activation blocks, 6n + 4.

        conv3x3 (16) - [n blocks, 16k] - [n, 32k, /2] - [n, 64k, /2] - BN-ReLU

    without dropout.

    Source: Zagoruyko and Komodakis, arXiv 1605.07146.

    Args:
        depth: 6n + 4, with n at least 1: 16 and 40 in the field's pairs.
        width: k, a whole number in the field; widths are rounded down.
        init_cfg: As in mmengine. None: He's.

    Shape:
        - input: ``(N, 3, H, W)``
        - output: one of ``(N, 64 * width, H / 4, W / 4)``

    Raises:
        ValueError: Another depth.
    """

    RANGES: ClassVar[dict] = {'width': (1 / 16, math.inf)}

    def __init__(
        self, depth: int, width: float = 1, init_cfg: dict | None = None
    ) -> None:
        super().__init__(init_cfg or he_init())
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(
                '`depth` must be 6n + 4 (10, 16, 22, 28, 34, 40, ...), but '
                f'got {depth}.'
            )
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        channels = 16
        for stage in range(3):
            blocks = []
            for index in range((depth - 4) // 6):
                stride = 2 if stage > 0 and index == 0 else 1
                out_channels = int(16 * width * 2**stage)
                blocks.append(PreActBlock(channels, out_channels, stride))
                channels = out_channels
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The last map."""
        x = self.conv1(x)
        for stage in self.stages:
            x = stage(x)
        return (self.relu(self.norm(x)),)
