"""Small parts that several methods use; they import nothing of ours."""

from .connector import Connector, crop_to_common
from .logits import dist_loss, kl_loss

__all__ = ['Connector', 'crop_to_common', 'dist_loss', 'kl_loss']
