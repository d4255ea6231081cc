"""IE-KD: Inheritance and Exploration (arXiv 2107.00181), and IE-DML.

In reading order: ``parts`` (the split of the channels, coders and the
teacher's auto-encoder), ``losses`` (the bounded distances and their signs),
``distiller`` (all of it put together, with the variants IE-FT, IE-AT and
IE-OD). IE-DML is the same distiller in both halves of
``era_mm.MutualDistillation``.
"""

from .distiller import IEKDDistiller
from .losses import IELoss, attention_map, margin_relu, unit
from .parts import ChannelSplit, FactorAutoEncoder, FactorCoder

__all__ = [
    'ChannelSplit',
    'FactorAutoEncoder',
    'FactorCoder',
    'IEKDDistiller',
    'IELoss',
    'attention_map',
    'margin_relu',
    'unit',
]
