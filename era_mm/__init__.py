"""Residual-approximation knowledge distillation for OpenMMLab."""

from era_mm.hosts import check_hosts
from era_mm.version import __version__

check_hosts()

__all__ = ['__version__']
