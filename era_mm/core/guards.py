"""Checks for losses and parameters that would silently not train."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def learns(loss: Any) -> bool:
    """Whether a loss, a tensor or a list of them, has a gradient."""
    parts = loss if isinstance(loss, (list, tuple)) else [loss]
    return any(part.requires_grad for part in parts)


def check_graph(student_feats: Mapping[str, tuple[Tensor, ...]]) -> None:
    """Refuse sources whose features carry no gradient to the student.

    Args:
        student_feats: The student's features in a training step, by source.

    Raises:
        RuntimeError: The features of a source have no gradient.
    """
    for source, feats in student_feats.items():
        if not learns(feats):
            raise RuntimeError(
                f"The student's output at {source!r} has no gradient, so "
                'distilling it would train nothing. It lies in a frozen '
                'stage (`frozen_stages`) or inside a part under '
                'activation checkpointing (`with_cp`, '
                '`activation_checkpointing`): choose another source, or '
                'turn that off.'
            )


class GradientWatch:
    """Notes which trainable extras get a gradient in the first step.

    It uses hooks on the tensors, because mmengine has cleared ``grad`` when
    the next step begins. A copy of the model shares the extras, and so this
    watch.

    Args:
        extras: The module whose trainable parameters are watched.
    """

    def __init__(self, extras: nn.Module) -> None:
        #: Names of the parameters that got no gradient yet.
        self.unreached: dict[str, str] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._steps = 0
        for name, parameter in extras.named_parameters():
            if parameter.requires_grad:
                self.unreached[name] = f'distillers.{name}'
                self._handles.append(
                    parameter.register_hook(self._marker(name))
                )

    def __deepcopy__(self, memo: dict) -> 'GradientWatch':
        return self

    def _marker(self, name: str) -> Callable[[Tensor], None]:
        def mark(gradient: Tensor) -> None:
            self.unreached.pop(name, None)

        return mark

    def check(self) -> None:
        """Called at the start of each training step; checks in the second.

        Raises:
            RuntimeError: Extras without a gradient in the step before.
        """
        if self._steps > 1:
            return
        self._steps += 1
        if self._steps == 1:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.unreached:
            names = list(self.unreached.values())
            raise RuntimeError(
                f'{len(names)} trainable extras got no gradient in the first '
                f'step: {", ".join(names[:4])}'
                + (', ...' if len(names) > 4 else '')
                + '. Every parameter of a distiller must take part '
                'in its loss; build only what is used.'
            )
