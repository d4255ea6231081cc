"""Small parts that several methods use; they import nothing of ours."""

from .connector import Connector, crop_to_common
from .logits import (
    bernoulli_kl_loss,
    dist_loss,
    kl_loss,
    rows_of_levels,
    top_rows,
)

__all__ = [
    'Connector',
    'bernoulli_kl_loss',
    'crop_to_common',
    'dist_loss',
    'kl_loss',
    'rows_of_levels',
    'top_rows',
]
