"""Residual KD: student and assistant (arXiv 2002.09168).

In reading order: ``losses``, ``pair`` (what is deployed),
``pair_config`` (from a given model to the pair), ``split`` (within the given
model's cost), ``distiller`` (the losses and phases).

"RKD" is left out of names: it usually means Relational KD.
"""

from .distiller import ResidualKDDistiller
from .losses import assistant_loss, student_loss
from .pair import FeatureAssistant, ImageAssistant, ResidualPair
from .pair_config import pair_config
from .split import Split, split_by_flops

__all__ = [
    'FeatureAssistant',
    'ImageAssistant',
    'ResidualKDDistiller',
    'ResidualPair',
    'Split',
    'assistant_loss',
    'pair_config',
    'split_by_flops',
    'student_loss',
]
