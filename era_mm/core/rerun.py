"""Runs the student again on the batch of a step, with other weights."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from .recorder import Recorder
from .utils import preserve_rng


class Rerun:
    """Runs the student again on a step's batch, without side effects.

    The weights are replaced for the call only. Norm statistics, the random
    state and the data samples do not change.

    Args:
        student: The student.
        recorder: Records its sources.
        inputs: The batch.
        data_samples: Its ground truth.
        connect: How the distiller resamples the features.
    """

    def __init__(
        self,
        student: nn.Module,
        recorder: Recorder,
        inputs: Tensor,
        data_samples: list,
        connect: Callable[[dict[str, Any]], Any],
    ) -> None:
        self.student = student
        self._connect = connect
        self._recorder = recorder
        self._batch = (inputs, data_samples)

    def __call__(
        self, parameters: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, tuple[Tensor, ...]]]:
        """The student's own losses, and features by source.

        Args:
            parameters: Weights to use instead of its own, by name; the
                others are used as they are.
        """
        inputs, data_samples = self._batch
        state = {k: v.clone() for k, v in self.student.named_buffers()}
        with preserve_rng(), self._recorder as recorder:
            losses = functional_call(
                self.student,
                state | dict(parameters),
                (inputs, copy.deepcopy(data_samples)),
                {'mode': 'loss'},
            )
        return dict(losses), self._connect(recorder.pop())
