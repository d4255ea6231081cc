"""What the branches do for a classifier, and for a dense detector.

Both have the same methods, so the distiller need not know which it has.

Legend: N batch, D numbers of an embedding, R places of a pyramid with their
anchors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core import Features, Unregistered
from ...layers import (
    bernoulli_kl_loss,
    kl_loss,
    rows_of_levels,
    top_rows,
)
from .peers import DensePeerBranch, PeerBranch, SemanticPermeation, joined
from .stages import as_feature


class _Peers(nn.Module):
    """The branches, and which taps each of them sees."""

    #: What is recorded of the trunk beside the taps.
    SOURCES: tuple[str, ...]
    branches: nn.ModuleList

    def __init__(
        self, tap_sources: Sequence[str], num_peers: int, tap_mode: str
    ) -> None:
        super().__init__()
        self.tap_sources = tuple(tap_sources)
        self.num_peers = num_peers
        self.tap_mode = tap_mode

    def taps(self, feats: Features, detach: bool = False) -> list[Tensor]:
        """The tapped features, from the first stage to the last."""
        found = [
            as_feature(feat, source=source)
            for source in self.tap_sources
            for feat in feats[source]
        ]
        return [tap.detach() for tap in found] if detach else found

    def _share(self, peer: int, taps: Sequence[Any]) -> list[Any]:
        """What of the taps a peer sees."""
        if self.tap_mode == 'concat' or not taps:
            return list(taps)
        return [taps[peer % len(taps)]]

    def _check_share(self, num_taps: int) -> None:
        if self.tap_mode == 'per_branch' and self.num_peers < num_taps:
            raise ValueError(
                "tap_mode='per_branch' gives each peer one tap, so it needs "
                f'as many peers as taps, but got num_peers={self.num_peers} '
                f'and {num_taps} taps.'
            )


class ClassifierPeers(_Peers):
    """Branches of a classifier.

        L_peer     = sum_k CE(z_k, y)
        L_ensemble = T^2 KL(softmax(mean_k z_k / T) || softmax(z_0 / T))
        L_branch   = mean_k T^2 KL(softmax(z_k / T) || softmax(z_0 / T))

    with the targets of both KLs detached. CE is the loss of the trunk's own
    head, so label smoothing, class weights and the soft labels of mixup and
    cutmix are the trunk's.

    Source: Trunk-to-Branch [paper: peers, ensemble and branch-wise
    distillation]; the formulas are [inference], after ONE and OKDDip.

    Args:
        feats: Of a dry run.
        head: The trunk's.
        tap_sources: Where the taps are recorded.
        num_peers: K.
        tap_mode: 'concat' or 'per_branch'.
        kind: See ``PeerBranch``.
        embed_channels: D. None: the last tap's channels.
        detach: See ``SemanticPermeation``.

    Raises:
        ValueError: A head without softmax scores, taps that are not all maps
            or all vectors, maps asked of vectors.
    """

    SOURCES = ('head',)

    def __init__(
        self,
        feats: Features,
        head: nn.Module,
        tap_sources: Sequence[str],
        num_peers: int,
        tap_mode: str,
        kind: str,
        embed_channels: int | None,
        detach: bool,
    ) -> None:
        super().__init__(tap_sources, num_peers, tap_mode)
        self._check_head(head, feats['head'])
        self._head = Unregistered(head)
        self.kind = kind
        taps = self.taps(feats)
        self._check_taps(taps)
        self._check_share(len(taps))
        channels = [tap.shape[1] for tap in taps]
        width = embed_channels or channels[-1]
        self.permeation = SemanticPermeation(
            channels, is_map=kind != 'linear', detach=detach
        )
        self.branches = nn.ModuleList(
            PeerBranch(
                sum(self._share(k, channels)),
                width,
                feats['head'][-1].shape[1],
                kind,
            )
            for k in range(num_peers)
        )

    @staticmethod
    def _check_head(head: nn.Module, scores: tuple[Tensor, ...]) -> None:
        loss = getattr(head, 'loss_module', None)
        # LabelSmoothLoss keeps its cross-entropy inside.
        sigmoid = any(
            getattr(part, 'use_sigmoid', False)
            for part in (loss, getattr(loss, 'ce', None))
        )
        if loss is None or sigmoid or scores[-1].dim() != 2:
            raise ValueError(
                'Trunk-to-Branch needs a classification head with one softmax '
                'over the classes and its loss in `loss_module`, but the '
                f'student has {type(head).__name__} with '
                f'{type(loss).__name__} and scores '
                f'{tuple(scores[-1].shape)}. Use LinearClsHead with '
                'CrossEntropyLoss or LabelSmoothLoss.'
            )

    def _check_taps(self, taps: Sequence[Tensor]) -> None:
        shapes = [tuple(tap.shape) for tap in taps]
        if len({len(shape) for shape in shapes}) > 1:
            raise ValueError(
                'The taps must be maps (N, C, H, W) or all of them vectors '
                f'(N, C), but {self.tap_sources} output {shapes}.'
            )
        if self.kind != 'linear' and len(shapes[0]) == 2:
            raise ValueError(
                f'kind={self.kind!r} convolves maps (N, C, H, W), but '
                f'{self.tap_sources} output vectors {shapes}. Set '
                "kind='linear', or let the backbone output maps (ConvNeXt: "
                'gap_before_final_norm=False).'
            )

    def embed(self, feats: Features, detach: bool = False) -> list[Tensor]:
        """One embedding ``(N, D)`` per peer; without graph to the trunk's."""
        taps = self.taps(feats)
        if self.kind == 'linear':
            taps = [
                tap.mean(dim=(2, 3)) if tap.dim() == 4 else tap for tap in taps
            ]
        normed = self.permeation(taps)
        if detach:
            normed = [feat.detach() for feat in normed]
        return [
            branch.embed(joined(self._share(k, normed)))
            for k, branch in enumerate(self.branches)
        ]

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

    def distil(
        self, logits: Sequence[Tensor], feats: Features, temperature: float
    ) -> dict[str, Tensor]:
        """L_ensemble and L_branch."""
        trunk = feats['head'][-1].float()
        peers = torch.stack([scores.detach().float() for scores in logits])

        def divergence(target: Tensor) -> Tensor:
            return kl_loss(
                student_logits=trunk,
                teacher_logits=target,
                temperature=temperature,
            )

        return {
            'ensemble': divergence(peers.mean(dim=0)),
            'branch': torch.stack([divergence(z) for z in peers]).mean(),
        }

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

        q_k        = sigmoid(z_k / T),      q = mean_k q_k
        L_peer     = sum_k loss_cls(z_k)    of the trunk's head
        L_ensemble = T^2 KL(q || sigmoid(z_0 / T))
        L_branch   = mean_k T^2 KL(q_k || sigmoid(z_0 / T))

    The KLs are summed over classes and averaged over the ``topk`` places of
    each image with the highest q, targets detached: what an image mostly has
    is background, on which all agree. The classification loss is computed by
    the trunk's head, with its assigner; where that looks at boxes, at the
    trunk's, detached. Every place of every level is one sample of the
    decorrelation.

    Source: ours; Trunk-to-Branch is about classification alone.

    Args:
        feats: Of a dry run.
        head: The trunk's.
        tap_sources: Where the taps are recorded.
        num_peers: K.
        tap_mode: 'concat' or 'per_branch'.
        kind: 'conv1x1'.
        embed_channels: D. None: the pyramid's channels.
        detach: See ``SemanticPermeation``; holds for the pyramid too.
        topk: Places per image.

    Raises:
        ValueError: Another ``kind``; a head that does not score each level
            of the neck by sigmoid.
    """

    SOURCES = ('neck', 'bbox_head')

    def __init__(
        self,
        feats: Features,
        head: nn.Module,
        tap_sources: Sequence[str],
        num_peers: int,
        tap_mode: str,
        kind: str,
        embed_channels: int | None,
        detach: bool,
        topk: int = 100,
    ) -> None:
        super().__init__(tap_sources, num_peers, tap_mode)
        if kind != 'conv1x1':
            raise ValueError(
                f"A detector's peers are 1x1 convolutions, but kind={kind!r}. "
                'Leave it out.'
            )
        self._head = Unregistered(head)
        self._check_head(head, feats)
        self.topk = topk
        taps = self.taps(feats)
        if any(tap.dim() != 4 for tap in taps):
            raise ValueError(
                "A detector's taps must be maps (N, C, H, W), but "
                f'{self.tap_sources} output '
                f'{[tuple(tap.shape) for tap in taps]}.'
            )
        self._check_share(len(taps))
        channels = [tap.shape[1] for tap in taps]
        level = feats['neck'][0]
        self.permeation = SemanticPermeation(channels, True, detach)
        self.level_permeation = SemanticPermeation(
            [level.shape[1]], True, detach
        )
        self.branches = nn.ModuleList(
            DensePeerBranch(
                [level.shape[1], *self._share(k, channels)],
                embed_channels or level.shape[1],
                feats['bbox_head'][0].shape[1],
            )
            for k in range(num_peers)
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

    def embed(
        self, feats: Features, detach: bool = False
    ) -> list[list[Tensor]]:
        """The embedding of every level, per peer."""
        taps = self.permeation(self.taps(feats), resize=False)
        levels = [self.level_permeation([f])[0] for f in feats['neck']]
        if detach:
            taps = [feat.detach() for feat in taps]
            levels = [feat.detach() for feat in levels]
        return [
            branch.embed(levels, self._share(k, taps))
            for k, branch in enumerate(self.branches)
        ]

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
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """The trunk's logits and the peers' scores where those are highest.

        Shape:
            - trunk: ``(N * topk, classes)``
            - peers: ``(K, N * topk, classes)``
        """
        trunk = self._rows(feats['bbox_head'][: len(feats['neck'])])
        peers = torch.stack(
            [
                (self._rows(scores).detach() / temperature).sigmoid()
                for scores in logits
            ]
        )
        rows, index = top_rows(peers.mean(dim=0), self.topk)
        return trunk[rows, index].flatten(0, 1), peers[:, rows, index].flatten(
            1, 2
        )

    def distil(
        self,
        logits: Sequence[Sequence[Tensor]],
        feats: Features,
        temperature: float,
    ) -> dict[str, Tensor]:
        """L_ensemble and L_branch."""
        trunk, peers = self._top(logits, feats, temperature)

        def divergence(target: Tensor) -> Tensor:
            return bernoulli_kl_loss(
                student_logits=trunk, target=target, temperature=temperature
            )

        return {
            'ensemble': divergence(peers.mean(dim=0)),
            'branch': torch.stack([divergence(q) for q in peers]).mean(),
        }

    @torch.no_grad()
    def measure(
        self,
        logits: Sequence[Sequence[Tensor]],
        feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """Mean highest score at the distilled places: trunk, mean of peers."""
        trunk, peers = self._top(logits, feats, 1.0)
        return {
            't2b_score_trunk': trunk.sigmoid().amax(dim=1).mean(),
            't2b_score_ensemble': peers.mean(dim=0).amax(dim=1).mean(),
        }
