"""Small parts that several methods use; they import nothing of ours."""

from .logits import dist_loss, kl_loss

__all__ = ['dist_loss', 'kl_loss']
