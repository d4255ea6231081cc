"""What is measured on a teacher in the first batches of a run."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn


class Measured(ABC):
    """A module with buffers that are measured on the teacher.

    Source: ours.
    """

    @abstractmethod
    def reset(self) -> None:
        """Forget what was measured, to measure it again."""


class FirstBatches(Measured, nn.Module):
    """Counts the batches that something is measured on; saved and resumed.

    Source: ours.

    Args:
        number: Number of batches.

    Raises:
        ValueError: Less than 1.
    """

    def __init__(self, number: int = 20) -> None:
        super().__init__()
        if number < 1:
            raise ValueError(
                f'`num_batches` must be at least 1, but got {number}.'
            )
        self.number = number
        self.register_buffer('seen', torch.zeros((), dtype=torch.long))
        # Kept on the host, so that a step need not synchronise with the GPU.
        self._is_over = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_over = False

    def reset(self) -> None:
        """Begin to count again."""
        self.seen.zero_()
        self._is_over = False

    def take(self) -> bool:
        """Count a batch; False after the last."""
        if not self._is_over:
            self._is_over = int(self.seen) >= self.number
        if not self._is_over:
            self.seen += 1
        return not self._is_over
