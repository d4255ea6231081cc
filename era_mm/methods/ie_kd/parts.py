"""The split of the student's channels, and the coders.

Legend: N batch, C channels, F channels of a factor, L levels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...registry import explain_unknown_keys


@explain_unknown_keys
class ChannelSplit(nn.Module):
    """Splits a feature into the part that inherits and the one that explores.

        f_inherit = f[:, I],   f_explore = f[:, E]

    I are the first ``round(ratio * C)`` channels in a fixed order, E the
    others. The order is kept in the extras of every checkpoint.

    Source: IE-KD [paper]; both modes and one half are [official code], other
    ratios [ours].

    Args:
        num_channels: C.
        ratio: Share of the channels that inherits, in [0, 1].
        mode: 'natural' (the original order of the channels) or 'random' (a
            permutation drawn from ``seed``).
        seed: Seed of the permutation.

    Shape:
        - in: ``(N, C, *)``
        - out: ``(N, |I|, *)`` and ``(N, |E|, *)``

    Raises:
        ValueError: An unknown mode, a ratio outside [0, 1], or one between
            that leaves a part without channels.
    """

    MODES = ('natural', 'random')

    def __init__(
        self,
        num_channels: int,
        ratio: float = 0.5,
        mode: str = 'natural',
        seed: int = 0,
    ) -> None:
        super().__init__()
        if mode not in self.MODES:
            raise ValueError(
                f'`split.mode` must be one of {self.MODES}, but got {mode!r}.'
            )
        if not 0 <= ratio <= 1:
            raise ValueError(
                '`split.ratio` is the share of the channels that inherits, '
                f'so it must be in [0, 1], but got {ratio}.'
            )
        order = torch.arange(num_channels)
        if mode == 'random':
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(num_channels, generator=generator)
        cut = round(ratio * num_channels)
        if 0 < ratio < 1 and cut in (0, num_channels):
            raise ValueError(
                f'`split.ratio` {ratio} of {num_channels} channels leaves '
                'one part without any. Choose a ratio nearer to 0.5; or 0 or '
                '1 for a single part.'
            )
        self.register_buffer('inherit_index', order[:cut])
        self.register_buffer('explore_index', order[cut:])

    def forward(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """The part that inherits and the part that explores."""
        return (
            feat.index_select(1, self.inherit_index),
            feat.index_select(1, self.explore_index),
        )


class _Block(nn.Module):
    """A convolution without bias, one norm per level, an activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_norms: int,
        kernel_size: int = 3,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=False,
        )
        # N(0, sqrt(2 / (k * k * out_channels))).
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out')
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(out_channels) for _ in range(num_norms)
        )
        self.act = nn.LeakyReLU(0.1) if act else nn.Identity()

    def forward(self, x: Tensor, norm: int = 0) -> Tensor:
        return self.act(self.norms[norm](self.conv(x)))


class FactorCoder(nn.Module):
    """Three convolutions between a feature and its factor.

        LeakyReLU, then [conv 3x3 - BN - LeakyReLU] x 3

    with channels ``C_in -> C_in -> C_out -> C_out`` and slope 0.1. Encoder
    and decoder are alike; the decoder has the channels exchanged.

    Source: IE-KD [official code], its initialisation included; one norm per
    level is [ours].

    Args:
        in_channels: C_in.
        out_channels: C_out.
        num_norms: Norms per convolution: one for each level with its own
            statistics.

    Shape:
        - in: ``(N, C_in, H, W)``
        - out: ``(N, C_out, H, W)``
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_norms: int = 1
    ) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.1)
        self.blocks = nn.ModuleList(
            [
                _Block(in_channels, in_channels, num_norms),
                _Block(in_channels, out_channels, num_norms),
                _Block(out_channels, out_channels, num_norms),
            ]
        )

    def forward(self, x: Tensor, norm: int = 0) -> Tensor:
        """The factor; ``norm`` is the index of the norm to use."""
        x = self.act(x)
        for block in self.blocks:
            x = block(x, norm)
        return x


class Regressor(_Block):
    """A 1x1 convolution without bias and a norm, as OFD has it.

    Source: OFD, arXiv 1904.01866 [paper].

    Args:
        in_channels: Channels of a part of the student's feature.
        out_channels: Channels of the teacher.
        num_norms: See :class:`FactorCoder`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_norms: int = 1
    ) -> None:
        super().__init__(
            in_channels, out_channels, num_norms, kernel_size=1, act=False
        )


class OverLevels(nn.Module):
    """One coder per level, or one for all with a norm per level.

    Args:
        kind: Class of the coder.
        in_channels: One value per level.
        out_channels: The same.
        share: One coder for all levels.

    Shape:
        - in: L of ``(N, C_in, H, W)``
        - out: L of ``(N, C_out, H, W)``

    Raises:
        ValueError: One coder for all levels, but their channels differ.
    """

    def __init__(
        self,
        kind: Callable[[int, int, int], nn.Module],
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        share: bool,
    ) -> None:
        super().__init__()
        pairs = list(zip(in_channels, out_channels, strict=True))
        if share and len(set(pairs)) > 1:
            raise ValueError(
                '`share_levels=True` needs the same channels at all levels, '
                f'but in and out are {pairs}. Set share_levels=False.'
            )
        self.share = share
        self.coders = nn.ModuleList(
            [kind(*pairs[0], len(pairs))]
            if share
            else [kind(*pair, 1) for pair in pairs]
        )

    def forward(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of the coders, by level."""
        if self.share:
            return [self.coders[0](x, level) for level, x in enumerate(feats)]
        return [coder(x) for coder, x in zip(self.coders, feats, strict=True)]


class FactorAutoEncoder(nn.Module):
    """The teacher's auto-encoder; its code is the factor.

        F = Enc(f),   R(f) = Dec(F)

    Source: IE-KD [official code].

    Args:
        in_channels: Channels of the teacher's feature, one value per level.
        factor_channels: Channels of the factor, one value per level.
        share: One coder for all levels.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        factor_channels: Sequence[int],
        share: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = OverLevels(
            FactorCoder, in_channels, factor_channels, share
        )
        self.decoder = OverLevels(
            FactorCoder, factor_channels, in_channels, share
        )

    def forward(
        self, feats: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Factors and reconstructions by level."""
        factors = self.encoder(feats)
        return factors, self.decoder(factors)
