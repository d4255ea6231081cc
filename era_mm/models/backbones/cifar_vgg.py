"""VGGs for 32 x 32 images."""

import math
from typing import ClassVar

from mmengine.model import BaseModule
from torch import Tensor, nn

from ...registry import MODELS
from .initial_weights import he_init


@MODELS.register_module()
class CIFARVGG(BaseModule):
    """Five stages of conv3x3-BN-ReLU with max pooling after the first three.

        [64]-pool-[128]-pool-[256]-pool-[512]-[512]

    Two poolings less than on ImageNet, as 32 x 32 images need; and no
    fully-connected layers.

    Source: Simonyan and Zisserman, arXiv 1409.1556, in the form of CRD, arXiv
    1910.10699, whose own the depth 8 is.

    Args:
        depth: 8, 11, 13, 16 or 19.
        init_cfg: As in mmengine. None: He's.
        widen_factor: Of all widths, which are rounded down.

    Shape:
        - input: ``(N, 3, H, W)``
        - output: one of ``(N, 512 * widen_factor, H / 8, W / 8)``

    Raises:
        ValueError: Another depth.
    """

    RANGES: ClassVar[dict] = {'widen_factor': (1 / 64, math.inf)}
    BLOCKS: ClassVar[dict[int, tuple[int, ...]]] = {
        8: (1, 1, 1, 1, 1),
        11: (1, 1, 2, 2, 2),
        13: (2, 2, 2, 2, 2),
        16: (2, 2, 3, 3, 3),
        19: (2, 2, 4, 4, 4),
    }

    def __init__(
        self,
        depth: int,
        init_cfg: dict | None = None,
        widen_factor: float = 1.0,
    ) -> None:
        super().__init__(init_cfg or he_init())
        if depth not in self.BLOCKS:
            raise ValueError(
                f'`depth` must be one of {sorted(self.BLOCKS)}, but got '
                f'{depth}.'
            )
        self.stages = nn.ModuleList()
        channels = 3
        for num_blocks, width in zip(
            self.BLOCKS[depth], (64, 128, 256, 512, 512), strict=True
        ):
            out_channels = int(width * widen_factor)
            layers: list[nn.Module] = []
            for _ in range(num_blocks):
                # Not a ConvModule: it warns of the biases, which the field's
                # definition has.
                layers += [
                    nn.Conv2d(channels, out_channels, 3, padding=1),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(inplace=True),
                ]
                channels = out_channels
            self.stages.append(nn.Sequential(*layers))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The last map."""
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index < 3:
                x = self.pool(x)
        return (x,)
