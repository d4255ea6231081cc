"""The search: the policy's own step in each iteration, first or second order.

Legend: F_t teacher's and F_s student's feature, F_t' the refined teacher's
feature, Phi(F_s) the student's feature in the teacher's space.
"""

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import MessageHub, print_log
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn

from ...core import BaseDistiller, Features, Unregistered
from ...core.rerun import Rerun
from ...core.utils import preserve_rng, take_step
from ...layers import full_precision, levels_of
from .adapters import Adapters, below
from .dafa import DAFA, consistency_loss
from .wrapper import WrappingDistiller

#: The policy's optimiser. [DADA code] except for its weight decay of 1e-3: one
#: sub-policy is drawn per step, and the others get no gradient from the loss.
#: Adam scales any gradient up to the learning rate, so the decay would move
#: them. [ours]
POLICY_OPTIMIZER = dict(type='Adam', lr=3e-4, betas=(0.5, 0.999))

#: Gates and magnitudes start at 0.5 and end between 0 and 1. A search that can
#: move them by less than this is reported.
SHORT_SEARCH = 0.25


def unrolled_gradients(
    *,
    upper: Callable[[Mapping[str, Tensor]], Tensor],
    lower: Callable[[Mapping[str, Tensor]], Tensor],
    weights: Mapping[str, Tensor],
    policy: Sequence[Tensor],
    lr: float,
    radius: float = 0.01,
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of the policy through one step of the weights.

        theta' = theta - lr * d lower(theta, chi) / d theta
        v      = d upper(theta', chi) / d theta'
        h      = radius / ||v||
        g      = d upper(theta', chi) / d chi
                 - lr * [d lower(theta + h v) / d chi
                         - d lower(theta - h v) / d chi] / (2 h)

    theta are ``weights``, chi is ``policy``, which both functions use in
    addition to their arguments.

    Source: DARTS, arXiv 1806.09055; the radius 0.01 is theirs and [DADA
    code]'s.

    Args:
        upper: The policy's loss, as a function of the weights.
        lower: The loss of the weights, as a function of the weights.
        weights: theta; leaves without history.
        policy: chi.
        lr: Length of the step.
        radius: See above.

    Returns:
        ``upper`` at theta', and the gradients.
    """

    def leaves(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.detach().requires_grad_() for k, v in values.items()}

    def moved(direction: Mapping[str, Tensor], step: float):
        return leaves({k: v + step * direction[k] for k, v in weights.items()})

    def gradients(loss: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(loss, of, allow_unused=True)
        return [
            torch.zeros_like(value) if g is None else g
            for value, g in zip(of, found, strict=True)
        ]

    start = leaves(weights)
    slope = gradients(lower(start), list(start.values()))
    ahead = moved(dict(zip(start, slope, strict=True)), -lr)
    loss = upper(ahead)
    found = gradients(loss, [*ahead.values(), *policy])
    direction = dict(zip(ahead, found[: len(ahead)], strict=True))
    result = found[len(ahead) :]
    norm = torch.stack([v.norm() for v in direction.values()]).norm()
    # Also at v = 0 the passes are made: other ranks wait for them.
    h = float(radius / norm.clamp(min=1e-12))
    sides = [
        gradients(lower(moved(direction, step)), policy) for step in (h, -h)
    ]
    for index, (plus, minus) in enumerate(zip(*sides, strict=True)):
        result[index] = result[index] - lr * (plus - minus) / (2 * h)
    return loss.detach(), result


def total(losses: Mapping[str, Any]) -> Tensor:
    """The total of a model's losses, as in mmengine."""
    parts = [
        part.mean()
        for key, value in losses.items()
        if 'loss' in key
        for part in (value if isinstance(value, (list, tuple)) else [value])
    ]
    return torch.stack(parts).sum()


class Optimizers:
    """The optimisers of policy and wrapped distiller, saved as one.

    Args:
        optimizers: Optimisers by name.
    """

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def state_dict(self) -> dict[str, dict]:
        """Each optimiser's own."""
        return {k: v.state_dict() for k, v in self.optimizers.items()}

    def load_state_dict(self, state: Mapping[str, dict]) -> None:
        """Load the state of each optimiser."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


class SearchingDistiller(WrappingDistiller):
    """Refines the teacher's features by a policy, and trains the policy.

    A subclass sets ``adapters`` and the policy in ``prepare``, and defines
    :meth:`_terms`.

    Args:
        base: The wrapped distiller.
        search_share: See ``SoKDDistiller``.
        optimizer: Likewise.
        unroll_lr: Likewise.
        schedules: See ``BaseDistiller``.
        init_cfg: As in mmengine.
    """

    def __init__(
        self,
        base: BaseDistiller,
        search_share: float,
        optimizer: dict | None,
        unroll_lr: float | None,
        schedules: dict[str, dict] | None,
        init_cfg: dict | None,
    ) -> None:
        super().__init__(base, schedules, init_cfg)
        if not 0 < search_share <= 1:
            raise ValueError(
                '`search_share` is a share of the run, above 0 and up to 1, '
                f'but got {search_share}. To use no policy, set dafa=False.'
            )
        if unroll_lr is not None and (unroll_lr <= 0 or base.has_phases):
            raise ValueError(
                '`unroll_lr` must be above 0, and the wrapped distiller must '
                f'have no phases, but got {unroll_lr} with '
                f'{type(base).__name__}. Use None for first order.'
            )
        self.search_share = search_share
        self.unroll_lr = unroll_lr
        self._optimizer_cfg = optimizer or POLICY_OPTIMIZER
        self._policy: Unregistered | None = None
        self.adapters: Adapters | None = None

    def _levels(
        self, student_feats: Features, teacher_feats: Features
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Corresponding features of student and teacher."""
        own, theirs = zip(*self.feature_pairs, strict=True)
        return levels_of(student_feats, own), levels_of(teacher_feats, theirs)

    def _adapt(
        self,
        feats: list[Tensor],
        weights: Mapping[str, Tensor] | None = None,
    ) -> list[Tensor]:
        if self.adapters is None:
            return feats
        return self.adapters(feats, weights)

    @abstractmethod
    def _terms(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        refined_feats: Features,
        data_samples: list,
        adapter_weights: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """All losses but the student's own.

        Args:
            student_feats: F_s by source.
            teacher_feats: F_t by source.
            refined_feats: F_t' by source.
            data_samples: Ground truth.
            adapter_weights: See ``Adapters``.
        """

    @property
    def policy(self) -> DAFA | None:
        """The policy; None if the teacher's features are not changed."""
        if self._policy is None:
            return None
        assert isinstance(self._policy.module, DAFA)
        return self._policy.module

    def set_up_inner(self) -> None:
        """Build the wrapped distiller's inner module and the policy's."""
        self.base.set_up_inner()
        super().set_up_inner()

    def build_inner(
        self,
    ) -> tuple[nn.Module, torch.optim.Optimizer] | None:
        """The policy, and the wrapped distiller's inner module."""
        modules: dict[str, nn.Module] = {}
        optimizers: dict[str, torch.optim.Optimizer] = {}
        if self.base.inner is not None:
            assert self.base.inner_optimizer is not None
            modules['base'] = self.base.inner
            optimizers['base'] = self.base.inner_optimizer
        if self.policy is not None:
            modules['policy'] = self.policy
            optimizers['policy'] = OPTIMIZERS.build(
                dict(
                    self._optimizer_cfg, params=list(self.policy.parameters())
                )
            )
        if not modules:
            return None
        # An optimiser as far as the core uses one.
        both: Any = Optimizers(optimizers)
        return nn.ModuleDict(modules), both

    @property
    def is_searching(self) -> bool:
        """Whether the policy is trained at ``self.step``."""
        if self.policy is None or self.step < self.pretrain_iters:
            return False
        length = self._search_length()
        return length is None or self.step < self.pretrain_iters + length

    def _search_length(self) -> float | None:
        """Iterations of the search; None outside a run."""
        iters = MessageHub.get_current_instance().get_info('max_iters')
        if iters is None:
            return None
        return self.search_share * (iters - self.pretrain_iters)

    def _warn_of_a_short_search(
        self, optimizer: torch.optim.Optimizer
    ) -> None:
        """Adam moves a parameter by at most about its rate in a step."""
        length = self._search_length()
        if length is None or not isinstance(optimizer, torch.optim.Adam):
            return
        rate = optimizer.param_groups[0]['lr']
        if rate * length >= SHORT_SEARCH:
            return
        print_log(
            f'The search of SoKD has {math.ceil(length)} iterations, in which '
            f'Adam with lr={rate:g} moves gates and magnitudes by at most '
            f'about {rate * length:.2g}: the policy will be nearly the one of '
            f"the start. Set a higher rate, e.g. optimizer=dict(type='Adam', "
            f'lr={1 / length:.1g}, betas=(0.5, 0.999)), or a longer '
            '`search_share`.',
            logger='current',
            level=logging.WARNING,
        )

    def _refine(self, teacher_feats: Features) -> Features:
        """F_t' with this step's sample, by source."""
        if self.policy is None:
            return teacher_feats
        flat = levels_of(teacher_feats, self.teacher_sources)
        refined = iter(self.policy(flat, self.step))
        return {
            source: tuple(next(refined) for _ in teacher_feats[source])
            for source in self.teacher_sources
        }

    @staticmethod
    def _consistency(maps: list[Tensor], refined: list[Tensor]) -> Tensor:
        terms = [
            consistency_loss(student_feat=s, refined_feat=t)
            for s, t in zip(maps, refined, strict=True)
        ]
        return torch.stack(terms).mean()

    def inner_loss(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> Tensor:
        """L_aug, the mean over levels; the student is a constant."""
        maps, refined = self._levels(
            student_feats, self._refine(teacher_feats)
        )
        with torch.no_grad():
            maps = self._adapt([feat.detach() for feat in maps])
        return self._consistency(maps, refined)

    def inner_step(
        self,
        *,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
        rerun: Rerun | None = None,
    ) -> Tensor:
        """The wrapped distiller's inner step, then the policy's.

        The former sees the teacher's own features, as in its pre-training.
        """
        batch: dict[str, Any] = dict(
            student_feats=student_feats,
            teacher_feats=teacher_feats,
            data_samples=data_samples,
        )
        base, losses = self.base, []
        # In pre-training the step has not been set yet: it is 0.
        if base.inner is not None and (
            self.step < self.pretrain_iters or not base.freeze_inner
        ):
            losses.append(base.inner_step(**batch, rerun=rerun))
        if self.is_searching:
            losses.append(self._search(**batch, rerun=rerun))
        return torch.stack(losses).sum() if losses else torch.zeros(())

    def _search(self, *, rerun: Rerun | None, **batch: Any) -> Tensor:
        assert self.policy is not None
        assert isinstance(self.inner_optimizer, Optimizers)
        optimizer = self.inner_optimizer.optimizers['policy']
        if self.step == self.pretrain_iters:
            self._warn_of_a_short_search(optimizer)
        parameters = list(self.policy.parameters())
        # The gradients of a mean over a map are tiny: in half precision they
        # would become 0.
        batch['teacher_feats'] = {
            source: tuple(full_precision(feat) for feat in feats)
            for source, feats in batch['teacher_feats'].items()
        }
        with torch.enable_grad():
            if self.unroll_lr is None:
                loss = self.inner_loss(**batch)
                gradients = list(torch.autograd.grad(loss, parameters))
            else:
                loss, gradients = self._unrolled(
                    parameters, rerun=rerun, **batch
                )
        take_step(optimizer, parameters, gradients)
        self.policy.project()
        return loss.detach()

    def _unrolled(
        self,
        policy: list[nn.Parameter],
        *,
        rerun: Rerun | None,
        student_feats: Features,
        teacher_feats: Features,
        data_samples: list,
    ) -> tuple[Tensor, list[Tensor]]:
        """Second order: looks one step of student and adapters ahead."""
        assert rerun is not None
        modules: dict[str, nn.Module] = {'student': rerun.student}
        if self.adapters is not None:
            modules['adapters'] = self.adapters
        weights = {
            f'{owner}.{name}': parameter.detach()
            for owner, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

        def upper(values: Mapping[str, Tensor]) -> Tensor:
            _, feats = rerun(below('student', values))
            maps, refined = self._levels(feats, self._refine(teacher_feats))
            adapted = self._adapt(maps, below('adapters', values))
            return self._consistency(adapted, refined)

        def lower(values: Mapping[str, Tensor]) -> Tensor:
            losses, feats = rerun(below('student', values))
            terms = self._terms(
                student_feats=feats,
                teacher_feats=teacher_feats,
                refined_feats=self._refine(teacher_feats),
                data_samples=data_samples,
                adapter_weights=below('adapters', values),
            )
            return total(losses) + total(self.scheduled(terms, self.step))

        buffers = {k: v.clone() for k, v in self.named_buffers()}
        with preserve_rng():
            found = unrolled_gradients(
                upper=upper,
                lower=lower,
                weights=weights,
                policy=policy,
                lr=self.unroll_lr or 0.0,
            )
        # Norms of connectors have counted passes that are not part of the run,
        # and so has `FirstBatches`, which notes only what is loaded.
        self.load_state_dict(buffers, strict=False)
        return found
