"""The branches of a classifier, and those of a dense detector.

Both have the same methods, so the distiller need not know which it has.

Legend: N batch, D numbers of an embedding, R places of a pyramid with their
anchors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...core import Features, Unregistered
from ...heads import is_trained_by_sigmoid
from ...layers import (
    bernoulli_kl_loss,
    kl_loss,
    rows_of_levels,
    top_rows,
)
from .peers import DensePeerBranch, PeerBranch, SemanticPermeation, joined
from .stages import as_feature


class _Peers(nn.Module):
    """The branches, and the taps that they see."""

    #: The trunk's sources that are recorded beside the taps.
    SOURCES: tuple[str, ...]
    branches: nn.ModuleList

    def __init__(self, tap_sources: Sequence[str]) -> None:
        super().__init__()
        self.tap_sources = tuple(tap_sources)

    def taps(self, feats: Features) -> list[Tensor]:
        """The tapped maps, from the first stage to the last.

        Raises:
            ValueError: A tap is not a map.
        """
        found = [
            as_feature(feat, source=source)
            for source in self.tap_sources
            for feat in feats[source]
        ]
        if any(tap.dim() != 4 for tap in found):
            raise ValueError(
                f'The taps must be maps (N, C, H, W), but {self.tap_sources} '
                f'output {[tuple(tap.shape) for tap in found]}. Name stages '
                'that output maps, or let the backbone do so (ConvNeXt: '
                'gap_before_final_norm=False).'
            )
        return found


class ClassifierPeers(_Peers):
    """Branches of a classifier.

        L_peer     = sum_k CE(z_k, y)
        L_ensemble = T^2 KL(softmax(mean_k z_k / T) || softmax(z_0 / T))

    with T = 3 and the target of the KL detached. CE is the loss of the
    trunk's own head, so label smoothing, class weights and the soft labels of
    mixup and cutmix are the trunk's.

    Source: Trunk-to-Branch [paper: peers, distillation of their ensemble]; the
    formulas are [inference], after ONE and OKDDip, whose T is 3.

    Args:
        feats: Of a dry run.
        head: The trunk's.
        tap_sources: Where the taps are recorded.
        num_peers: K. The embeddings have the last tap's channels.

    Raises:
        ValueError: A head without softmax scores, taps that are no maps.
    """

    SOURCES = ('head',)
    #: T of the distillation.
    TEMPERATURE = 3.0

    def __init__(
        self,
        feats: Features,
        head: nn.Module,
        tap_sources: Sequence[str],
        num_peers: int,
    ) -> None:
        super().__init__(tap_sources)
        self._check_head(head, feats['head'])
        self._head = Unregistered(head)
        channels = [tap.shape[1] for tap in self.taps(feats)]
        self.permeation = SemanticPermeation(channels)
        self.branches = nn.ModuleList(
            PeerBranch(sum(channels), channels[-1], feats['head'][-1].shape[1])
            for _ in range(num_peers)
        )

    @staticmethod
    def _check_head(head: nn.Module, scores: tuple[Tensor, ...]) -> None:
        loss = getattr(head, 'loss_module', None)
        if (
            loss is None
            or is_trained_by_sigmoid(head)
            or scores[-1].dim() != 2
        ):
            raise ValueError(
                'Trunk-to-Branch needs a classification head with one softmax '
                'over the classes and its loss in `loss_module`, but the '
                f'student has {type(head).__name__} with '
                f'{type(loss).__name__} and scores '
                f'{tuple(scores[-1].shape)}. Use LinearClsHead with '
                'CrossEntropyLoss or LabelSmoothLoss.'
            )

    def embed(self, feats: Features) -> list[Tensor]:
        """One embedding ``(N, D)`` per peer."""
        joint = joined(self.permeation(self.taps(feats)))
        return [branch.embed(joint) for branch in self.branches]

    def classify(self, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """One ``(N, classes)`` of logits per peer."""
        return [
            branch.classifier(embedding)
            for branch, embedding in zip(
                self.branches, embeddings, strict=True
            )
        ]

    def samples(self, embeddings: Sequence[Tensor]) -> list[Tensor]:
        """What is decorrelated: the embeddings."""
        return list(embeddings)

    @staticmethod
    def _labels(data_samples: list) -> Tensor:
        # As mmpretrain's ClsHead: batch augmentation leaves scores.
        if 'gt_score' in data_samples[0]:
            return torch.stack([sample.gt_score for sample in data_samples])
        return torch.cat([sample.gt_label for sample in data_samples])

    def supervise(
        self, logits: Sequence[Tensor], feats: Features, data_samples: list
    ) -> Tensor:
        """L_peer."""
        labels = self._labels(data_samples)
        loss = self._head.module.loss_module
        return torch.stack(
            [loss(scores, labels, avg_factor=len(scores)) for scores in logits]
        ).sum()

    def distil(self, logits: Sequence[Tensor], feats: Features) -> Tensor:
        """L_ensemble."""
        peers = torch.stack([scores.detach().float() for scores in logits])
        return kl_loss(
            student_logits=feats['head'][-1].float(),
            teacher_logits=peers.mean(dim=0),
            temperature=self.TEMPERATURE,
        )

    @torch.no_grad()
    def measure(
        self, logits: Sequence[Tensor], feats: Features, data_samples: list
    ) -> dict[str, Tensor]:
        """Top-1 in per cent on the batch: trunk, mean of the peers, all."""
        labels = self._labels(data_samples)
        if labels.dim() == 2:
            labels = labels.argmax(dim=1)

        def top1(scores: Tensor) -> Tensor:
            return 100 * (scores.argmax(dim=1) == labels).float().mean()

        peers = torch.stack(list(logits))
        return {
            't2b_top1_trunk': top1(feats['head'][-1]),
            't2b_top1_peers': torch.stack([top1(z) for z in peers]).mean(),
            't2b_top1_ensemble': top1(peers.mean(dim=0)),
        }


class DensePeers(_Peers):
    """Branches of a dense detector, on every level of its pyramid.

        q          = mean_k sigmoid(z_k)
        L_peer     = sum_k loss_cls(z_k)    of the trunk's head
        L_ensemble = KL(q || sigmoid(z_0))

    The KL is summed over classes and averaged over the 100 places of each
    image with the highest q; the target is detached. The rest is mostly
    background, on which all agree. The classification loss is that of the
    trunk's head, with its assigner; an assigner that needs boxes gets the
    trunk's, detached. Every place of every level is one sample of the
    decorrelation.

    Source: ours; Trunk-to-Branch is about classification alone.

    Args:
        feats: Of a dry run.
        head: The trunk's.
        tap_sources: Where the taps are recorded.
        num_peers: K. The embeddings have the pyramid's channels.

    Raises:
        ValueError: A head that does not score each level of the neck by
            sigmoid, taps that are no maps.
    """

    SOURCES = ('neck', 'bbox_head')
    #: Places per image that are distilled.
    TOPK = 100

    def __init__(
        self,
        feats: Features,
        head: nn.Module,
        tap_sources: Sequence[str],
        num_peers: int,
    ) -> None:
        super().__init__(tap_sources)
        self._head = Unregistered(head)
        self._check_head(head, feats)
        self.topk = self.TOPK
        channels = [tap.shape[1] for tap in self.taps(feats)]
        width = feats['neck'][0].shape[1]
        self.permeation = SemanticPermeation(channels)
        self.level_permeation = SemanticPermeation([width])
        self.branches = nn.ModuleList(
            DensePeerBranch(
                [width, *channels], width, feats['bbox_head'][0].shape[1]
            )
            for _ in range(num_peers)
        )

    @staticmethod
    def _check_head(head: nn.Module, feats: Features) -> None:
        levels, outs = feats['neck'], feats['bbox_head']
        scores = outs[: len(levels)]
        if (
            not getattr(getattr(head, 'loss_cls', None), 'use_sigmoid', False)
            or len(outs) % len(levels)
            or any(
                s.shape[2:] != level.shape[2:] or s.shape[1] % head.num_classes
                for s, level in zip(scores, levels, strict=True)
            )
        ):
            raise ValueError(
                'Trunk-to-Branch needs a dense head that scores each level of '
                f'the neck by sigmoid, but {type(head).__name__} outputs '
                f'{[tuple(out.shape) for out in outs]} for '
                f'{[tuple(level.shape) for level in levels]}. RetinaNet, '
                'FCOS, ATSS and GFL have such heads.'
            )

    def embed(self, feats: Features) -> list[list[Tensor]]:
        """The embedding of every level, per peer."""
        taps = self.permeation(self.taps(feats), resize=False)
        levels = [self.level_permeation([f])[0] for f in feats['neck']]
        return [branch.embed(levels, taps) for branch in self.branches]

    def classify(
        self, embeddings: Sequence[Sequence[Tensor]]
    ) -> list[list[Tensor]]:
        """The logits of every level, per peer."""
        return [
            [branch.classifier(feat) for feat in levels]
            for branch, levels in zip(self.branches, embeddings, strict=True)
        ]

    def samples(self, embeddings: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """What is decorrelated: each place of each level, ``(N', D)``."""
        return [
            torch.cat([feat.permute(0, 2, 3, 1).flatten(0, 2) for feat in own])
            for own in embeddings
        ]

    def supervise(
        self,
        logits: Sequence[Sequence[Tensor]],
        feats: Features,
        data_samples: list,
    ) -> Tensor:
        """L_peer."""
        # Here and not above: a classifier needs nothing of mmdet's models,
        # which take seconds to import.
        from mmdet.models.utils import unpack_gt_instances

        outs, num_levels = feats['bbox_head'], len(feats['neck'])
        # Boxes, centre-ness and what else the head outputs, by level.
        others = [
            [out.detach() for out in outs[start : start + num_levels]]
            for start in range(num_levels, len(outs), num_levels)
        ]
        instances, ignored, metas = unpack_gt_instances(data_samples)
        losses: list[Tensor] = []
        for scores in logits:
            found = self._head.module.loss_by_feat(
                list(scores), *others, instances, metas, ignored
            )['loss_cls']
            losses += found if isinstance(found, (list, tuple)) else [found]
        return torch.stack([loss.sum() for loss in losses]).sum()

    def _rows(self, scores: Sequence[Tensor]) -> Tensor:
        """Logits of all levels, ``(N, R, classes)``."""
        return rows_of_levels(scores, self._head.module.num_classes).float()

    def _top(
        self,
        logits: Sequence[Sequence[Tensor]],
        feats: Features,
    ) -> tuple[Tensor, Tensor]:
        """The trunk's logits and the peers' scores where those are highest.

        Shape:
            - trunk: ``(N * topk, classes)``
            - peers: ``(K, N * topk, classes)``
        """
        trunk = self._rows(feats['bbox_head'][: len(feats['neck'])])
        peers = torch.stack(
            [self._rows(scores).detach().sigmoid() for scores in logits]
        )
        rows, index = top_rows(peers.mean(dim=0), self.topk)
        return trunk[rows, index].flatten(0, 1), peers[:, rows, index].flatten(
            1, 2
        )

    def distil(
        self, logits: Sequence[Sequence[Tensor]], feats: Features
    ) -> Tensor:
        """L_ensemble."""
        trunk, peers = self._top(logits, feats)
        return bernoulli_kl_loss(
            student_logits=trunk, target=peers.mean(dim=0)
        )

    @torch.no_grad()
    def measure(
        self,
        logits: Sequence[Sequence[Tensor]],
        feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """Mean highest score at the distilled places: trunk, mean of peers."""
        trunk, peers = self._top(logits, feats)
        return {
            't2b_score_trunk': trunk.sigmoid().amax(dim=1).mean(),
            't2b_score_ensemble': peers.mean(dim=0).amax(dim=1).mean(),
        }
