"""TrunkToBranchDistiller: taps, peers and losses, put together."""

from typing import Any

import torch
from mmengine.logging import MessageHub
from torch import Tensor, nn

from ...core import BaseDistiller, Features
from ...registry import MODELS
from .heads import ClassifierPeers, DensePeers
from .losses import MEASURES, ramp_factor
from .stages import stage_names

TAP_MODES = ('concat', 'per_branch')
KINDS = ('conv1x1', 'linear')


@MODELS.register_module()
class TrunkToBranchDistiller(BaseDistiller):
    """Trunk-to-Branch (T2B): online distillation from one-layer peers.

        F_cat  = concat_l(BN_l(pool(f_l)))           the tapped stages
        e_k    = GAP(ReLU(BN(W_k F_cat))),  z_k = Linear_k(e_k)   k = 1 .. K
        L_peer = sum_k CE(z_k, y)
        L_dec  = mean squared correlation between the e_k
        L = L_trunk + peer_weight * L_peer + decorrelation_weight * L_dec
            + w(t) * (ensemble_weight * L_ensemble + branch_weight * L_branch)

    There is no teacher. The peers see the trunk's stages with their graph,
    so their losses train those stages directly (semantic permeation); what
    the peers know together goes back to the trunk's head through L_ensemble,
    or through L_branch from each of them. w(t) is ONE's ramp. L_ensemble and
    L_branch: see ``ClassifierPeers`` and, for detectors, ``DensePeers``.

    After training the peers are gone: the trunk is the plain model.

    Source: "Trunk-to-Branch: Lightweight Multi-Sub Distillation with
    High-Order Feature Semantics", thesis, Ajou University, of which only
    abstract and contents are public, without code. [paper]: no teacher,
    one-layer peers, concatenated stages aligned by back-propagation, a
    decorrelation loss, branch-wise and ensemble distillation, no peers at
    inference. Every formula, number and default is [inference] unless marked
    as a relative's; detectors are [ours].

    Args:
        source: Modules whose outputs are tapped, from shallow to deep, as
            'backbone' with several ``out_indices``. None: the last
            ``num_taps`` stages of the backbone; see ``stage_names``.
        num_taps: The branching point: how many of the last stages the peers
            tap. None: 2. 1 is no permeation (the last stage only); in a
            detector, where the peers see the pyramid as well, that is 0. Only
            without ``source``.
        num_peers: K. 3 is ONE's. 0: a plain run.
        kind: The one layer: 'conv1x1' on maps, or 'linear' on pooled
            features, the one for backbones that output vectors.
        embed_channels: Numbers of an embedding. None: the channels of the
            last tap; of the pyramid in a detector.
        tap_mode: 'concat': every peer sees all taps. 'per_branch': peer k
            sees tap k modulo their number. The abstract does not say which.
        detach: Cut the graph between stages and peers, for ablations: the
            trunk then learns from the distillation alone.
        peer_weight: Weight of L_peer.
        ensemble_weight: Weight of L_ensemble. 1 is ONE's.
        branch_weight: Weight of L_branch. Both forms may be on.
        decorrelation_weight: Weight of L_dec.
        measure: Of L_dec: 'correlation' over the batch of all ranks, or
            'cosine' within each sample, for tiny batches.
        decorrelate_trunk: Whether L_dec reaches the trunk; if not, the
            branches' layers alone come apart.
        temperature: T. None: 3 in a classifier (ONE, OKDDip), 1 in a
            detector.
        ramp: Share of the run after which w(t) is 1. 0.27 are ONE's 80 of
            300 epochs. Outside an mmengine run w is 1.
        topk: Places per image that are distilled in a detector. None: 100.
        schedules: Of the terms; see ``BaseDistiller``.
        init_cfg: As in mmengine.

    Raises:
        ValueError: Unknown settings, stages that are not known, heads
            without softmax scores or sigmoid scores per level, a batch of
            one under 'correlation'.
    """

    needs_teacher = False

    def __init__(
        self,
        source: str | list | dict | None = None,
        num_taps: int | None = None,
        num_peers: int = 3,
        kind: str = 'conv1x1',
        embed_channels: int | None = None,
        tap_mode: str = 'concat',
        detach: bool = False,
        peer_weight: float = 1.0,
        ensemble_weight: float = 1.0,
        branch_weight: float = 0.0,
        decorrelation_weight: float = 1.0,
        measure: str = 'correlation',
        decorrelate_trunk: bool = True,
        temperature: float | None = None,
        ramp: float = 0.27,
        topk: int | None = None,
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(
            source=[] if source is None else source,
            schedules=schedules,
            init_cfg=init_cfg,
        )
        for name, value, known in (
            ('kind', kind, KINDS),
            ('tap_mode', tap_mode, TAP_MODES),
            ('measure', measure, tuple(MEASURES)),
        ):
            if value not in known:
                raise ValueError(
                    f'`{name}` must be one of {known}, but got {value!r}.'
                )
        if num_peers < 0 or not 0 <= ramp <= 1:
            raise ValueError(
                '`num_peers` must not be negative and `ramp` is a share of '
                f'the run, 0 to 1, but got num_peers={num_peers} and '
                f'ramp={ramp}.'
            )
        if source is not None and num_taps is not None:
            raise ValueError(
                '`num_taps` counts the last stages of the backbone, so it '
                f'has no meaning beside source={source!r}. Name only the '
                'taps that you want, and leave `num_taps` out.'
            )
        self.num_taps = 2 if num_taps is None else num_taps
        self.num_peers = num_peers
        self.decorrelate_trunk = decorrelate_trunk
        self.measure = measure
        self.peer_weight = peer_weight
        self.decorrelation_weight = decorrelation_weight
        self.distil_weights = {
            'ensemble': ensemble_weight,
            'branch': branch_weight,
        }
        self.temperature = temperature
        self.ramp = ramp
        self._topk = topk
        self._branches = dict(
            num_peers=num_peers,
            tap_mode=tap_mode,
            kind=kind,
            embed_channels=embed_channels,
            detach=detach,
        )
        self._taps = self.student_sources if source is not None else None
        self.peers: ClassifierPeers | DensePeers | None = None

    # -- the trunk ---------------------------------------------------------

    @staticmethod
    def _form(student: nn.Module) -> type[ClassifierPeers] | type[DensePeers]:
        """How the branches go with the student's head."""
        dense = getattr(student, 'bbox_head', None)
        if hasattr(dense, 'loss_by_feat') and not hasattr(student, 'roi_head'):
            if hasattr(student, 'neck'):
                return DensePeers
        elif hasattr(getattr(student, 'head', None), 'loss_module'):
            return ClassifierPeers
        raise ValueError(
            'Trunk-to-Branch knows classifiers with a `head` and its '
            '`loss_module`, and one-stage detectors with a `neck` and a dense '
            f'`bbox_head`, but the student is a {type(student).__name__} with '
            f'{", ".join(name for name, _ in student.named_children())}.'
        )

    def choose_sources(
        self, *, student: nn.Module, teacher: nn.Module | None
    ) -> None:
        """Tap the last stages; record what the trunk's head outputs."""
        if not self.num_peers:
            self.student_sources = ()
            return
        form = self._form(student)
        if self._taps is None:
            names = stage_names(student.backbone)
            least = 0 if form is DensePeers else 1
            if not least <= self.num_taps <= len(names):
                raise ValueError(
                    f'`num_taps` must be {least} to {len(names)}, the stages '
                    f'{names} of the backbone, but got {self.num_taps}.'
                )
            begin = len(names) - self.num_taps
            self._taps = tuple(f'backbone.{name}' for name in names[begin:])
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
        if not self.num_peers:
            return
        form = self._form(student)
        settings: dict[str, Any] = dict(self._branches)
        if form is DensePeers:
            head = student.bbox_head
            settings |= {} if self._topk is None else dict(topk=self._topk)
        else:
            head = student.head
            if self._topk is not None:
                raise ValueError(
                    '`topk` counts places in the image, so it is for '
                    'detectors; the student is a classifier. Leave it out.'
                )
        if self.temperature is None:
            self.temperature = 1.0 if form is DensePeers else 3.0
        assert self._taps is not None
        self.peers = form(student_feats, head, self._taps, **settings)

    # -- losses ------------------------------------------------------------

    def loss_weights(self) -> dict[str, float]:
        """Of the branches' terms; the distillation's before the ramp."""
        if self.peers is None:
            return {}
        weights = {
            'peers': self.peer_weight,
            **self.distil_weights,
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
        return (
            1.0 if total is None else ramp_factor(self.step, self.ramp * total)
        )

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_t2b_peers``, and the other terms whose weight is not 0.

        They are ``loss_t2b_ensemble``, ``loss_t2b_branch`` and
        ``loss_t2b_decorrelation``. Logged beside them:

        - ``t2b_correlation``: root of L_dec, without weight, in every run.
        - ``t2b_embed_std``: standard deviation of the embeddings over the
          rank's samples, mean over peers; near 0 they have collapsed.
        - ``t2b_ramp``: w(t).
        - ``t2b_top1_trunk``, ``t2b_top1_peers`` (their mean),
          ``t2b_top1_ensemble`` on the batch, in per cent; in a detector
          ``t2b_score_trunk`` and ``t2b_score_ensemble``, the mean highest
          score at the distilled places.
        """
        if self.peers is None:
            return {}
        peers = self.peers
        # Per peer; a detector's per level too.
        embeddings: Any = peers.embed(student_feats)
        logits: Any = peers.classify(embeddings)
        losses = {
            'loss_t2b_peers': self.peer_weight
            * peers.supervise(logits, student_feats, data_samples)
        }
        ramp = self.ramp_now()
        if any(self.distil_weights.values()):
            assert self.temperature is not None
            terms = peers.distil(logits, student_feats, self.temperature)
            losses |= {
                f'loss_t2b_{name}': weight * ramp * terms[name]
                for name, weight in self.distil_weights.items()
                if weight
            }
        if self.decorrelation_weight and not self.decorrelate_trunk:
            embeddings = peers.embed(student_feats, detach=True)
        samples = peers.samples(embeddings)
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and self.decorrelation_weight != 0
        ):
            squared = MEASURES[self.measure](samples)
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
