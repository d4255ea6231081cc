"""A plugin of mypy: submodules are untyped, everything else of torch is typed.

torch types a submodule ``Tensor | Module`` and what lies in a ``ModuleList``
or ``ModuleDict`` ``Module``. With that mypy would let no submodule be called,
indexed or asked for what its class has.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, MethodContext, Plugin
from mypy.types import (
    AnyType,
    Instance,
    Type,
    TypeOfAny,
    UnionType,
    get_proper_type,
)

MODULE = 'torch.nn.modules.module.Module'
CONTAINERS = tuple(
    f'torch.nn.modules.container.{name}.'
    for name in ('ModuleList', 'ModuleDict', 'Sequential')
)
ANY = AnyType(TypeOfAny.special_form)


class Submodules(Plugin):
    """Makes ``Any`` of what modules and their containers give back."""

    def get_attribute_hook(
        self, fullname: str
    ) -> Callable[[AttributeContext], Type] | None:
        """Called for each attribute of a class that mypy looks up."""
        return of_getattr if fullname.startswith(f'{MODULE}.') else None

    def get_method_hook(
        self, fullname: str
    ) -> Callable[[MethodContext], Type] | None:
        """Called for each method that mypy sees called."""
        return of_container if fullname.startswith(CONTAINERS) else None


def of_getattr(context: AttributeContext) -> Type:
    """``Any`` for the union of ``__getattr__``; else as it is."""
    found = get_proper_type(context.default_attr_type)
    return ANY if isinstance(found, UnionType) else found


def of_container(context: MethodContext) -> Type:
    """The type that a method gives, with ``Any`` for ``Module`` in it."""
    return loosen(context.default_return_type)


def loosen(given: Type) -> Type:
    """A type with ``Any`` for ``Module`` in it."""
    found = get_proper_type(given)
    if isinstance(found, Instance):
        if found.type.fullname == MODULE:
            return ANY
        return found.copy_modified(args=[loosen(arg) for arg in found.args])
    if isinstance(found, UnionType):
        return UnionType([loosen(item) for item in found.items])
    return found


def plugin(version: str) -> type[Plugin]:
    """What mypy asks for."""
    return Submodules
