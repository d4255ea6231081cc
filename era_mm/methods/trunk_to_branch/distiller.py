"""TrunkToBranchDistiller: taps, peers and losses, put together."""

from typing import Any, ClassVar

import torch
from mmengine.logging import MessageHub
from torch import Tensor, nn

from ...core import BaseDistiller, Features
from ...registry import MODELS
from .heads import ClassifierPeers, DensePeers
from .losses import mean_squared_correlation, ramp_factor
from .stages import stage_names

#: The branching point: how many of the last stages the peers tap.
NUM_TAPS = 2
#: K. ONE's.
NUM_PEERS = 3
#: Share of the run after which w(t) is 1: ONE's 80 of 300 epochs.
RAMP = 0.27


@MODELS.register_module()
class TrunkToBranchDistiller(BaseDistiller):
    """Trunk-to-Branch (T2B): online distillation from one-layer peers.

        F_cat  = concat_l(BN_l(pool(f_l)))           the tapped stages
        e_k    = GAP(ReLU(BN(W_k F_cat))),  z_k = Linear_k(e_k)   k = 1 .. K
        L_peer = sum_k CE(z_k, y)
        L_dec  = mean squared correlation between the e_k
        L = L_trunk + peer_weight * L_peer + decorrelation_weight * L_dec
            + w(t) * ensemble_weight * L_ensemble

    There is no teacher. The K = 3 peers see the trunk's last two stages with
    their graph, so their losses train those stages directly (semantic
    permeation); L_ensemble distils their ensemble into the trunk's head.
    w(t) is ONE's ramp, over the first 0.27 of the run; outside an mmengine
    run it is 1. L_ensemble: see ``ClassifierPeers`` and,
    for detectors, ``DensePeers``.

    The peers are needed only in training: the trunk is the plain model.

    Source: "Trunk-to-Branch: Lightweight Multi-Sub Distillation with
    High-Order Feature Semantics", thesis, Ajou University, of which only
    abstract and contents are public, without code. [paper]: no teacher,
    one-layer peers, concatenated stages aligned by back-propagation, a
    decorrelation loss, distillation of the ensemble, no peers at
    inference. Every formula, number and default is [inference] unless marked
    as a relative's; detectors are [ours].

    Args:
        source: Modules whose outputs are tapped, from shallow to deep, as
            'backbone' with several ``out_indices``. None: the last two stages
            of the backbone; see ``stage_names``.
        peer_weight: Weight of L_peer.
        ensemble_weight: Weight of L_ensemble. 1 is ONE's.
        decorrelation_weight: Weight of L_dec.
        schedules: Of the terms; see ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Stages that are not known or output no maps, heads
            without softmax scores or sigmoid scores per level, a batch of
            one.
    """

    #: Removed options, and what applies instead.
    CUT: ClassVar[dict[str, str]] = {
        'num_taps': 'the last two stages are tapped; `source` names others',
        'num_peers': 'there are 3 peers',
        'kind': 'peers are 1x1 convolutions',
        'embed_channels': 'embeddings have the channels of the last tap, in '
        'a detector of the pyramid',
        'tap_mode': 'every peer sees all taps',
        'detach': 'the peers train the stages that they tap',
        'branch_weight': 'the ensemble of the peers is distilled',
        'measure': 'the decorrelation is the correlation over the batch',
        'decorrelate_trunk': 'the decorrelation reaches the trunk',
        'temperature': 'it is 3 in a classifier, 1 in a detector',
        'ramp': 'it is 0.27 of the run',
        'topk': 'it is 100 places per image',
    }
    needs_teacher = False

    def __init__(
        self,
        source: str | list | dict | None = None,
        peer_weight: float = 1.0,
        ensemble_weight: float = 1.0,
        decorrelation_weight: float = 1.0,
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(
            source=[] if source is None else source,
            schedules=schedules,
            init_cfg=init_cfg,
        )
        self.peer_weight = peer_weight
        self.ensemble_weight = ensemble_weight
        self.decorrelation_weight = decorrelation_weight
        self._taps = self.student_sources if source is not None else None
        self.peers: ClassifierPeers | DensePeers | None = None

    # -- the trunk ---------------------------------------------------------

    @staticmethod
    def _form(student: nn.Module) -> type[ClassifierPeers] | type[DensePeers]:
        """The kind of branches that fits the student's head."""
        dense = getattr(student, 'bbox_head', None)
        if hasattr(dense, 'loss_by_feat') and not hasattr(student, 'roi_head'):
            if hasattr(student, 'neck'):
                return DensePeers
        elif hasattr(getattr(student, 'head', None), 'loss_module'):
            return ClassifierPeers
        raise ValueError(
            'Trunk-to-Branch supports classifiers with a `head` and its '
            '`loss_module`, and one-stage detectors with a `neck` and a dense '
            f'`bbox_head`, but the student is a {type(student).__name__} with '
            f'{", ".join(name for name, _ in student.named_children())}.'
        )

    def choose_sources(
        self, *, student: nn.Module, teacher: nn.Module | None
    ) -> None:
        """Tap the last stages; record what the trunk's head outputs."""
        form = self._form(student)
        if self._taps is None:
            names = stage_names(student.backbone)[-NUM_TAPS:]
            self._taps = tuple(f'backbone.{name}' for name in names)
        self.student_sources = tuple(
            dict.fromkeys((*self._taps, *form.SOURCES))
        )

    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Build the branches for the trunk's channels and classes."""
        form = self._form(student)
        head = student.bbox_head if form is DensePeers else student.head
        assert self._taps is not None
        self.peers = form(student_feats, head, self._taps, NUM_PEERS)

    # -- losses ------------------------------------------------------------

    def loss_weights(self) -> dict[str, float]:
        """Weights of the terms; that of L_ensemble before the ramp."""
        weights = {
            'peers': self.peer_weight,
            'ensemble': self.ensemble_weight,
            'decorrelation': self.decorrelation_weight,
        }
        return {
            f'loss_t2b_{name}': weight
            for name, weight in weights.items()
            if weight or name == 'peers'
        }

    def ramp_now(self) -> float:
        """w(t) at ``self.step``."""
        # RuntimeInfoHook writes it at the start of every run.
        total = MessageHub.get_current_instance().get_info('max_iters')
        return 1.0 if total is None else ramp_factor(self.step, RAMP * total)

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_t2b_peers``, and the other terms whose weight is not 0.

        They are ``loss_t2b_ensemble`` and ``loss_t2b_decorrelation``. Logged
        beside them:

        - ``t2b_correlation``: root of L_dec, without weight, in every run.
        - ``t2b_embed_std``: standard deviation of the embeddings over the
          rank's samples, mean over peers; near 0 they have collapsed.
        - ``t2b_ramp``: w(t).
        - ``t2b_top1_trunk``, ``t2b_top1_peers`` (their mean),
          ``t2b_top1_ensemble`` on the batch, in per cent; in a detector
          ``t2b_score_trunk`` and ``t2b_score_ensemble``, the mean highest
          score at the distilled places.
        """
        assert self.peers is not None
        peers = self.peers
        # Per peer; a detector's per level too.
        embeddings: Any = peers.embed(student_feats)
        logits: Any = peers.classify(embeddings)
        losses = {
            'loss_t2b_peers': self.peer_weight
            * peers.supervise(logits, student_feats, data_samples)
        }
        ramp = self.ramp_now()
        if self.ensemble_weight:
            losses['loss_t2b_ensemble'] = (
                self.ensemble_weight
                * ramp
                * peers.distil(logits, student_feats)
            )
        samples = peers.samples(embeddings)
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and self.decorrelation_weight != 0
        ):
            squared = mean_squared_correlation(samples)
        if self.decorrelation_weight:
            losses['loss_t2b_decorrelation'] = (
                self.decorrelation_weight * squared
            )
        with torch.no_grad():
            deviations = [
                own.float().std(dim=0, correction=0).mean() for own in samples
            ]
            return losses | {
                't2b_correlation': squared.sqrt(),
                't2b_embed_std': torch.stack(deviations).mean(),
                't2b_ramp': samples[0].new_tensor(ramp),
                **peers.measure(logits, student_feats, data_samples),
            }
