"""SoKD: Student-Oriented Knowledge Distillation (arXiv 2409.18785).

In reading order: ``ops`` (operations on features), ``dafa`` (the policy that
chooses them), ``areas`` (decoded areas and targets of the heads), ``dam``
(the heads and the losses on areas), ``adapters``, ``wrapper`` (forwards
another distiller's interface), ``search`` (the policy's step), ``distiller``
(everything around another distiller), ``policy_hook`` (logs the policy).
"""

from .areas import (
    AreaDecoder,
    Areas,
    Prediction,
    attention_targets,
    box_targets,
)
from .dafa import DAFA, consistency_loss
from .dam import DAM, DAMHead, agreement_loss, area_loss
from .distiller import SoKDDistiller
from .ops import FEATURE_OPS, FeatureOp, straight_through
from .policy_hook import PolicyHook
from .search import unrolled_gradients

__all__ = [
    'DAFA',
    'DAM',
    'FEATURE_OPS',
    'AreaDecoder',
    'Areas',
    'DAMHead',
    'FeatureOp',
    'PolicyHook',
    'Prediction',
    'SoKDDistiller',
    'agreement_loss',
    'area_loss',
    'attention_targets',
    'box_targets',
    'consistency_loss',
    'straight_through',
    'unrolled_gradients',
]
