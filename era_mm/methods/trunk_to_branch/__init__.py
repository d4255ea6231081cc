"""Trunk-to-Branch (T2B): a trunk taught by one-layer branches of its own.

In reading order: ``stages`` (where branches may begin), ``peers`` (semantic
permeation and the branches), ``losses`` (decorrelation, distillation and the
ramp), ``heads`` (what classifiers and dense detectors do differently),
``distiller`` (all of it put together).
"""

from .distiller import TrunkToBranchDistiller
from .heads import ClassifierPeers, DensePeers
from .losses import mean_squared_correlation, ramp_factor
from .peers import DensePeerBranch, PeerBranch, SemanticPermeation
from .stages import stage_names

__all__ = [
    'ClassifierPeers',
    'DensePeerBranch',
    'DensePeers',
    'PeerBranch',
    'SemanticPermeation',
    'TrunkToBranchDistiller',
    'mean_squared_correlation',
    'ramp_factor',
    'stage_names',
]
