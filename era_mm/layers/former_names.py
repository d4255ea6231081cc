"""Loads files in which parts of a module have other names."""

from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar

from torch import Tensor, nn


class FormerNames(nn.Module):
    """A module some of whose children had other names in older files.

    It loads such files like newer ones, also as a part of another model.

    Source: ours.
    """

    #: Names of children by their former names.
    former_names: ClassVar[Mapping[str, str]] = {}

    def rename(
        self, state_dict: MutableMapping[str, Tensor], prefix: str
    ) -> None:
        """Give the children's tensors in a state dict the present names.

        Args:
            state_dict: Changed in place.
            prefix: What this module's keys begin with.
        """
        for former, name in self.former_names.items():
            start = f'{prefix}{former}.'
            for key in [key for key in state_dict if key.startswith(start)]:
                present = f'{prefix}{name}.{key.removeprefix(start)}'
                state_dict[present] = state_dict.pop(key)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.rename(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def with_present_names(
    module: nn.Module, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A module's state dict from a file, with the present names.

    For who compares the names before the module loads them.
    """
    renamed = dict(state_dict)
    for name, part in module.named_modules():
        if isinstance(part, FormerNames):
            part.rename(renamed, f'{name}.' if name else '')
    return renamed
