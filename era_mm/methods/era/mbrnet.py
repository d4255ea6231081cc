"""MBRNet: several branches that approximate what a feature still lacks.

Legend: N batch, C_s and C_t channels of student and teacher, L levels,
B branches, * any spatial dimensions.
"""

from collections.abc import Sequence

from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...registry import MODELS

_LAYERS = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d}


def _norm(norm_cfg: dict, channels: int, spatial_dims: int) -> nn.Module:
    cfg = dict(norm_cfg)
    if cfg['type'] == 'BN':
        cfg['type'] = f'BN{max(spatial_dims, 1)}d'
    return build_norm_layer(cfg, channels)[1]


def _projection(
    in_channels: int, out_channels: int, spatial_dims: int
) -> nn.Module:
    if spatial_dims == 0:
        return nn.Linear(in_channels, out_channels)
    return _LAYERS[spatial_dims](in_channels, out_channels, 1)


class ResidualBranch(BaseModule):
    """One residual approximator.

        [layer - norm - act] x (num_blocks - 1), layer - norm, (projection)

    The layer is Linear (with bias) on vectors and a 3-wide convolution
    (without) on maps; width stays ``in_channels``; the projection is there
    only where the channels differ.

    Args:
        in_channels: C_s.
        out_channels: C_t.
        spatial_dims: 0 for ``(N, C)``, 1 for ``(N, C, L)``, 2 for
            ``(N, C, H, W)``.
        num_blocks: Blocks of the branch.
        num_norms: Norms per block: as many as there are levels with
            statistics of their own.
        norm_cfg: Norm.
        act_cfg: Activation; the last block has none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spatial_dims: int,
        num_blocks: int,
        num_norms: int,
        norm_cfg: dict,
        act_cfg: dict,
    ) -> None:
        super().__init__()
        if spatial_dims == 0:
            layers = [
                nn.Linear(in_channels, in_channels) for _ in range(num_blocks)
            ]
        else:
            layers = [
                _LAYERS[spatial_dims](
                    in_channels, in_channels, 3, padding=1, bias=False
                )
                for _ in range(num_blocks)
            ]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(
            nn.ModuleList(
                _norm(norm_cfg, in_channels, spatial_dims)
                for _ in range(num_norms)
            )
            for _ in range(num_blocks)
        )
        self.activation = (
            build_activation_layer(act_cfg)
            if num_blocks > 1
            else nn.Identity()
        )
        self.projection = (
            _projection(in_channels, out_channels, spatial_dims)
            if in_channels != out_channels
            else nn.Identity()
        )

    def init_weights(self) -> None:
        """Linear N(0, 0.01), convolutions Kaiming fan-out, norms 1 and 0.

        Source: [official code]. Not zero-initialised: the closing norm makes
        each residual unit-variance per channel at the first step.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
                nn.init.kaiming_normal_(
                    module.weight, mode='fan_out', nonlinearity='relu'
                )
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, norm: int = 0) -> Tensor:
        """One residual.

        Args:
            x: The student's feature.
            norm: Which of the norms to use.

        Shape:
            - x: ``(N, C_s, *)``
            - out: ``(N, C_t, *)``
        """
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x = self.norms[index][norm](layer(x))
            if index < last:
                x = self.activation(x)
        return self.projection(x)


@MODELS.register_module()
class MBRNet(BaseModule):
    """Multi-Branched Residual Network, a neck.

        u_l = align_l(P_l)
        d_il = branch_i(P_l)                     i = 1..num_branches
        forward: e_nl = u_l + sum_i d_il

    Every branch sees the student's feature itself (parallel branches). Used
    as an ordinary neck of a host model it gives the final estimate of the
    teacher's features, so a detector with ``neck=[FPN, MBRNet]`` and the
    teacher's head is the T mode as a stock model.

    Source: ERA, arXiv 2508.16050. Structure, ``num_branches=4`` (its ImageNet
    script), ``num_blocks=2`` and the norm's momentum 0.01 are [official
    code], where features are vectors; its convolutional block is present
    there and unused. Levels are [ours].

    Args:
        in_channels: C_s, one number or one per level.
        out_channels: C_t, likewise.
        num_levels: Number of levels L.
        spatial_dims: 0 for vectors ``(N, C)``, 1 for ``(N, C, L)``, 2 for
            maps.
        num_branches: Number of branches.
        num_blocks: Blocks per branch.
        share_levels: Levels share the layers of the branches. The norms stay
            one per level: shared statistics normalise a level by itself in
            training and by the mixture of levels at test.
        norm_cfg: Norm of the blocks.
        act_cfg: Activation between the blocks.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Channel lists that do not fit the levels, counts below 1,
            or shared levels of different width.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int | Sequence[int],
        num_levels: int = 1,
        spatial_dims: int = 2,
        num_branches: int = 4,
        num_blocks: int = 2,
        share_levels: bool = False,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if spatial_dims not in _LAYERS:
            raise ValueError(
                f'`spatial_dims` must be one of {sorted(_LAYERS)}, but got '
                f'{spatial_dims}.'
            )
        if num_branches < 1 or num_blocks < 1 or num_levels < 1:
            raise ValueError(
                '`num_branches`, `num_blocks` and `num_levels` must be at '
                f'least 1, but got {num_branches}, {num_blocks} and '
                f'{num_levels}.'
            )
        channels = {}
        for name, value in (
            ('in_channels', in_channels),
            ('out_channels', out_channels),
        ):
            channels[name] = (
                [value] * num_levels if isinstance(value, int) else list(value)
            )
            if len(channels[name]) != num_levels:
                raise ValueError(
                    f'`{name}` must be one number or {num_levels} '
                    f'(`num_levels`), but got {value}.'
                )
        pairs = list(
            zip(channels['in_channels'], channels['out_channels'], strict=True)
        )
        if share_levels and len(set(pairs)) > 1:
            raise ValueError(
                '`share_levels` needs the same channels on every level, but '
                f'got {channels}. Set share_levels=False.'
            )
        self.num_branches = num_branches
        self.num_levels = num_levels
        self.spatial_dims = spatial_dims
        self.share_levels = share_levels
        norm_cfg = norm_cfg or dict(type='BN', momentum=0.01)
        act_cfg = act_cfg or dict(type='ReLU', inplace=True)
        self.aligns = nn.ModuleList(
            _projection(c_s, c_t, spatial_dims) for c_s, c_t in pairs
        )
        self.levels = nn.ModuleList(
            nn.ModuleList(
                ResidualBranch(
                    c_s,
                    c_t,
                    spatial_dims=spatial_dims,
                    num_blocks=num_blocks,
                    num_norms=num_levels if share_levels else 1,
                    norm_cfg=norm_cfg,
                    act_cfg=act_cfg,
                )
                for _ in range(num_branches)
            )
            for c_s, c_t in (pairs[:1] if share_levels else pairs)
        )

    def init_weights(self) -> None:
        """Initialise the branches.

        mmengine asks direct children only, and the branches sit in lists.
        """
        super().init_weights()
        for branches in self.levels:
            for branch in branches:
                branch.init_weights()

    def align(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """The aligned features u, one per level.

        Shape:
            - feats: L of ``(N, C_s, *)``
            - out: L of ``(N, C_t, *)``
        """
        self._check(feats)
        return [
            align(feat) for align, feat in zip(self.aligns, feats, strict=True)
        ]

    def residuals(self, feats: Sequence[Tensor]) -> list[list[Tensor]]:
        """The residuals d, by branch and level.

        Shape:
            - feats: L of ``(N, C_s, *)``
            - out: B lists of L of ``(N, C_t, *)``
        """
        self._check(feats)
        return [
            [
                self.levels[0][branch](feat, norm=level)
                if self.share_levels
                else self.levels[level][branch](feat)
                for level, feat in enumerate(feats)
            ]
            for branch in range(self.num_branches)
        ]

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The final estimate e_n, one per level."""
        estimates = self.align(feats)
        for residual in self.residuals(feats):
            estimates = [
                e + d for e, d in zip(estimates, residual, strict=True)
            ]
        return tuple(estimates)

    def _check(self, feats: Sequence[Tensor]) -> None:
        if len(feats) != self.num_levels:
            raise ValueError(
                f'MBRNet was built for {self.num_levels} levels, but got '
                f'{len(feats)}. Set `num_levels`.'
            )
