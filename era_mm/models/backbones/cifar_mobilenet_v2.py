"""MobileNetV2 for 32 x 32 images."""

from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...registry import MODELS
from .initial_weights import he_init

_NORM = dict(type='BN')


class InvertedResidual(nn.Module):
    """1x1 to ``expansion`` times the width, 3x3 depthwise, 1x1 without ReLU.

    Added to the input where shapes agree. Other than mmpretrain's it has the
    first 1x1 convolution also at expansion 1, and plain ReLUs.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        mid = in_channels * expansion
        self.is_residual = stride == 1 and in_channels == out_channels
        self.layers = nn.Sequential(
            ConvModule(in_channels, mid, 1, norm_cfg=_NORM),
            ConvModule(
                mid, mid, 3, stride, padding=1, groups=mid, norm_cfg=_NORM
            ),
            ConvModule(mid, out_channels, 1, norm_cfg=_NORM, act_cfg=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return x + out if self.is_residual else out


@MODELS.register_module()
class CIFARMobileNetV2(BaseModule):
    """MobileNetV2, expansion 6; half as wide by default.

    Widths are ``int(width * c)``, not rounded to multiples of 8, and the last
    1x1 convolution keeps 1280 channels at widths up to 1.

    Source: Sandler et al., arXiv 1801.04381, in the form of CRD, arXiv
    1910.10699, which calls it MobileNetV2 (``mobile_half``).

    Args:
        width: Factor of the widths.
        init_cfg: As in mmengine. None: He's.

    Shape:
        - input: ``(N, 3, H, W)``
        - output: one of ``(N, 1280 * max(width, 1), H / 16, W / 16)``
    """

    # Expansion, channels, blocks, stride of the first block.
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(
        self, width: float = 0.5, init_cfg: dict | None = None
    ) -> None:
        super().__init__(init_cfg or he_init())
        channels = int(32 * width)
        self.conv1 = ConvModule(
            3, channels, 3, stride=2, padding=1, norm_cfg=_NORM
        )
        self.stages = nn.ModuleList()
        for expansion, base, num_blocks, first_stride in self.STAGES:
            blocks = []
            for index in range(num_blocks):
                stride = first_stride if index == 0 else 1
                out_channels = int(base * width)
                blocks.append(
                    InvertedResidual(channels, out_channels, stride, expansion)
                )
                channels = out_channels
            self.stages.append(nn.Sequential(*blocks))
        self.conv2 = ConvModule(
            channels, int(1280 * max(width, 1)), 1, norm_cfg=_NORM
        )

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The last map."""
        x = self.conv1(x)
        for stage in self.stages:
            x = stage(x)
        return (self.conv2(x),)
