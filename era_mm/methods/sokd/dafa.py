"""DAFA: a policy that augments the teacher's feature, and its search.

Legend: F_t teacher's and F_s student's feature ``(N, C, H, W)``; S
sub-policies of K operations; alpha ``(S,)`` choice logits, beta ``(S, K)``
apply probabilities, m ``(S, K)`` magnitudes.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...layers import full_precision
from ...registry import explain_unknown_keys
from .ops import FeatureOp, build_op

#: All operations of ``ops.py``. [inference]; masking and noise are [paper].
DEFAULT_OPS = (
    'Identity',
    'ChannelMask',
    'SpatialMask',
    'BlockMask',
    'GaussianNoise',
    'ChannelScale',
    'SpatialSmooth',
    'SampleMix',
)
_EDGE = 1e-3


def consistency_loss(
    *, student_feat: Tensor, refined_feat: Tensor, reduction: str = 'mean'
) -> Tensor:
    """Loss of the policy: distance of the student to the refined feature.

        L_aug = 1/2 * (s(F_t) - F_s)^2

    Source: SoKD, arXiv 2409.18785 [paper, by readers' notes]; the mean is
    [ours].

    Args:
        student_feat: F_s in the teacher's space.
        refined_feat: F_t refined by the policy.
        reduction: 'mean' or 'sum' over all elements.

    Shape:
        - student_feat, refined_feat: ``(N, C, *)``
        - out: scalar
    """
    student, refined = map(full_precision, (student_feat, refined_feat))
    error = (refined - student).square() / 2
    return error.mean() if reduction == 'mean' else error.sum()


class Draw(NamedTuple):
    """A sample of a policy for one step.

    Args:
        weights: Weights of the sub-policies, ``(S,)``.
        gates: Gates of their operations, ``(S, K)``.
        chosen: The only sub-policy with weight 1; None if all are used.
        seed: Seed of the operations at the first level.
    """

    weights: Tensor
    gates: Tensor
    chosen: int | None
    seed: int


@explain_unknown_keys
class DAFA(nn.Module):
    """Differentiable automatic feature augmentation.

        s(F)   = op_K(... op_1(F)),  op_k only if its gate b_k is 1
        out    = sum_s w_s * s(F)
        mixture 'softmax':  w = softmax(alpha)
        mixture 'sample':   w = softmax((alpha + Gumbel noise) / temperature)
        b      = sigmoid((logit(beta) + logistic noise) / temperature)

    With ``hard`` the sampled w is one-hot and b is 0 or 1 in the forward
    pass, with the gradient of the relaxed values: ``hard + soft - sg(soft)``.
    So in 'sample' a single sub-policy changes the feature; without gradients
    only this one is computed. All levels share the sample; the operations
    draw separately at each level.

    All draws depend on the ``seed`` given to :meth:`forward`, and the noise of
    w and b is drawn on the CPU. So the same seed gives the same policy on
    every rank and in a resumed run.

    Sub-policies are all unordered combinations of ``ops_per_policy``
    different operations, as in DADA; with 'Identity' among the operations
    there is also one that does nothing [ours].

    Source: SoKD, arXiv 2409.18785. Choice logits, apply probabilities and
    magnitudes, the softmax mixture, Gumbel-Softmax and relaxed Bernoulli are
    [paper, by readers' notes]; K = 2, chaining and the initial values are
    [DADA code] (arXiv 2003.03780), which the operations and defaults marked
    so follow.

    Args:
        ops: Names of operations, or ``dict(type=...)`` of them.
        ops_per_policy: K. 2 is [DADA code].
        mixture: 'sample' [DADA code] or 'softmax' [paper, by readers' notes],
            which computes all sub-policies in every step.
        temperature: Temperature of both relaxations. 0.5 is [inference]; DADA
            has 0.1.
        hard: Whether forward values are hard.
        init: Initial alpha, beta and m. [DADA code]
        max_magnitude: m stays in [0, max_magnitude]; 0.9 is [inference].

    Shape:
        - each feature: ``(N, C, H, W)``, or ``(N, C)`` as a 1x1 map
        - out: the same

    Raises:
        ValueError: Unknown operations or settings, or no sub-policy.
    """

    MIXTURES = ('sample', 'softmax')

    def __init__(
        self,
        ops: Sequence[str | dict] = DEFAULT_OPS,
        ops_per_policy: int = 2,
        mixture: str = 'sample',
        temperature: float = 0.5,
        hard: bool = True,
        init: tuple[float, float, float] = (1e-3, 0.5, 0.5),
        max_magnitude: float = 0.9,
    ) -> None:
        super().__init__()
        if mixture not in self.MIXTURES:
            raise ValueError(
                f'`dafa.mixture` must be one of {self.MIXTURES}, but got '
                f'{mixture!r}.'
            )
        if temperature <= 0:
            raise ValueError(
                f'`dafa.temperature` must be above 0, but got {temperature}.'
            )
        _, beta, magnitude = init
        if not 0 <= beta <= 1 or not 0 <= magnitude <= max_magnitude < 1:
            raise ValueError(
                '`dafa.init` is (alpha, beta, m) with 0 <= beta <= 1 and 0 <= '
                f'm <= max_magnitude < 1, but got {tuple(init)} with '
                f'max_magnitude={max_magnitude}.'
            )
        built = [build_op(op) for op in ops]
        policies = list(combinations(built, ops_per_policy))
        identity = [op for op in built if op.is_identity][:1]
        if identity and ops_per_policy > 1:
            policies.insert(0, tuple(identity * ops_per_policy))
        if not policies:
            raise ValueError(
                f'`dafa.ops` has {len(built)} operations, too few for '
                f'sub-policies of {ops_per_policy} different ones. Give more, '
                'or a smaller `ops_per_policy`.'
            )
        self.policies: tuple[tuple[FeatureOp, ...], ...] = tuple(policies)
        self.mixture = mixture
        self.temperature = temperature
        self.hard = hard
        self.max_magnitude = max_magnitude
        size = (len(policies), ops_per_policy)
        self.alpha = nn.Parameter(torch.full(size[:1], float(init[0])))
        self.beta = nn.Parameter(torch.full(size, float(beta)))
        self.magnitude = nn.Parameter(torch.full(size, float(magnitude)))

    @property
    def names(self) -> list[str]:
        """Names of the sub-policies, such as 'ChannelMask+SampleMix'."""
        return [
            '+'.join(type(op).__name__ for op in policy if not op.is_identity)
            or 'Identity'
            for policy in self.policies
        ]

    @property
    def is_identity(self) -> bool:
        """Whether no sub-policy changes anything."""
        return all(op.is_identity for policy in self.policies for op in policy)

    @torch.no_grad()
    def project(self) -> None:
        """Clip beta and m to their ranges, after a step."""
        self.beta.clamp_(0, 1)
        self.magnitude.clamp_(0, self.max_magnitude)

    def draw(self, seed: int) -> Draw:
        """Sample choice and gates."""
        generator = torch.Generator().manual_seed(seed)
        choices, ops = self.beta.shape
        # Away from 0 and 1, where the logarithms below are not defined.
        noise = torch.rand(choices, 1 + ops, generator=generator)
        noise = noise.clamp(1e-6, 1 - 1e-6).to(self.alpha.device)
        chosen = None
        if self.mixture == 'softmax':
            weights = self.alpha.softmax(0)
        else:
            gumbel = -(-noise[:, 0].log()).log()
            weights = ((self.alpha + gumbel) / self.temperature).softmax(0)
            if self.hard:
                chosen = int(weights.argmax())
                one_hot = torch.zeros_like(weights)
                one_hot[chosen] = 1
                weights = one_hot + (weights - weights.detach())
        inside = self.beta.detach().clamp(_EDGE, 1 - _EDGE)
        # Only the value is clamped, so that beta keeps its gradient there.
        beta = inside + (self.beta - self.beta.detach())
        logits = beta.logit() + noise[:, 1:].logit()
        gates = (logits / self.temperature).sigmoid()
        if self.hard:
            opened = (noise[:, 1:] > 1 - self.beta).to(gates.dtype)
            gates = opened + (gates - gates.detach())
        # A seed of its own: from `seed` itself the operations would draw the
        # numbers that choice and gates have had, and those of the next level
        # would be the next step's.
        own = int(torch.randint(2**31, (), generator=generator))
        return Draw(weights, gates, chosen, own)

    def apply_policy(
        self,
        feat: Tensor,
        index: int,
        gates: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """s(F) of one sub-policy.

        Args:
            feat: F, ``(N, C, H, W)``.
            index: Which sub-policy.
            gates: All gates, ``(S, K)``.
            generator: Random generator of the operations.
        """
        for k, op in enumerate(self.policies[index]):
            if op.is_identity:
                continue
            gate = gates[index, k]
            changed = op(feat, self.magnitude[index, k], generator)
            feat = gate * changed + (1 - gate) * feat
        return feat

    def _mix(
        self, feat: Tensor, draw: Draw, generator: torch.Generator
    ) -> Tensor:
        if draw.chosen is not None and not torch.is_grad_enabled():
            return self.apply_policy(feat, draw.chosen, draw.gates, generator)
        # The weights add up to 1; in this form what changes nothing leaves F
        # as it is, bit for bit.
        out = feat
        for index, policy in enumerate(self.policies):
            if all(op.is_identity for op in policy):
                continue
            refined = self.apply_policy(feat, index, draw.gates, generator)
            out = out + draw.weights[index] * (refined - feat)
        return out

    def forward(self, feats: Sequence[Tensor], seed: int) -> list[Tensor]:
        """The refined features of the levels."""
        draw = self.draw(seed)
        refined = []
        for level, feat in enumerate(feats):
            generator = torch.Generator(feat.device)
            generator.manual_seed(draw.seed + level)
            # Noise and blends in full precision.
            with torch.autocast(feat.device.type, enabled=False):
                full = full_precision(feat)
                if feat.dim() == 2:
                    out = self._mix(full[..., None, None], draw, generator)
                    out = out[..., 0, 0]
                else:
                    out = self._mix(full, draw, generator)
            refined.append(out.to(feat.dtype))
        return refined

    @torch.no_grad()
    def usage(self) -> dict[str, tuple[float, float]]:
        """Usage of each operation.

            use = sum over s, k with this operation of softmax(alpha)_s beta_sk

        Returns:
            By name of the operation: ``use``, and the mean of m with the same
            weights (0 without use). The identity is not listed; an operation
            may be used twice, so the sum of uses is at most K.
        """
        shares = (self.alpha.softmax(0)[:, None] * self.beta).tolist()
        magnitudes = self.magnitude.tolist()
        found: dict[str, tuple[float, float]] = {}
        for s, policy in enumerate(self.policies):
            for k, op in enumerate(policy):
                if op.is_identity:
                    continue
                use, total = found.get(type(op).__name__, (0.0, 0.0))
                share = shares[s][k]
                found[type(op).__name__] = (
                    use + share,
                    total + share * magnitudes[s][k],
                )
        return {
            name: (use, total / use if use else 0.0)
            for name, (use, total) in found.items()
        }

    @torch.no_grad()
    def summary(self) -> dict[str, Tensor]:
        """Values for the log, as expectations over the choice.

        ``entropy`` of softmax(alpha) in nats, ``gate`` the mean beta and
        ``magnitude`` the mean m of operations other than the identity.
        """
        probabilities = self.alpha.softmax(0)
        used = torch.tensor(
            [[not op.is_identity for op in policy] for policy in self.policies]
        ).to(self.beta)
        share = probabilities[:, None] * used
        total = share.sum().clamp(min=1e-12)
        return {
            'entropy': torch.special.entr(probabilities).sum(),
            'gate': (share * self.beta).sum() / total,
            'magnitude': (share * self.magnitude).sum() / total,
        }
