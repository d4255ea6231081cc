"""Slim branches of MBRNet for maps: all branches of all levels in one module.

Legend: N batch, C_s and C_t channels of student and teacher, B branches,
w channels of a branch, L levels, * spatial dimensions.
"""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from .building import LAYERS, build_activation, build_norm
from .residuals import FactoredResiduals


def _layer(
    conv: nn.Module, norm_cfg: dict | None, act_cfg: dict, spatial_dims: int
) -> nn.Sequential:
    parts = [conv]
    if norm_cfg is not None:
        parts.append(build_norm(norm_cfg, conv.out_channels, spatial_dims))
    return nn.Sequential(*parts, build_activation(act_cfg))


class BottleneckBranches(BaseModule):
    """Bottleneck branches: 1x1, 3x3 and 1x1 convolutions.

        h_il = act(W1_il P_l)                    (N, w, *)
        d_il = W3_il act(W2_il * h_il)           W2 3x3, W3 1x1 from zero

    The branches are computed by grouped convolutions, which give the same
    numbers as separate modules with a fraction of the calls.

    There are no norms by default: their statistics would differ between ranks
    and need more than one value, which a small batch of 1x1 maps lacks.

    Source: ours; the shape of the block is ResNet's (arXiv 1512.03385).

    Args:
        in_channels: C_s of each level.
        out_channels: C_t of each level.
        num_branches: B.
        width: w. None: an eighth of the widest level, at least 8 and at most
            64.
        norm_cfg: Norm after the first two layers. None: no norm.
        act_cfg: Activation.
        spatial_dims: 1 for ``(N, C, L)``, 2 for maps.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        num_branches: int,
        width: int | None,
        norm_cfg: dict | None,
        act_cfg: dict,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        conv = LAYERS[spatial_dims]
        if width is None:
            width = min(max(max(in_channels) // 8, 8), 64)
        self.num_branches = num_branches
        self.width = width
        inner = num_branches * width
        bias = norm_cfg is None
        self.reduce = nn.ModuleList()
        self.spatial = nn.ModuleList()
        self.expand = nn.ModuleList()
        for c_s, c_t in zip(in_channels, out_channels, strict=True):
            self.reduce.append(
                _layer(
                    conv(c_s, inner, 1, bias=bias),
                    norm_cfg,
                    act_cfg,
                    spatial_dims,
                )
            )
            self.spatial.append(
                _layer(
                    conv(
                        inner,
                        inner,
                        3,
                        padding=1,
                        groups=num_branches,
                        bias=bias,
                    ),
                    norm_cfg,
                    act_cfg,
                    spatial_dims,
                )
            )
            self.expand.append(
                conv(inner, num_branches * c_t, 1, groups=num_branches)
            )

    def init_weights(self) -> None:
        """He's for the first two layers, zero for the last."""
        for layer in (*self.reduce, *self.spatial):
            nn.init.kaiming_normal_(
                layer[0].weight, mode='fan_in', nonlinearity='relu'
            )
            if layer[0].bias is not None:
                nn.init.zeros_(layer[0].bias)
        for layer in self.expand:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def residuals(self, feats: Sequence[Tensor]) -> list[FactoredResiduals]:
        """The residuals of each level, not yet multiplied.

        Shape:
            - feats: L of ``(N, C_s, *)``
        """
        found = []
        for level, hidden in enumerate(self._hidden(feats)):
            last = self.expand[level]
            weight = last.weight.view(self.num_branches, -1, self.width)
            bias = last.bias.view(self.num_branches, -1, 1)
            found.append(
                FactoredResiduals(hidden, torch.cat([weight, bias], dim=2))
            )
        return found

    def forward(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """All residuals.

        Shape:
            - feats: L of ``(N, C_s, *)``
            - out: L of ``(N, B, C_t, *)``
        """
        return [
            last(hidden).unflatten(1, (self.num_branches, -1))
            for last, hidden in zip(
                self.expand, self._hidden(feats), strict=True
            )
        ]

    def _hidden(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """The input of the last layers, L of ``(N, B * w, *)``."""
        return [
            spatial(reduce(feat))
            for feat, reduce, spatial in zip(
                feats, self.reduce, self.spatial, strict=True
            )
        ]
