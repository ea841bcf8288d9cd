"""Modules of ours under the names of packages that code imports."""

from __future__ import annotations

import sys
from types import ModuleType

from pyattn.check import UnsupportedError


def install(stand_ins: dict[str, ModuleType]) -> None:
    """From here on importing a name imports its stand-in, in this process.

    Raises:
        UnsupportedError: another module of that name is imported already, and may be in use.
    """
    for name, module in stand_ins.items():
        other = sys.modules.get(name, module)
        if other is not module:
            place = getattr(other, "__file__", None) or "a module without a file"
            raise UnsupportedError(
                f"install: expected no {name} imported yet, got {place}: call install() before it is"
            )
    sys.modules.update(stand_ins)


def uninstall(stand_ins: dict[str, ModuleType]) -> None:
    """Undoes `install`. Who has imported a name meanwhile keeps what was imported."""
    for name, module in stand_ins.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
