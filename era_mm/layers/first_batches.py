"""What is measured on a teacher in the first batches of a run."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


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

    @property
    def are_over(self) -> bool:
        """Whether all of them were counted."""
        if not self._is_over:
            self._is_over = int(self.seen) >= self.number
        return self._is_over

    def count(self, *measured: Tensor) -> bool:
        """Count a batch, unless it must be left out.

        In half precision a feature may overflow. A loss scaler leaves such a
        step out, but what is measured would not be finite from then on.

        Args:
            measured: What was measured on the batch, reduced over the ranks,
                so that all leave out the same batches.

        Returns:
            Whether all of it is finite.
        """
        is_finite = all(bool(part.isfinite().all()) for part in measured)
        self.seen += int(is_finite)
        return is_finite
