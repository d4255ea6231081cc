"""ResNets of depth 6n + 2 for 32 x 32 images."""

from typing import Any, ClassVar

from mmpretrain.models.backbones.resnet import BasicBlock
from mmpretrain.models.backbones.resnet_cifar import ResNet_CIFAR

from ...registry import MODELS


@MODELS.register_module()
class CIFARResNet(ResNet_CIFAR):
    """ResNet with three stages of n basic blocks, depth 6n + 2.

        conv3x3 (16) - [n blocks, 16] - [n blocks, 32, /2] - [n blocks, 64, /2]

    With ``width=4`` the widths are 32, 64, 128 and 256: the stem doubles, the
    stages quadruple. That is the ResNet8x4 and ResNet32x4 of the field.

    Source: He et al., arXiv 1512.03385, section 4.2, with the 1x1 shortcut
    convolutions and the "x4" widths of CRD, arXiv 1910.10699. The layers are
    mmpretrain's.

    Args:
        depth: 8, 14, 20, 32, 44, 56 or 110.
        width: 1 or 4.
        base_channels: Channels of the first stage. None: 16 * width.
        stem_channels: Of the stem. None: 16, or 32 at width 4.
        kwargs: As in mmpretrain's ``ResNet_CIFAR``.

    Shape:
        - input: ``(N, 3, H, W)``
        - output: one of ``(N, 4 * base_channels, H / 4, W / 4)``

    Raises:
        KeyError: Another depth.
        ValueError: Another width.
    """

    arch_settings: ClassVar[dict] = {
        depth: (BasicBlock, ((depth - 2) // 6,) * 3)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    }
    STEMS: ClassVar[dict[int, int]] = {1: 16, 4: 32}

    def __init__(
        self,
        depth: int,
        width: int = 1,
        base_channels: int | None = None,
        stem_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        if width not in self.STEMS:
            raise ValueError(
                f'`width` must be one of {sorted(self.STEMS)}, but got '
                f'{width}.'
            )
        layout = dict(
            stem_channels=stem_channels or self.STEMS[width],
            base_channels=base_channels or 16 * width,
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            out_indices=(2,),
            zero_init_residual=False,
        )
        super().__init__(depth, **{**layout, **kwargs})
