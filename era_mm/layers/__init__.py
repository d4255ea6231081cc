"""Small parts that several methods use; they import nothing of ours."""

from .features import check_alike, full_precision, levels_of
from .first_batches import FirstBatches, Measured
from .former_names import FormerNames, with_present_names
from .levels import Aligns, check_maps
from .logits import (
    Rows,
    bernoulli_entropy,
    bernoulli_kl,
    bernoulli_kl_loss,
    best_rows,
    dist_loss,
    dkd_loss,
    kl_loss,
    rows_of_levels,
    standardise_logits,
    top_rows,
)
from .lone_values import spare_lone_values
from .resampler import Resampler, crop_to_common
from .settled import settled

__all__ = [
    'Aligns',
    'FirstBatches',
    'FormerNames',
    'Measured',
    'Resampler',
    'Rows',
    'bernoulli_entropy',
    'bernoulli_kl',
    'bernoulli_kl_loss',
    'best_rows',
    'check_alike',
    'check_maps',
    'crop_to_common',
    'dist_loss',
    'dkd_loss',
    'full_precision',
    'kl_loss',
    'levels_of',
    'rows_of_levels',
    'settled',
    'spare_lone_values',
    'standardise_logits',
    'top_rows',
    'with_present_names',
]
