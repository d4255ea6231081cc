"""Phases of a run in which parts of the student are frozen."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from .utils import evaluating


@dataclass(frozen=True)
class Phase:
    """What is frozen in a phase of the run.

    Args:
        name: For messages.
        frozen: Dotted names of the student's modules that are frozen. They
            are in eval mode, so norms keep their statistics.
        task: Whether the student's own losses are used. Without them the
            student runs only as deep as the deepest source.
    """

    name: str = ''
    frozen: tuple[str, ...] = ()
    task: bool = True

    @classmethod
    def together(cls, phases: Iterable['Phase']) -> 'Phase':
        """Join the phases of several distillers: all that any freezes."""
        phases = list(phases)
        return cls(
            name='+'.join(phase.name for phase in phases),
            frozen=tuple(name for phase in phases for name in phase.frozen),
            task=all(phase.task for phase in phases),
        )


@contextlib.contextmanager
def resting(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Leave modules out of the autograd graph of a forward pass.

    Their gradients stay None, and optimisers skip such parameters, weight
    decay and momentum included.

    Args:
        model: The student.
        names: Dotted names of its modules.
    """
    modules = [model.get_submodule(name) for name in names]
    parameters = [
        parameter
        for module in modules
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(evaluating(module))
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
