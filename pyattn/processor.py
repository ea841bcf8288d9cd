"""What Linux says of the processor."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def fields() -> dict[str, str]:
    """Of the first core, by the names in /proc/cpuinfo; nothing where there is no such file."""
    found: dict[str, str] = {}
    if (source := Path("/proc/cpuinfo")).exists():
        for line in source.read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    return found
