"""Records the outputs of modules while a model runs.

Legend: a *source* is a dotted module name, ``neck`` or ``backbone.layer3``.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn


def find_module(model: nn.Module, source: str, *, owner: str) -> nn.Module:
    """Look up a source in a model.

    Args:
        model: The student or the teacher.
        source: Dotted module name.
        owner: What messages call the model: 'student' or 'teacher'.

    Raises:
        ValueError: No such module; the message shows the nearest names.
    """
    modules = dict(model.named_modules())
    if source in modules and source:
        return modules[source]
    names = [name for name in modules if name]
    near = difflib.get_close_matches(source, names, n=4, cutoff=0.4)
    near = near or [name for name in names if '.' not in name]
    raise ValueError(
        f'Source {source!r} is not a module of the {owner} '
        f'({type(model).__name__}). Nearest names: {", ".join(near)}. '
        'All names: [name for name, _ in model.named_modules()].'
    )


def as_tuple(output: Any, *, source: str) -> tuple[Tensor, ...]:
    """A module's output as distillers get it: a tuple of tensors.

    The output of a dense head, a tuple of lists by level, is flattened: the
    scores of all levels, then the boxes of all levels, and so on.
    """
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, (list, tuple)):
        return tuple(
            feat for item in output for feat in as_tuple(item, source=source)
        )
    raise ValueError(
        f'Source {source!r} must output a tensor, or tuples or lists of '
        f'tensors, but gave {type(output).__name__}. Choose a module whose '
        'output is a feature, for example neck.'
    )


class Recorder:
    """Records the outputs of some modules of one model.

    It records only inside its ``with`` block. So a copy of the model made
    outside (EMA) has no hooks, and what activation checkpointing computes
    again in the backward pass is not recorded twice. If a module is called
    several times, such as a head that the levels share, the outputs of all
    calls are recorded in order.

    Args:
        model: The student or the teacher.
        sources: Dotted module names.
        owner: What messages call the model.
    """

    def __init__(
        self, model: nn.Module, sources: Iterable[str], *, owner: str
    ) -> None:
        self.owner = owner
        self.model = model
        self.sources = tuple(sources)
        for source in self.sources:
            find_module(model, source, owner=owner)
        self._outputs: dict[str, tuple[Tensor, ...]] = {}
        self._versions: dict[str, list[int]] = {}
        self._handles: list = []
        self._waiting: list[tuple[Mapping[str, int], Callable]] = []

    def when_recorded(
        self,
        counts: Mapping[str, int],
        call: Callable[[dict[str, tuple[Tensor, ...]]], None],
    ) -> None:
        """Call a function while the model runs, once, inside the block.

        Args:
            counts: The number of tensors by source that it waits for.
            call: Gets the outputs of these sources.
        """
        self._waiting.append((counts, call))

    def _tell(self) -> None:
        for waiting in list(self._waiting):
            counts, call = waiting
            if all(
                len(self._outputs.get(source, ())) == count
                for source, count in counts.items()
            ):
                self._waiting.remove(waiting)
                call({source: self._outputs[source] for source in counts})

    def __enter__(self) -> 'Recorder':
        self.clear()
        for source in self.sources:
            # Looked up again: converting norms to SyncBN replaces modules.
            module = self.model.get_submodule(source)
            self._handles.append(
                module.register_forward_hook(self._hook(source))
            )
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._waiting.clear()

    def _hook(self, source: str):
        def record(module: nn.Module, args: Any, output: Any) -> None:
            feats = as_tuple(output, source=source)
            self._outputs[source] = self._outputs.get(source, ()) + feats
            self._versions.setdefault(source, []).extend(
                0 if feat.is_inference() else feat._version for feat in feats
            )
            self._tell()

        return record

    def clear(self) -> None:
        """Drop what was recorded, to free its memory."""
        self._outputs, self._versions = {}, {}

    def pop(self) -> dict[str, tuple[Tensor, ...]]:
        """Return what was recorded, and drop it.

        Raises:
            RuntimeError: A source was not called, or its output was changed
                in place afterwards.
        """
        outputs, versions = self._outputs, self._versions
        self.clear()
        for source in self.sources:
            if source not in outputs:
                kind = type(self.model.get_submodule(source)).__name__
                raise RuntimeError(
                    f'Source {source!r} of the {self.owner} ({kind}) was '
                    'never called in this forward pass, so there is nothing '
                    'to distil from it. Containers such as ModuleList are '
                    'not called themselves: name one of their children.'
                )
            for feat, version in zip(
                outputs[source], versions[source], strict=True
            ):
                if not feat.is_inference() and feat._version != version:
                    raise RuntimeError(
                        f'The output of source {source!r} of the '
                        f'{self.owner} was changed in place after it was '
                        'recorded (by an in-place activation or addition '
                        'after it), so the recorded value is wrong. Choose '
                        'the module that follows, or set inplace=False '
                        'there.'
                    )
        return {source: outputs[source] for source in self.sources}
