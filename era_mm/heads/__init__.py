"""The teacher's head: applied to features, and distilled into the student's.

In reading order: ``twi`` (which head of a model can be reused), ``twi_heads``
and ``two_stage`` (how it is reused), ``twi_blend`` (its outputs blended with
the student's), ``logit``, ``dense_term`` and ``roi_term`` (losses between
the outputs of the student's head and the teacher's; ``detector_term`` is the
base of the last two), ``choice`` (which of these fits a pair).
"""

from .choice import kind_for, term_for
from .dense_term import DenseTerm, why_no_sigmoid_scores
from .detector_term import DetectorTerm, Said
from .logit import LogitTerm, is_trained_by_sigmoid
from .roi_term import RoITerm
from .twi import (
    find_head,
    plain_towers,
    predictors_of,
    tower_sources,
    why_not_comparable,
    why_not_reused,
    with_loss_of,
)
from .twi_heads import DenseTWIHead, PredictorTWIHead, TWIHead
from .two_stage import StudentProposals, TwoStageTWIHead

__all__ = [
    'DenseTWIHead',
    'DenseTerm',
    'DetectorTerm',
    'LogitTerm',
    'PredictorTWIHead',
    'RoITerm',
    'Said',
    'StudentProposals',
    'TWIHead',
    'TwoStageTWIHead',
    'find_head',
    'is_trained_by_sigmoid',
    'kind_for',
    'plain_towers',
    'predictors_of',
    'term_for',
    'tower_sources',
    'why_no_sigmoid_scores',
    'why_not_comparable',
    'why_not_reused',
    'with_loss_of',
]
