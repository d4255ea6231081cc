"""Layers of the branches, from configs.

Legend: N batch, C channels, * any spatial dimensions.
"""

from typing import Any

from mmcv.cnn import build_activation_layer, build_norm_layer
from torch import Tensor, nn

LAYERS = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d}


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels, at every position separately.

    PyTorch's normalises the last dimensions, which are not the channels of
    ``(N, C, *)``; mmpretrain's LN2d only takes maps.

    Source: Ba et al., arXiv 1607.06450; channels first is [ours].

    Shape:
        - x, out: ``(N, C, *)``
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, C, *)``."""
        # Contiguous, because heads of the hosts take views.
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).contiguous()


def build_norm(norm_cfg: dict, channels: int, spatial_dims: int) -> nn.Module:
    cfg: dict[str, Any] = dict(norm_cfg)
    kind = cfg.get('type')
    if kind == 'BN':
        cfg['type'] = f'BN{max(spatial_dims, 1)}d'
    elif kind in ('LN', 'LN2d'):
        cfg['type'] = ChannelLayerNorm
    elif kind == 'GN' and 'num_groups' not in cfg:
        raise ValueError(
            '`norm_cfg` of type GN needs `num_groups`, a divisor of the '
            f'{channels} channels, but got {norm_cfg}. Set for instance '
            "norm_cfg=dict(type='GN', num_groups=32)."
        )
    return build_norm_layer(cfg, channels)[1]


def build_activation(act_cfg: dict) -> nn.Module:
    cfg: dict[str, Any] = dict(act_cfg)
    if cfg.get('type') == 'Mish':
        # ERA offers it, mmcv does not register it.
        cfg['type'] = nn.Mish
    elif cfg.get('type') == 'LeakyReLU':
        # [official code]; PyTorch's own is 0.01.
        cfg.setdefault('negative_slope', 0.2)
    return build_activation_layer(cfg)
