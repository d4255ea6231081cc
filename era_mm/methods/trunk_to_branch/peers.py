"""Semantic permeation, and branches of one layer.

Legend: N batch, C channels of the tapped stages together, D numbers of an
embedding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d

#: Initial bias of sigmoid scores: a probability of 0.01, RetinaNet's.
PRIOR_BIAS = -4.595119850134589


class SemanticPermeation(nn.Module):
    """Brings the tapped stages to one scale, to be concatenated.

        g_l = BN_l(AdaptiveAvgPool(f_l)),     F_cat = concat_c(g_l)

    The grid is the last tap's. The features keep their graph: a loss of any
    branch reaches each tapped stage through one layer, so early stages learn
    what the classes need.

    Source: Trunk-to-Branch [paper]: feature concatenation and alignment by
    back-propagation. Pooling, norm and no further alignment loss are
    [inference].

    Args:
        channels: One value per tap.

    Shape:
        - in: ``(N, C_l, H_l, W_l)`` per tap
        - out: ``(N, C_l, H, W)`` per tap
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(number) for number in channels
        )

    def forward(
        self, taps: Sequence[Tensor], resize: bool = True
    ) -> list[Tensor]:
        """The taps, normalised; on the last one's grid if ``resize``."""
        grid = taps[-1].shape[2:] if taps and resize else None
        found = []
        for tap, norm in zip(taps, self.norms, strict=True):
            if grid is not None and tap.shape[2:] != grid:
                tap = adaptive_avg_pool2d(tap, (grid[0], grid[1]))
            found.append(norm(tap))
        return found


def _draw(layer: nn.Module) -> None:
    # Drawn in turn, so that every peer has a different matrix.
    nn.init.orthogonal_(layer.weight)


class PeerBranch(nn.Module):
    """A branch of a classifier: one layer and a linear classifier.

        e = GAP(ReLU(BN(W F_cat))),   z = Linear(e)

    W is a 1x1 convolution.

    Source: Trunk-to-Branch [paper]: one lightweight layer. Which one is
    [inference]; the orthogonal start is Angular-KD's.

    Args:
        in_channels: C.
        embed_channels: D.
        num_classes: Of the trunk's head.

    Shape:
        - in: ``(N, C, H, W)``
        - embedding: ``(N, D)``
        - logits: ``(N, classes)``
    """

    def __init__(
        self, in_channels: int, embed_channels: int, num_classes: int
    ) -> None:
        super().__init__()
        self.layer = nn.Conv2d(in_channels, embed_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(embed_channels)
        self.act = nn.ReLU(inplace=True)
        self.classifier = nn.Linear(embed_channels, num_classes)
        _draw(self.layer)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def embed(self, feat: Tensor) -> Tensor:
        """The embedding e."""
        return self.act(self.norm(self.layer(feat))).mean(dim=(2, 3))


class DensePeerBranch(nn.Module):
    """A branch of a dense detector, shared by the levels of its pyramid.

        F_cat^l = concat_c(g_P(P_l), Resize_l(g_t(f_t)) for t in taps)
        e^l = ReLU(BN(W F_cat^l)),   z^l = Conv1x1(e^l)

    P_l is the input of the trunk's head at level l. W is a 1x1 convolution,
    so it commutes with resizing: it runs once on each tap, at the tap's own
    size, and its output is resized and added. The result equals that of the
    concatenation, which would be as large as the finest level. BN uses each
    level's statistics.

    Source: ours.

    Args:
        in_channels: Of the pyramid, then of the taps.
        embed_channels: D.
        num_outputs: Anchors times classes.

    Shape:
        - in: ``(N, C_P, H_l, W_l)`` per level, ``(N, C_t, H_t, W_t)`` per tap
        - embedding: ``(N, D, H_l, W_l)`` per level
        - logits: ``(N, A * classes, H_l, W_l)`` per level
    """

    def __init__(
        self, in_channels: Sequence[int], embed_channels: int, num_outputs: int
    ) -> None:
        super().__init__()
        self.in_channels = list(in_channels)
        self.layer = nn.Conv2d(sum(in_channels), embed_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(embed_channels)
        self.act = nn.ReLU(inplace=True)
        self.classifier = nn.Conv2d(embed_channels, num_outputs, 1)
        _draw(self.layer)
        nn.init.normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.constant_(self.classifier.bias, PRIOR_BIAS)

    def embed(
        self, levels: Sequence[Tensor], taps: Sequence[Tensor]
    ) -> list[Tensor]:
        """The embedding of each level."""
        own, *theirs = self.layer.weight.split(self.in_channels, dim=1)
        parts = [
            conv2d(tap, weight)
            for tap, weight in zip(taps, theirs, strict=True)
        ]
        found = []
        for level in levels:
            height, width = level.shape[2:]
            feat = conv2d(level, own)
            for part in parts:
                feat = feat + adaptive_avg_pool2d(part, (height, width))
            found.append(self.act(self.norm(feat)))
        return found


def joined(feats: Sequence[Tensor]) -> Tensor:
    """F_cat; a single feature as it is."""
    return feats[0] if len(feats) == 1 else torch.cat(list(feats), dim=1)
