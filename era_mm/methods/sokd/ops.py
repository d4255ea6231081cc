"""Feature operations that a policy chooses from.

Legend: N batch, C channels, F a feature ``(N, C, H, W)``, m the magnitude, a
scalar tensor in [0, 1).
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from mmengine.registry import Registry
from torch import Tensor
from torch.nn.functional import avg_pool2d

#: Feature operations by name; register further ones here.
FEATURE_OPS = Registry('feature op', scope='era_mm')


def straight_through(value: Tensor, magnitude: Tensor) -> Tensor:
    """Give a result the gradient 1 per number with respect to m.

        y = value + (m - sg(m)),   dL/dm = sum of dL/dy

    The value is unchanged, bit for bit, and ``value`` keeps its own gradient.
    The 1 is a convention: it does not depend on whether the operation makes
    numbers larger or smaller.

    Source: straight-through magnitudes, SoKD [paper, by readers' notes], as
    in DADA [DADA code].

    Shape:
        - value: any
        - magnitude: scalar
        - out: as value
    """
    return value + (magnitude - magnitude.detach())


class FeatureOp(ABC):
    """One operation on a feature.

    A subclass defines :meth:`apply` and is registered in ``FEATURE_OPS``.
    Operations must not move anything: the feature must stay aligned with the
    student's.

    Attributes:
        is_differentiable: Whether the result itself has a gradient with
            respect to m; otherwise it gets the straight-through one.
        is_identity: Whether it never changes anything.
    """

    is_differentiable = True
    is_identity = False

    @abstractmethod
    def apply(
        self, feat: Tensor, magnitude: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The operation.

        Args:
            feat: F, in float32.
            magnitude: m.
            generator: On the feature's device; the only source of randomness.
        """

    def __call__(
        self, feat: Tensor, magnitude: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The operation, with a gradient with respect to m.

        Shape:
            - feat, out: ``(N, C, H, W)``
            - magnitude: scalar
        """
        if self.is_differentiable:
            return self.apply(feat, magnitude, generator)
        return straight_through(
            self.apply(feat, magnitude.detach(), generator), magnitude
        )


def _rand(feat: Tensor, *shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(
        shape, generator=generator, dtype=feat.dtype, device=feat.device
    )


def _keep(
    feat: Tensor, num: int, share: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """1 for the kept ones of ``num`` entries, and their number.

    Exactly ``round(share * num)`` are dropped, different ones per sample.
    """
    scores = _rand(feat, len(feat), num, generator=generator)
    dropped = (share * num).round()
    # Ranks instead of a threshold at an index, which would wait for the GPU.
    keep = scores.argsort(1).argsort(1) >= dropped
    return keep.to(feat.dtype), num - dropped


@FEATURE_OPS.register_module()
class Identity(FeatureOp):
    """F' = F. It lets a policy leave a feature unchanged."""

    is_identity = True

    def apply(
        self, feat: Tensor, magnitude: Tensor, generator: torch.Generator
    ) -> Tensor:
        """F itself."""
        return feat


@FEATURE_OPS.register_module()
class ChannelMask(FeatureOp):
    """Drop the share m of the channels; scale the others up by 1 / (1 - m).

    Exactly ``k = round(m * C)`` channels, different ones in each sample; the
    scale is ``C / (C - k)``.

    Source: masking is [paper, by readers' notes], the form [inference].
    """

    is_differentiable = False

    def apply(
        self, feat: Tensor, magnitude: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The masked feature."""
        channels = feat.shape[1]
        keep, kept = _keep(feat, channels, magnitude, generator)
        return feat * keep[..., None, None] * (channels / kept.clamp(min=1))


@FEATURE_OPS.register_module()
class SpatialMask(FeatureOp):
    """Set the share m of the positions to 0, different ones per sample.

    Source: as :class:`ChannelMask`.
    """

    is_differentiable = False

    def apply(
        self, feat: Tensor, magnitude: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The masked feature."""
        height, width = feat.shape[2:]
        keep, _ = _keep(feat, height * width, magnitude, generator)
        return feat * keep.view(-1, 1, height, width)


@FEATURE_OPS.register_module()
class BlockMask(FeatureOp):
    """Set one rectangle to 0 that covers about the share m of the map.

    ``round(sqrt(m) * H)`` by ``round(sqrt(m) * W)``, inside the map, at a
    different position in each sample.

    Source: as :class:`ChannelMask`.
    """

    is_differentiable = False

    def apply(
        self, feat: Tensor, magnitude: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The masked feature."""
        inside = []
        for size in feat.shape[2:]:
            side = (magnitude.sqrt() * size).round()
            place = _rand(feat, len(feat), 1, generator=generator)
            start = (place * (size - side + 1)).floor()
            index = torch.arange(size, device=feat.device)
            inside.append((index >= start) & (index < start + side))
        block = inside[0][:, :, None] & inside[1][:, None, :]
        return feat.masked_fill(block[:, None], 0)


@FEATURE_OPS.register_module()
class GaussianNoise(FeatureOp):
    """F' = F + m * std(F) * z,   z ~ N(0, 1), std over each sample.

    Source: adding noise is [paper, by readers' notes], the form [inference].
    """

    def apply(
        self, feat: Tensor, magnitude: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The noisy feature."""
        noise = torch.randn(
            feat.shape,
            generator=generator,
            dtype=feat.dtype,
            device=feat.device,
        )
        std = feat.std((1, 2, 3), correction=0, keepdim=True)
        return feat + magnitude * std * noise


@FEATURE_OPS.register_module()
class ChannelScale(FeatureOp):
    """F' = F * (1 + m * u),   u ~ U(-1, 1) for each channel and sample.

    Source: [inference].
    """

    def apply(
        self, feat: Tensor, magnitude: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The scaled feature."""
        number = _rand(feat, *feat.shape[:2], 1, 1, generator=generator)
        return feat * (1 + magnitude * (2 * number - 1))


@FEATURE_OPS.register_module()
class SpatialSmooth(FeatureOp):
    """F' = (1 - m) * F + m * mean3x3(F), at the border over existing cells.

    Source: [inference].
    """

    def apply(
        self, feat: Tensor, magnitude: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The smoothed feature."""
        mean = avg_pool2d(feat, 3, 1, 1, count_include_pad=False)
        return (1 - magnitude) * feat + magnitude * mean


@FEATURE_OPS.register_module()
class SampleMix(FeatureOp):
    """F'_n = (1 - m) * F_n + m * F_p(n),   p a permutation of the batch.

    Source: [inference].
    """

    def apply(
        self, feat: Tensor, magnitude: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The mixed feature."""
        order = torch.randperm(
            len(feat), generator=generator, device=feat.device
        )
        return (1 - magnitude) * feat + magnitude * feat[order]


def build_op(config: str | dict) -> FeatureOp:
    """An operation from its name, or from ``dict(type=name, ...)``.

    Raises:
        ValueError: No such operation; the message lists the known ones.
    """
    config = dict(type=config) if isinstance(config, str) else dict(config)
    name: Any = config.pop('type', None)
    kind = FEATURE_OPS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(
            f'There is no feature operation {name!r}. Known: '
            f'{sorted(FEATURE_OPS.module_dict)}; register others in '
            'era_mm.methods.sokd.FEATURE_OPS.'
        )
    return kind(**config)
