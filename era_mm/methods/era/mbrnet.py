"""MBRNet: branches that approximate the residual of a feature.

Legend: N batch, C_s and C_t channels of student and teacher, L levels,
B branches, * any spatial dimensions.
"""

import copy
import logging
from collections.abc import Sequence
from typing import ClassVar

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...layers import FormerNames
from ...registry import MODELS
from .bottleneck import BottleneckBranches
from .building import LAYERS
from .losses import REDUCTIONS, estimates_of
from .residual_branch import (
    ResidualBranch,
    init_like_released,
    projection,
)
from .residuals import ListedResiduals, Residuals
from .space import FeatureSpace


@torch.no_grad()
def _scale(
    layer: nn.Module, factor: Tensor, shift: Tensor | float = 0.0
) -> None:
    """Change a layer's output to ``factor * y + shift``, per channel."""
    weight = layer.weight.double()
    shape = (-1, *(1,) * (weight.dim() - 1))
    layer.weight.copy_(factor.double().view(shape) * weight)
    layer.bias.copy_(factor.double() * layer.bias.double() + shift)


@MODELS.register_module()
class MBRNet(FormerNames, BaseModule):
    """Multi-Branched Residual Network, a neck.

        u_l = align_l(P_l)
        h_il = branch_i(x_il)                    i = 1..num_branches
        d_il = projection_il(h_il)
        forward: e_nl = u_l + sum_i d_il         or mean_i, see `reduction`

        x_il = P_l                               'parallel'
             = h_(i-1)l,  x_1l = P_l             'serial'
             = P_l + sum_(j<i) h_jl              'accumulated'

    There is a projection only if the channels differ. As an ordinary neck of
    a host model it outputs the final estimate of the teacher's features, so a
    detector with ``neck=[FPN, MBRNet]`` and the teacher's head is mode T as a
    stock model.

    Source: ERA, arXiv 2508.16050. Structure, ``num_branches=4`` (its ImageNet
    script), ``num_blocks=2``, parallel branches with a projection each and
    the norm's momentum 0.01 are [official code], where features are vectors;
    its convolutional block exists there but is not used. Levels are [ours].

    Args:
        in_channels: C_s, one number or one per level.
        out_channels: C_t, one number or one per level.
        num_levels: Number of levels L.
        spatial_dims: 0 for vectors ``(N, C)``, 1 for ``(N, C, L)``, 2 for
            maps.
        num_branches: Number of branches.
        num_blocks: Blocks per branch.
        topology: Input of a branch: 'parallel', the student's feature
            [official code, its default]; 'accumulated', the student's feature
            plus the outputs of all previous branches [official code, its
            isAccuX]; 'serial', the output of the previous branch [official
            code, there but not wired]. With the last two a branch's losses
            also reach the previous branches.
        share_projection: One projection for all branches of a level instead
            of one each [official code, its is_multi_fc=0].
        reduction: How forward combines the residuals: 'sum' [official code,
            its default], as in training; or 'mean' [official code, its
            final_out_type=avg].
        share_levels: Levels share the layers of the branches. Each level
            keeps its own norms: with shared statistics a level would be
            normalised separately in training but by the mixture of all levels
            at test.
        norm_cfg: Norm of the blocks: 'BN', 'SyncBN', 'GN' or any other that
            mmcv builds, and 'LN', here over the channels at every position.
            None: BN with momentum 0.01; a given dict starts from the layer's
            own defaults.
        act_cfg: Activation between the blocks, any that mmcv builds, and
            'Mish'. None: ReLU. [official code] offers ReLU, GELU, Mish, PReLU
            and LeakyReLU (with slope 0.2, as here).
        group_width: Maximum number of channels in a group of a convolution;
            wider features are convolved in groups. None: no limit. [ours], for
            detectors without a neck: on a ResNet-50's own maps the branches
            have 401 million weights without it and 71 million with 256.
        branch: 'released' branches, or 'bottleneck' ones [ours], for maps and
            sequences: see ``BottleneckBranches``. These have no norm unless
            ``norm_cfg`` is set, and none of the options ``num_blocks``,
            ``topology``, ``share_projection``, ``share_levels``,
            ``group_width`` and ``zero_init``.
        branch_width: Channels within a bottleneck branch. None: an eighth of
            the widest level's, at least 8 and at most 64.
        zero_init: Residuals start at zero, by the weight of the last norm.
            Bottleneck branches always do. [ours].
        normalize: Align layers and branches work in the teacher's normalised
            space, and estimates are mapped back: see ``FeatureSpace``. [ours].
        num_batches: Number of batches for its statistics.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Channel lists that do not fit the levels, counts below 1,
            groups or bottlenecks of vectors, shared levels of different
            width, an unknown topology, reduction or branch, GN without its
            groups, options of the other kind of branch, or a normalised space
            with branches that read each other.
    """

    TOPOLOGIES = ('parallel', 'serial', 'accumulated')
    BRANCHES = ('released', 'bottleneck')
    #: Options that bottleneck branches do not have.
    RELEASED_ONLY = frozenset(
        (
            'num_blocks',
            'topology',
            'share_projection',
            'share_levels',
            'group_width',
            'zero_init',
        )
    )
    #: Options of the normalised space, which a folded net does not need.
    SPACE_OPTIONS = frozenset(('normalize', 'num_batches'))
    #: Settings for 'neck' (`paramwise_cfg.custom_keys`) hold for every name
    #: that contains it.
    former_names: ClassVar[dict[str, str]] = {'bottlenecks': 'branches'}

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int | Sequence[int],
        num_levels: int = 1,
        spatial_dims: int = 2,
        num_branches: int = 4,
        num_blocks: int = 2,
        topology: str = 'parallel',
        share_projection: bool = False,
        reduction: str = 'sum',
        share_levels: bool = False,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        group_width: int | None = None,
        branch: str = 'released',
        branch_width: int | None = None,
        zero_init: bool = False,
        normalize: bool = False,
        num_batches: int = 20,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if spatial_dims not in LAYERS:
            raise ValueError(
                f'`spatial_dims` must be one of {sorted(LAYERS)}, but got '
                f'{spatial_dims}.'
            )
        if num_branches < 1 or num_blocks < 1 or num_levels < 1:
            raise ValueError(
                '`num_branches`, `num_blocks` and `num_levels` must be at '
                f'least 1, but got {num_branches}, {num_blocks} and '
                f'{num_levels}.'
            )
        if group_width is not None and (group_width < 1 or spatial_dims == 0):
            raise ValueError(
                '`group_width` must be at least 1, and is for maps and '
                f'sequences, but got {group_width} with {spatial_dims} '
                'spatial dimensions. Remove it.'
            )
        for name, choice, choices in (
            ('topology', topology, self.TOPOLOGIES),
            ('reduction', reduction, REDUCTIONS),
            ('branch', branch, self.BRANCHES),
        ):
            if choice not in choices:
                raise ValueError(
                    f'`{name}` must be one of {choices}, but got {choice!r}.'
                )
        if branch_width is not None and branch_width < 1:
            raise ValueError(
                f'`branch_width` must be at least 1, but got {branch_width}.'
            )
        if branch == 'bottleneck' and spatial_dims == 0:
            raise ValueError(
                "`branch='bottleneck'` is for maps and sequences, but the "
                "features are vectors. Set branch='released'."
            )
        others = {
            'num_blocks': num_blocks != 2,
            'topology': topology != 'parallel',
            'share_projection': share_projection,
            'share_levels': share_levels,
            'group_width': group_width is not None,
            'zero_init': zero_init,
        }
        if branch == 'released':
            others = {'branch_width': branch_width is not None}
        foreign = [name for name, is_given in others.items() if is_given]
        if foreign:
            raise ValueError(
                f'`{foreign[0]}` is not an option of {branch!r} branches. '
                'Remove it, or set the other `branch`.'
            )
        if normalize and topology != 'parallel':
            # The scale of a residual would reach the branches that read it.
            raise ValueError(
                "`normalize=True` needs topology='parallel', but got "
                f'{topology!r}.'
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
        if share_projection and all(c_s == c_t for c_s, c_t in pairs):
            print_log(
                '`share_projection` of MBRNet has no effect: in- and output '
                f'have the same channels ({channels["in_channels"]}), so '
                'there is no projection.',
                logger='current',
                level=logging.WARNING,
            )
        self.num_branches = num_branches
        self.num_levels = num_levels
        self.topology = topology
        self.reduction = reduction
        self.spatial_dims = spatial_dims
        self.share_levels = share_levels
        act_cfg = act_cfg or dict(type='ReLU', inplace=True)
        self.aligns = nn.ModuleList(
            projection(c_s, c_t, spatial_dims) for c_s, c_t in pairs
        )
        self.space = (
            FeatureSpace(channels['out_channels'], num_batches)
            if normalize
            else None
        )
        self.branch = branch
        self.zero_init = zero_init
        if branch == 'bottleneck':
            self.branches = BottleneckBranches(
                channels['in_channels'],
                channels['out_channels'],
                num_branches,
                branch_width,
                norm_cfg,
                act_cfg,
                spatial_dims,
            )
            return
        norm_cfg = norm_cfg or dict(type='BN', momentum=0.01)
        # One set per level, or one for all levels.
        branch_pairs = pairs[:1] if share_levels else pairs
        self.levels = nn.ModuleList(
            nn.ModuleList(
                ResidualBranch(
                    c_s,
                    c_s if share_projection else c_t,
                    spatial_dims=spatial_dims,
                    num_blocks=num_blocks,
                    num_norms=num_levels if share_levels else 1,
                    norm_cfg=norm_cfg,
                    act_cfg=act_cfg,
                    group_width=group_width,
                )
                for _ in range(num_branches)
            )
            for c_s, c_t in branch_pairs
        )
        self.projections = nn.ModuleList(
            projection(c_s, c_t, spatial_dims)
            if share_projection and c_s != c_t
            else nn.Identity()
            for c_s, c_t in branch_pairs
        )

        if (normalize or zero_init) and any(
            norm.weight is None
            for branches in self.levels
            for branch in branches
            for norm in branch.norms[-1]
        ):
            raise ValueError(
                '`normalize` and `zero_init` need a norm with weights after '
                f'the last block, but got {norm_cfg}.'
            )

    def init_weights(self) -> None:
        """Initialise branches and shared projections as the released code.

        mmengine initialises direct children only, and these are in lists.
        """
        super().init_weights()
        if self.branch == 'bottleneck':
            return
        for branches in self.levels:
            for branch in branches:
                branch.init_weights()
                if self.zero_init:
                    for norm in branch.norms[-1]:
                        nn.init.zeros_(norm.weight)
        init_like_released(self.projections)

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

    def residuals(
        self, feats: Sequence[Tensor], num_branches: int | None = None
    ) -> list[list[Tensor]]:
        """The residuals d, by branch and level.

        Args:
            feats: The student's features.
            num_branches: The first so many branches only; None: all.

        Shape:
            - feats: L of ``(N, C_s, *)``
            - out: B lists of L of ``(N, C_t, *)``
        """
        self._check(feats)
        if self.branch == 'bottleneck':
            by_level = [
                level.unbind(dim=1)[:num_branches]
                for level in self.branches(feats)
            ]
            return [list(branch) for branch in zip(*by_level, strict=True)]
        by_level = [
            self._residuals_of_level(level, feat, num_branches)
            for level, feat in enumerate(feats)
        ]
        return [list(branch) for branch in zip(*by_level, strict=True)]

    def residuals_of_levels(self, feats: Sequence[Tensor]) -> list[Residuals]:
        """The residuals, by level, as the losses need them.

        Shape:
            - feats: L of ``(N, C_s, *)``
        """
        if self.branch == 'bottleneck':
            self._check(feats)
            return list(self.branches.residuals(feats))
        return [
            ListedResiduals(level)
            for level in zip(*self.residuals(feats), strict=True)
        ]

    def _residuals_of_level(
        self, level: int, feat: Tensor, num_branches: int | None
    ) -> list[Tensor]:
        index, norm = (0, level) if self.share_levels else (level, 0)
        residuals = []
        x = feat
        for branch in self.levels[index][:num_branches]:
            hidden = branch.hidden(x, norm)
            residuals.append(
                self.projections[index](branch.projection(hidden))
            )
            if self.topology == 'serial':
                x = hidden
            elif self.topology == 'accumulated':
                x = x + hidden
        return residuals

    def estimates(
        self, feats: Sequence[Tensor], num_branches: int | None = None
    ) -> list[list[Tensor]]:
        """The estimates e_0, e_1, ... of inference, by step and level.

        Args:
            feats: The student's features.
            num_branches: The first so many branches only; None: all.

        Shape:
            - feats: L of ``(N, C_s, *)``
            - out: ``num_branches + 1`` lists of L of ``(N, C_t, *)``
        """
        residuals = self.residuals(feats, num_branches)
        by_level = [
            estimates_of(
                aligned=aligned,
                residuals=[branch[level] for branch in residuals],
                reduction=self.reduction,
            )
            for level, aligned in enumerate(self.align(feats))
        ]
        steps = [list(step) for step in zip(*by_level, strict=True)]
        if self.space is None:
            return steps
        return [self.space.restore(step) for step in steps]

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The final estimate e_n, one per level."""
        return tuple(self.estimates(feats)[-1])

    def folded(self) -> 'MBRNet':
        """A net with the same estimates but without normalised space.

        In this copy, align layers and last layers of the branches output the
        teacher's scale: ``std * (W x + b) + mean`` is
        ``(std W) x + (std b + mean)``. Levels of different scales cannot share
        layers.
        """
        net = copy.deepcopy(self)
        space, net.space = net.space, None
        if space is None:
            return net
        if net.share_levels:
            net._unshare_levels()
        for level, align in enumerate(net.aligns):
            mean, std = space.statistics(level)
            _scale(align, std, mean)
            if net.branch == 'bottleneck':
                _scale(
                    net.branches.expand[level],
                    std.repeat(self.num_branches),
                )
                continue
            for branch in net.levels[level]:
                closes = branch.projection
                if isinstance(closes, nn.Identity):
                    closes = net.projections[level]
                if isinstance(closes, nn.Identity):
                    closes = branch.norms[-1][0]
                _scale(closes, std)
                if closes is net.projections[level]:
                    break
        return net

    def _unshare_levels(self) -> None:
        """Give every level its own copy of the layers."""
        self.share_levels = False
        (shared,), (projection,) = self.levels, self.projections
        self.levels, self.projections = nn.ModuleList(), nn.ModuleList()
        for level in range(self.num_levels):
            branches = copy.deepcopy(shared)
            for branch in branches:
                branch.norms = nn.ModuleList(
                    nn.ModuleList([norms[level]]) for norms in branch.norms
                )
            self.levels.append(branches)
            self.projections.append(copy.deepcopy(projection))

    def _check(self, feats: Sequence[Tensor]) -> None:
        if len(feats) != self.num_levels:
            raise ValueError(
                f'MBRNet was built for {self.num_levels} levels, but got '
                f'{len(feats)}. Set `num_levels`.'
            )
