"""What a module shows of itself: its public names, those of its submodules among them that are not imported yet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType


def showing(names: Sequence[str]) -> Callable[[], list[str]]:
    """The `__dir__` of a module that shows these names alone."""
    return lambda: sorted(names)


def importing(package: str, names: Sequence[str]) -> Callable[[str], ModuleType]:
    """The `__getattr__` of a package that imports those of these submodules that are asked for (PEP 562)."""

    def submodule(name: str) -> ModuleType:
        if name in names:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])

    return submodule
