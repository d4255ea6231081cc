"""Small parts that several methods use; they import nothing of ours."""

from .connector import Connector, crop_to_common
from .features import check_alike, full_precision, levels_of
from .logits import (
    Rows,
    bernoulli_entropy,
    bernoulli_kl,
    bernoulli_kl_loss,
    best_rows,
    dist_loss,
    kl_loss,
    rows_of_levels,
    top_rows,
)

__all__ = [
    'Connector',
    'Rows',
    'bernoulli_entropy',
    'bernoulli_kl',
    'bernoulli_kl_loss',
    'best_rows',
    'check_alike',
    'crop_to_common',
    'dist_loss',
    'full_precision',
    'kl_loss',
    'levels_of',
    'rows_of_levels',
    'top_rows',
]
