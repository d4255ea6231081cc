"""ERA: Expandable Residual Approximation (arXiv 2508.16050).

In reading order: ``mbrnet`` (the residual neck), ``losses`` (decomposition
and weights), ``era_mm.heads`` (which head of the teacher is reused, and how),
``twi_hook`` (the modes reported), ``distiller`` (all of it put together).
"""

from .distiller import ERADistiller
from .losses import ERALoss, estimates_of, residual_targets
from .mbrnet import MBRNet
from .twi_hook import TWIHook

__all__ = [
    'ERADistiller',
    'ERALoss',
    'MBRNet',
    'TWIHook',
    'estimates_of',
    'residual_targets',
]
