"""ResidualKDDistiller: the pair's losses and the phases of its training."""

import logging
from collections.abc import Mapping, Sequence

import torch
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from torch import Tensor, nn

from ...core import BaseDistiller, Features, MeasuredPair, Phase, Plan
from ...layers import check_alike
from ...registry import MODELS
from .losses import assistant_loss, student_loss
from .pair_config import PRETRAINING, pair_config

#: Modules of the pair, as the student model names them.
STUDENT = ('backbone.student', 'backbone.adapter')
ASSISTANT = 'backbone.assistant'
#: Where the stages of both are, for further cuts.
STAGES = ('backbone.student.backbone', 'backbone.assistant.extractor.backbone')
PHASES = ('student', 'assistant', 'head', 'joint')


def phase_at(phases: Mapping[str, int | None], step: int) -> str:
    """Name of the phase at a global step.

    Args:
        phases: Length of each in iterations, in order; None: to the end.
        step: The iteration.
    """
    end = 0
    for name, length in phases.items():
        end += length or 0
        if length is None or step < end:
            return name
    raise AssertionError(f'no phase at {step} in {phases}')


def _weighted(loss: Tensor, weight: float) -> Tensor:
    # No graph at 0, so that a phase that trains nothing is noticed.
    return weight * loss if weight else torch.zeros_like(loss)


def _through(layer: nn.Module, feat: Tensor) -> Tensor:
    """Apply a layer; it is frozen if the module before it is."""
    out = layer(feat)
    return out if feat.requires_grad else out.detach()


def _to_channels(feat: Tensor, channels: int) -> nn.Module:
    """A 1x1 convolution without bias; a linear layer for vectors."""
    if feat.dim() == 2:
        return nn.Linear(feat.shape[1], channels, bias=False)
    return nn.Conv2d(feat.shape[1], channels, 1, bias=False)


@MODELS.register_module()
class ResidualKDDistiller(BaseDistiller):
    """Residual KD: the student mimics, an assistant learns what is missing.

        L_S = mean((F_T - F_S)^2),   D = sg(F_T - F_S)
        L_A = mean((D - F_A)^2),     F_int = F_S + F_A
        L = L_task(F_int) + student_weight * L_S + assistant_weight * L_A

    summed over levels, and over further ``cuts``. The assistant stays: the
    trained model is the pair, a ``ResidualPair`` in the given model, and every
    file holds both.

    Phases, each with its length in iterations, in the order given:

        student     trains the student with L_S and other distillers' terms
        assistant   trains the assistant with L_A
        head        trains what follows the pair with L_task(F_int)
        joint       trains all with L

    What does not train is frozen, its norms included. Without ``phases`` the
    whole run is 'joint', the paper's end-to-end training; ``dict(student=a,
    assistant=b, head=None)`` is the progressive one.

    If the teacher has other channels than the given model, one shared 1x1
    convolution without bias maps F_S and F_A to the teacher's channels. L_S
    trains it, and it is not needed afterwards. At each of the further cuts,
    student and assistant have one such convolution each, trained by L_S and
    L_A of that cut. Nothing is summed there, because the head sees only the
    last cut.

    Source: Residual KD, arXiv 2002.09168, read in abstract and introduction
    only, without official code. [paper]: hidden features, an assistant that
    learns what the student lacks, both cut from one model within its cost.
    The two schemes are [paper, as a third party tells it]. The formulas and
    the rest are [inference], detection and the feature form are [ours].

    Args:
        source: The cut, 'neck' or 'backbone', in the given model and in the
            teacher; see ``BaseDistiller``. The paper's is the last feature
            maps: 'backbone' for a classifier. [inference]
        student: Changes that make the student out of the given model; see
            ``pair_config`` and ``tools/split_model.py``. None: it is the
            given model.
        assistant: ``dict(form='feature', ...)`` or ``dict(form='image',
            ...)``; see ``pair_config``. None: the feature form.
        student_weight: Weight of L_S. 1 is [inference]. 0 where other
            distillers train the student (source 'backbone.adapter').
        assistant_weight: Weight of L_A. 1 is [inference].
        cuts: Further cuts at which the assistant learns the residual; they
            need an assistant in the image form. Names of modules in the
            backbones of the given model and of the teacher, as ['layer1',
            'layer2', 'layer3'], or dict(student=[...], teacher=[...]).
            Features at the end of each stage are from the same author's arXiv
            1812.01819; here [inference].
        phases: Length of each phase in iterations, the last one None. Give
            multiples of the optimiser wrapper's ``accumulative_counts``.
        norm_cfg: Norm of the student's adapter. None: BN.
        teacher: Name of the teacher.
        schedules: See ``BaseDistiller``.
        init_cfg: As in mmengine.

    Shape:
        - features: L of ``(N, C, H, W)`` or ``(N, C)``

    Raises:
        ValueError: Unknown phases or invalid lengths, a pair that does not
            fit the teacher, a convolution that no term trains, further cuts
            without an assistant in the image form; and see ``pair_config``.
    """

    def __init__(
        self,
        source: str | list | dict = 'neck',
        student: dict | None = None,
        assistant: dict | None = None,
        student_weight: float = 1.0,
        assistant_weight: float = 1.0,
        cuts: Sequence[str] | Mapping[str, Sequence[str]] = (),
        phases: Mapping[str, int | None] | None = None,
        norm_cfg: dict | None = None,
        teacher: str = 'teacher',
        schedules: dict[str, dict] | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(source, teacher, schedules, init_cfg)
        if len(self.student_sources) != 1 or len(self.teacher_sources) != 1:
            raise ValueError(
                'ResidualKDDistiller cuts at one source, but got '
                f'{self.student_sources} and {self.teacher_sources}.'
            )
        self.cut = self.student_sources[0]
        self.student_sources = (STUDENT[-1], ASSISTANT)
        self.cuts = self._cuts_of(cuts, (assistant or {}).get('form'))
        for *own, theirs in self.cuts:
            self.student_sources += tuple(own)
            self.teacher_sources += (theirs,)
        if self.cut != 'backbone':
            # The pair outputs the sum in the backbone's place.
            self.moved_sources = {self.cut: 'backbone'}
        self._pair = dict(
            student=student, assistant=assistant, norm_cfg=norm_cfg
        )
        self.student_weight = student_weight
        self.assistant_weight = assistant_weight
        self.phases = dict(phases or {'joint': None})
        self._check_phases()
        self.has_phases = set(self.phases) != {'joint'}
        self._frozen: dict[str, tuple[str, ...]] = {}
        self.connectors: nn.ModuleList | None = None
        self.cut_convs: nn.ModuleList | None = None

    @staticmethod
    def _cuts_of(
        cuts: Sequence[str] | Mapping[str, Sequence[str]], form: str | None
    ) -> list[tuple[str, str, str]]:
        """Sources of student, assistant and teacher at each further cut."""
        both = (
            cuts
            if isinstance(cuts, Mapping)
            else dict(student=cuts, teacher=cuts)
        )
        own, theirs = both.get('student', ()), both.get('teacher', ())
        if len(own) != len(theirs) or set(both) - {'student', 'teacher'}:
            raise ValueError(
                '`cuts` must be a list of names, or dict(student=[...], '
                f'teacher=[...]) with lists of equal length, but got {cuts}.'
            )
        if own and form != 'image':
            raise ValueError(
                f'At the further `cuts` {list(own)} the assistant needs '
                "stages of its own: set assistant=dict(form='image', ...)."
            )
        return [
            (f'{STAGES[0]}.{name}', f'{STAGES[1]}.{name}', f'backbone.{other}')
            for name, other in zip(own, theirs, strict=True)
        ]

    def _check_phases(self) -> None:
        *lengths, last = self.phases.values()
        if (
            not set(self.phases) <= set(PHASES)
            or last is not None
            or any(not isinstance(n, int) or n < 1 for n in lengths)
        ):
            raise ValueError(
                f'`phases` must give phases of {PHASES} their lengths in '
                'iterations, and the last one None (to the end of the run), '
                f'but got {self.phases}. For instance dict(student=1000, '
                'assistant=1000, head=None).'
            )

    @classmethod
    def plan_for(cls, pair: MeasuredPair) -> Plan:
        """The feature form, without resampling.

        Raises:
            ValueError: The levels of the two are not the same.
        """
        match = pair.match()
        if match.resample or match.unused():
            unused = ', '.join(match.unused()) or 'none'
            raise ValueError(
                f'{cls.__name__} adds the features of a whole neck, so both '
                'models must have the same levels and strides. Here these '
                f'have no partner: {unused}; resampling needed: '
                f'{match.resample or "none"}. Choose another teacher or '
                'another method.'
            )
        return Plan(
            dict(type='era_mm.ResidualKDDistiller', **match.config()), match
        )

    @property
    def feature_pairs(self) -> tuple[tuple[str, str], ...]:
        """The student's at the cut and at the further ones."""
        own = (STUDENT[-1], *(student for student, _, _ in self.cuts))
        return tuple(zip(own, self.teacher_sources, strict=True))

    def student_config(self, config: ConfigDict) -> ConfigDict:
        """The given model with the pair in it."""
        pair = pair_config(config, source=self.cut, **self._pair)
        given, student = config.backbone, pair.backbone.student.backbone
        dropped = [k for k in PRETRAINING if k in given and k not in student]
        if dropped:
            print_log(
                'The student of the pair has a backbone of its own, which '
                f'starts from random weights: {", ".join(dropped)} of the '
                'given backbone are left out.',
                logger='current',
                level=logging.WARNING,
            )
        return pair

    def prepare(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module | None,
        student_feats: Features,
        teacher_feats: Features,
    ) -> None:
        """Check the pair against the teacher; build the connectors."""
        maps = student_feats[STUDENT[-1]]
        teacher_maps = teacher_feats[self.teacher_sources[0]]
        self._check_maps(maps, teacher_maps)
        channels = [
            (s.shape[1], t.shape[1])
            for s, t in zip(maps, teacher_maps, strict=True)
        ]
        if any(own != theirs for own, theirs in channels):
            if not self.student_weight:
                raise ValueError(
                    'With student_weight=0 nothing trains the convolution '
                    'from the channels of the pair to those of the teacher '
                    f'{channels}. Give it a weight, or a teacher with the '
                    'same channels at the source.'
                )
            self.connectors = nn.ModuleList(
                _to_channels(own, theirs)
                for own, (_, theirs) in zip(maps, channels, strict=True)
            )
        if self.cuts:
            self._prepare_cuts(student_feats, teacher_feats)
        behind = tuple(
            name
            for name, _ in student.named_children()
            if name not in ('backbone', 'data_preprocessor')
        )
        self._frozen = {
            'student': (ASSISTANT, *behind),
            'assistant': (*STUDENT, *behind),
            'head': ('backbone',),
            'joint': (),
        }

    def _prepare_cuts(
        self, student_feats: Features, teacher_feats: Features
    ) -> None:
        """Build the convolutions of the further cuts."""
        if not (self.student_weight and self.assistant_weight):
            raise ValueError(
                'At the further `cuts` student and assistant have a '
                'convolution each, which their own terms train, but got '
                f'student_weight={self.student_weight} and '
                f'assistant_weight={self.assistant_weight}. Give both a '
                'weight, or leave `cuts` out.'
            )
        convs = []
        for *names, other in self.cuts:
            target = teacher_feats[other][-1]
            for name in names:
                feat = student_feats[name][-1]
                check_alike(
                    [tuple(feat.shape)],
                    [tuple(target.shape)],
                    names=('The pair', 'the teacher'),
                    at=(name, other),
                    advice='Choose `cuts` of one stride.',
                )
                convs.append(_to_channels(feat, target.shape[1]))
        self.cut_convs = nn.ModuleList(convs)

    def _at_cuts(
        self, student_feats: Features, teacher_feats: Features
    ) -> list[dict[str, Tensor]]:
        """F_S, F_A and F_T at each further cut, in the teacher's channels."""
        found = []
        for index, (own, theirs, teacher) in enumerate(self.cuts):
            assert self.cut_convs is not None
            student, assistant = self.cut_convs[2 * index : 2 * index + 2]
            found.append(
                dict(
                    student_feat=_through(student, student_feats[own][-1]),
                    assistant_feat=_through(
                        assistant, student_feats[theirs][-1]
                    ),
                    teacher_feat=teacher_feats[teacher][-1],
                )
            )
        return found

    def _check_maps(
        self, maps: tuple[Tensor, ...], teacher_maps: tuple[Tensor, ...]
    ) -> None:
        own, theirs = (
            [tuple(m.shape) for m in feats] for feats in (maps, teacher_maps)
        )
        check_alike(
            own,
            theirs,
            names=('The student', 'the teacher'),
            at=(self.cut, self.teacher_sources[0]),
            advice='Choose sources of the same levels and strides, and '
            'compare pad_size_divisor of both data_preprocessors.',
        )

    def phase(self) -> Phase:
        """The phase at ``self.step``."""
        name = phase_at(self.phases, self.step)
        return Phase(
            name=name,
            frozen=self._frozen[name],
            task=name in ('head', 'joint'),
        )

    @property
    def min_iters(self) -> int:
        """Where the last phase begins."""
        return sum(length or 0 for length in self.phases.values())

    def loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_residual_kd_student`` and ``loss_residual_kd_assistant``.

        Both are returned in every phase; a term whose modules are frozen is a
        constant. Logged beside them: ``residual_kd_mse_student`` and
        ``residual_kd_mse_pair``, both without weight.
        """
        maps = student_feats[STUDENT[-1]]
        targets = teacher_feats[self.teacher_sources[0]]
        self._check_maps(maps, targets)
        triples = self._at_cuts(student_feats, teacher_feats)
        for level, (student_feat, assistant_feat, teacher_feat) in enumerate(
            zip(maps, student_feats[ASSISTANT], targets, strict=True)
        ):
            if self.connectors is not None:
                connector = self.connectors[level]
                weights = {
                    key: value.detach()
                    for key, value in connector.named_parameters()
                }
                # Frozen together with the student: else the residual would
                # drift while the assistant learns it.
                student_feat = _through(connector, student_feat)
                assistant_feat = torch.func.functional_call(
                    connector, weights, (assistant_feat,)
                )
            triples.append(
                dict(
                    student_feat=student_feat,
                    assistant_feat=assistant_feat,
                    teacher_feat=teacher_feat,
                )
            )
        pair = torch.stack([assistant_loss(**each) for each in triples]).sum()
        for each in triples:
            each.pop('assistant_feat')
        student = torch.stack([student_loss(**each) for each in triples]).sum()
        return {
            'loss_residual_kd_student': _weighted(
                student, self.student_weight
            ),
            'loss_residual_kd_assistant': _weighted(
                pair, self.assistant_weight
            ),
            'residual_kd_mse_student': student.detach(),
            'residual_kd_mse_pair': pair.detach(),
        }

    def loss_weights(self) -> dict[str, float]:
        """Of both terms."""
        return {
            'loss_residual_kd_student': self.student_weight,
            'loss_residual_kd_assistant': self.assistant_weight,
        }
