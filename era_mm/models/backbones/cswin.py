"""CSWin Transformer, which mmpretrain and mmdet lack.

Legend: N batch, C channels, H and W of a map, s width of a stripe.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from mmcv.cnn.bricks.drop import build_dropout
from mmcv.cnn.bricks.transformer import FFN
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.models.utils import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import pad

from ...registry import MODELS


def _windows(x: Tensor, height: int, width: int) -> Tensor:
    """``(N, H, W, C)`` to ``(N, H / height * W / width, height * width, C)``.

    Row by row of windows, and row by row in each.
    """
    num, rows, columns, channels = x.shape
    x = x.reshape(
        num, rows // height, height, columns // width, width, channels
    )
    return x.transpose(2, 3).reshape(num, -1, height * width, channels)


def _map(windows: Tensor, height: int, width: int, columns: int) -> Tensor:
    """The inverse of :func:`_windows`, for maps that many columns wide."""
    num, _, _, channels = windows.shape
    x = windows.reshape(num, -1, columns // width, height, width, channels)
    return x.transpose(2, 3).reshape(num, -1, columns, channels)


class StripeAttention(nn.Module):
    """Self-attention within the windows of a map.

        out = softmax(q k^T / sqrt(d)) v + DWConv3x3(v)

    The depthwise convolution is the locally enhanced positional encoding
    (LePE); it runs within each window. Maps whose size is not a multiple of
    the window are padded at the bottom and on the right, and nothing attends
    to the padding.

    Args:
        channels: C of this part.
        num_heads: Number of heads of this part; d = C / num_heads.

    Shape:
        - q, k, v, out: ``(N, H, W, C)``
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (channels // num_heads) ** -0.5
        self.lepe = nn.Conv2d(
            channels, channels, 3, padding=1, groups=channels
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(2, 3)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int
    ) -> Tensor:
        """Attention in windows of ``height`` x ``width``."""
        rows, columns = v.shape[1:3]
        margin = (0, 0, 0, -columns % width, 0, -rows % height)
        q, k, v = (_windows(pad(x, margin), height, width) for x in (q, k, v))
        scores = self.scale * self._heads(q) @ self._heads(k).transpose(3, 4)
        if any(margin):
            inside = pad(scores.new_ones(1, rows, columns, 1), margin)
            keys = _windows(inside, height, width)[..., 0]
            scores = scores.masked_fill(
                keys[:, :, None, None] == 0, float('-inf')
            )
        out = scores.softmax(dim=-1) @ self._heads(v)
        maps = v.flatten(0, 1).transpose(1, 2).unflatten(2, (height, width))
        local = self.lepe(maps).flatten(2).transpose(1, 2)
        out = out.transpose(2, 3).flatten(3) + local.reshape(v.shape)
        out = _map(out, height, width, columns - columns % -width)
        return out[:, :rows, :columns]


class CrossShapedAttention(nn.Module):
    """Half the heads attend in columns, half in rows, ``stripe`` wide.

    Together they cover a cross. With ``stripe=None`` all heads attend to the
    whole map. Columns come first, as in the published code.

    Args:
        channels: C.
        num_heads: Number of heads of both halves together.
        stripe: s; a smaller map is a single stripe.

    Shape:
        - in, out: ``(N, H, W, C)``
    """

    def __init__(
        self, channels: int, num_heads: int, stripe: int | None
    ) -> None:
        super().__init__()
        self.stripe = stripe
        parts = 1 if stripe is None else 2
        self.qkv = nn.Linear(channels, 3 * channels)
        self.parts = nn.ModuleList(
            StripeAttention(channels // parts, num_heads // parts)
            for _ in range(parts)
        )
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the attention."""
        rows, columns = x.shape[1:3]
        sizes = [(rows, columns)]
        if self.stripe is not None:
            sizes = [
                (rows, min(self.stripe, columns)),
                (min(self.stripe, rows), columns),
            ]
        triples = zip(
            *(
                tensor.chunk(len(sizes), dim=-1)
                for tensor in self.qkv(x).chunk(3, dim=-1)
            ),
            strict=True,
        )
        found = [
            part(*triple, *size)
            for part, triple, size in zip(
                self.parts, triples, sizes, strict=True
            )
        ]
        return self.proj(torch.cat(found, dim=-1))


class CSWinBlock(nn.Module):
    """Attention and a feed-forward network, each on a shortcut.

        x = x + Attention(LN(x)),    x = x + FFN(LN(x))

    Args:
        channels: C.
        num_heads: See ``CrossShapedAttention``.
        stripe: See ``CrossShapedAttention``.
        drop_path: Probability that a sample skips either part.

    Shape:
        - in, out: ``(N, H, W, C)``
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        stripe: int | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        drop = dict(type='DropPath', drop_prob=drop_path)
        self.norm1 = nn.LayerNorm(channels)
        self.attn = CrossShapedAttention(channels, num_heads, stripe)
        self.drop_path = build_dropout(drop)
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = FFN(
            embed_dims=channels,
            feedforward_channels=4 * channels,
            act_cfg=dict(type='GELU'),
            dropout_layer=drop,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return self.ffn(self.norm2(x), identity=x)


class CSWinStage(nn.Sequential):
    """Blocks of one resolution.

    Shape:
        - in, out: ``(N, C, H, W)``
    """

    def forward(self, x: Tensor) -> Tensor:
        """The blocks one after the other."""
        x = super().forward(x.permute(0, 2, 3, 1))
        return x.permute(0, 3, 1, 2).contiguous()


@MODELS.register_module()
class CSWinTransformer(BaseBackbone):
    """CSWin Transformer: self-attention in cross-shaped windows.

        conv7x7/4 - stage 1 - conv3x3/2 - stage 2 - ... - stage 4

    every convolution followed by a layer norm; channels double from stage to
    stage. Stages 1 to 3 attend in stripes, stage 4 to the whole map.

    Source: Dong et al., arXiv 2107.00652, with the depths and the positional
    encoding in each window of its code (microsoft/CSWin-Transformer). Other
    sizes than those of whole stripes are padded [ours].

    Args:
        arch: 'tiny', 'small', 'base' or 'large'; or a dict with
            ``embed_dims`` (channels of stage 1), ``depths`` and
            ``num_heads``.
        stripes: s of stages 1 to 3. (1, 2, 7) are the paper's for 224 x 224
            images; it takes (1, 2, 12) for 384 x 384.
        drop_path_rate: Rate of the last block; it rises from 0. The paper:
            0.2, 0.4, 0.5 for tiny, small, base.
        out_indices: Stages whose normalised outputs are returned.
        init_cfg: As in mmengine. None: the code's.

    Shape:
        - input: ``(N, 3, H, W)``
        - output: per index ``(N, 2^i * embed_dims, H / 2^(i+2), W / 2^(i+2))``

    Raises:
        ValueError: An unknown ``arch``.
    """

    arch_zoo: ClassVar[dict[str, dict[str, Any]]] = {
        name: dict(embed_dims=width, depths=depths, num_heads=heads)
        for name, width, depths, heads in (
            ('tiny', 64, (1, 2, 21, 1), (2, 4, 8, 16)),
            ('small', 64, (2, 4, 32, 2), (2, 4, 8, 16)),
            ('base', 96, (2, 4, 32, 2), (4, 8, 16, 32)),
            ('large', 144, (2, 4, 32, 2), (6, 12, 24, 24)),
        )
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        stripes: Sequence[int] = (1, 2, 7),
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (3,),
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(
            init_cfg
            or [
                dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
                dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
            ]
        )
        settings = self.arch_zoo.get(arch) if isinstance(arch, str) else arch
        if settings is None or set(settings) != {
            'embed_dims',
            'depths',
            'num_heads',
        }:
            raise ValueError(
                f'`arch` must be one of {sorted(self.arch_zoo)} or a dict '
                f'with embed_dims, depths and num_heads, but got {arch!r}.'
            )
        depths = settings['depths']
        self.out_indices = tuple(out_indices)
        self.channels = [settings['embed_dims'] * 2**i for i in range(4)]
        last = max(sum(depths) - 1, 1)
        rates = [drop_path_rate * i / last for i in range(sum(depths))]
        self.downsamples = nn.ModuleList()
        self.stages = nn.ModuleList()
        for index, (depth, heads, stripe) in enumerate(
            zip(depths, settings['num_heads'], [*stripes, None], strict=True)
        ):
            channels = self.channels[index]
            conv = (
                nn.Conv2d(self.channels[index - 1], channels, 3, 2, 1)
                if index
                else nn.Conv2d(3, channels, 7, 4, 2)
            )
            self.downsamples.append(nn.Sequential(conv, LayerNorm2d(channels)))
            self.stages.append(
                CSWinStage(
                    *(
                        CSWinBlock(channels, heads, stripe, rates.pop(0))
                        for _ in range(depth)
                    )
                )
            )
        for index in self.out_indices:
            norm = LayerNorm2d(self.channels[index])
            self.add_module(f'norm{index}', norm)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The normed maps of the stages asked for."""
        found = []
        for index, (downsample, stage) in enumerate(
            zip(self.downsamples, self.stages, strict=True)
        ):
            x = stage(downsample(x))
            if index in self.out_indices:
                found.append(self.get_submodule(f'norm{index}')(x))
        return tuple(found)
